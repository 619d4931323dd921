"""rms_norm and layer_norm (CENTRED): a row stays in registers between its statistics and its use, all sums in float32.

Bytes an element of 16 bits: forward 4 (8 with residual), backward 6 (8 with dsum). Beyond LONGEST bytes forward reads the row
again (from the cache), and beyond LONGEST_BWD columns backward does, because the gains' sums no longer fit in registers beside it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import next_power_of_2, over_rows, row_offset

TILE = 4096  # elements that 8 warps work on at once, in several short rows or a piece of a long one
TILE_BWD = 2048  # the same for backward, whose sums of dweight and dbias take registers too
LONGEST = 32768  # bytes of a row of x or of a gain, whichever is more, that forward keeps in registers
LONGEST_BWD = 8192  # columns of a row that backward keeps there
COLUMNS = 1024  # of longer rows, a program of backward
GROUPS = 512  # programs of backward, each with its own sums of dweight and dbias: a constant, so that bits depend on shapes alone
SHARED = 98_304  # bytes for the blocks of rows that backward has on their way: at most two


@triton.jit
def _places(block, start, N, C, BR: tl.constexpr, BC: tl.constexpr):
    """Rows [BR, 1] of a block, columns [BR, BC] from start on, and which of these elements exist."""
    r = tl.cast(block, tl.int64) * BR + tl.arange(0, BR)[:, None]
    c = tl.broadcast_to(start + tl.arange(0, BC)[None, :], (BR, BC))
    return r, c, (r < N) & (c < C)


@triton.jit
def _summed(x, residual, total, here):
    """x, or x + residual rounded to their dtype, which is stored: the norm is of what total holds."""
    s = tl.load(x, mask=here, other=0.0).to(tl.float32)
    if residual is not None:
        s = (s + tl.load(residual, mask=here, other=0.0).to(tl.float32)).to(total.dtype.element_ty)
        tl.store(total, s, mask=here)
        s = s.to(tl.float32)
    return s


@triton.jit
def _moments(level, first, second, C, CENTRED: tl.constexpr):
    """Mean and variance from the sums of s - level and its square. Where |mean| is far above the deviation level is all but the
    mean, and what rounding left of it is taken out of both."""
    variance = second / C
    if CENTRED:
        left = first / C
        level += left
        variance -= tl.where(left * left < variance, left * left, 0.0)
    return level, variance


@triton.jit
def _normed(s, mean, rstd, gain, shift, CENTRED: tl.constexpr):
    y = (s - mean if CENTRED else s) * rstd
    if gain is not None:
        y *= gain
    if shift is not None:
        y += shift
    return y


@triton.jit
def _gain(weight, offset, c, some):
    """weight + offset of columns c, which every row needs: kept in the cache.

    c has the shape of x's tile: loaded as one row they would get a layout of their own, and x would be moved into it.
    """
    return tl.load(weight + c, mask=some, other=0.0, eviction_policy="evict_last").to(tl.float32) + offset


# fmt: off
@triton.jit
def _fwd(
    x, residual, weight, bias, out, total, mean, rstd, eps, offset, N, C, n1, n2,
    x0, x1, x2, o0, o1, o2, r0, r1, r2, t0, t1, t2, CENTRED: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):
    """out = (s - mean) rstd (weight + offset) + bias of BR whole rows, s = x + residual; rms_norm has no mean and no bias."""
    # fmt: on
    r, c, here = _places(tl.program_id(0), 0, N, C, BR, BC)
    gain = None if weight is None else _gain(weight, offset, c, c < C)
    shift = None if bias is None else _gain(bias, 0.0, c, c < C)
    i_residual = None if residual is None else residual + row_offset(r, n1, n2, r0, r1, r2) + c
    i_total = None if total is None else total + row_offset(r, n1, n2, t0, t1, t2) + c
    s = _summed(x + row_offset(r, n1, n2, x0, x1, x2) + c, i_residual, i_total, here)
    m, first = 0.0, 0.0
    d = s
    if CENTRED:
        m = tl.sum(s, 1, keep_dims=True) / C
        d = tl.where(here, s - m, 0.0)
        first = tl.sum(d, 1, keep_dims=True)
    m, variance = _moments(m, first, tl.sum(d * d, 1, keep_dims=True), C, CENTRED)
    inverse = 1 / tl.sqrt_rn(variance + eps)
    if mean is not None:
        tl.store(mean + r, m, mask=r < N)
    if rstd is not None:
        tl.store(rstd + r, inverse, mask=r < N)
    y = _normed(s, m, inverse, gain, shift, CENTRED)
    tl.store(out + row_offset(r, n1, n2, o0, o1, o2) + c, y.to(out.dtype.element_ty), mask=here)


# fmt: off
@triton.jit
def _fwd_long(
    x, residual, weight, bias, out, total, mean, rstd, eps, offset, N, C, n1, n2,
    x0, x1, x2, o0, o1, o2, r0, r1, r2, t0, t1, t2, CENTRED: tl.constexpr, BC: tl.constexpr,
):
    """The same for one row in pieces of BC columns, read twice. The variance is taken about the mean of the first piece: if the
    others lie far from it, so that rounding grows by C / BC, then by as much the variance itself."""
    # fmt: on
    r = tl.program_id(0).to(tl.int64)
    x += row_offset(r, n1, n2, x0, x1, x2)
    out += row_offset(r, n1, n2, o0, o1, o2)
    if residual is not None:
        residual += row_offset(r, n1, n2, r0, r1, r2)
        total += row_offset(r, n1, n2, t0, t1, t2)
    level = 0.0
    firsts = tl.zeros((BC,), tl.float32)
    seconds = tl.zeros((BC,), tl.float32)
    for start in range(0, C, BC):
        c = start + tl.arange(0, BC)
        i_residual = None if residual is None else residual + c
        i_total = None if total is None else total + c
        s = _summed(x + c, i_residual, i_total, c < C)
        if CENTRED:
            if start == 0:
                level = tl.sum(s, 0) / BC
            s = tl.where(c < C, s - level, 0.0)
            firsts += s
        seconds += s * s
    m, variance = _moments(level, tl.sum(firsts, 0), tl.sum(seconds, 0), C, CENTRED)
    inverse = 1 / tl.sqrt_rn(variance + eps)
    if mean is not None:
        tl.store(mean + r, m)
    if rstd is not None:
        tl.store(rstd + r, inverse)
    tl.debug_barrier()  # total is read where it was written
    again = x if total is None else total
    for start in range(0, C, BC):
        c = start + tl.arange(0, BC)
        gain = None if weight is None else _gain(weight, offset, c, c < C)
        shift = None if bias is None else _gain(bias, 0.0, c, c < C)
        s = tl.load(again + c, mask=c < C, other=0.0).to(tl.float32)
        y = _normed(s, m, inverse, gain, shift, CENTRED)
        tl.store(out + c, y.to(out.dtype.element_ty), mask=c < C)


@triton.jit
def _terms(d, v, gain, m, inverse, here, CENTRED: tl.constexpr):
    """dout, x^ = (x - mean) rstd and h = dout gain of loaded dout and x, in float32, 0 where there is no element."""
    d, v = d.to(tl.float32), v.to(tl.float32)
    if CENTRED:
        v = tl.where(here, v - m, 0.0)
    v *= inverse
    return d, v, d if gain is None else d * gain


# fmt: off
@triton.jit
def _row_sums(
    dout, x, weight, mean, rstd, sums, offset, N, C, n1, n2, d0, d1, d2, x0, x1, x2,
    CENTRED: tl.constexpr, BC: tl.constexpr,
):
    """sums [3, N] = sum h x^, sum h, sum x^ of a long row (rms_norm: the first alone)."""
    # fmt: on
    r = tl.program_id(0).to(tl.int64)
    dout += row_offset(r, n1, n2, d0, d1, d2)
    x += row_offset(r, n1, n2, x0, x1, x2)
    m = tl.load(mean + r) if CENTRED else 0.0
    inverse = tl.load(rstd + r)
    hx = tl.zeros((BC,), tl.float32)
    h0 = tl.zeros((BC,), tl.float32)
    v0 = tl.zeros((BC,), tl.float32)
    for start in range(0, C, BC):
        c = start + tl.arange(0, BC)
        here = c < C
        gain = None if weight is None else _gain(weight, offset, c, here)
        d, v = tl.load(dout + c, mask=here, other=0.0), tl.load(x + c, mask=here, other=0.0)
        d, v, h = _terms(d, v, gain, m, inverse, here, CENTRED)
        hx += h * v
        if CENTRED:
            h0 += h
            v0 += v
    tl.store(sums + r, tl.sum(hx, 0))
    if CENTRED:
        tl.store(sums + N + r, tl.sum(h0, 0))
        tl.store(sums + 2 * N + r, tl.sum(v0, 0))


# fmt: off
@triton.jit
def _bwd(
    dout, x, weight, mean, rstd, dsum, dx, sums, partial, offset, N, C, n1, n2,
    d0, d1, d2, x0, x1, x2, y0, y1, y2, s0, s1, s2, CENTRED: tl.constexpr, DWEIGHT: tl.constexpr, DBIAS: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr, STAGES: tl.constexpr,
):
    """dx = rstd (h - mean h - x^ mean(h x^)) + dsum of every num_programs-th block of BR rows; their sums of dout x^ and dout go to
    partial [programs, gains, C]. What rounding left of the mean, mean x^, is taken out of h's part along x^ and of x^.
    Sums over the row are made here where a block holds whole rows, and read where it holds BC columns. dx may be dout, dsum or x.
    """
    # fmt: on
    group, start = tl.program_id(0), tl.program_id(1) * BC
    _, c, _ = _places(group, start, N, C, BR, BC)
    gain = None if weight is None else _gain(weight, offset, c, c < C)
    dweight = tl.zeros((BR, BC), tl.float32)
    dbias = tl.zeros((BR, BC), tl.float32)
    for block in tl.range(group, tl.cdiv(N, BR), tl.num_programs(0), num_stages=STAGES):
        r, c, here = _places(block, start, N, C, BR, BC)
        d = tl.load(dout + row_offset(r, n1, n2, d0, d1, d2) + c, mask=here, other=0.0)
        v = tl.load(x + row_offset(r, n1, n2, x0, x1, x2) + c, mask=here, other=0.0)
        m = tl.load(mean + r, mask=r < N, other=0.0) if CENTRED else 0.0
        inverse = tl.load(rstd + r, mask=r < N, other=0.0)
        d, v, h = _terms(d, v, gain, m, inverse, here, CENTRED)
        if DWEIGHT:
            dweight += d * v
        if DBIAS:
            dbias += d
        hx = tl.sum(h * v, 1, keep_dims=True) if sums is None else tl.load(sums + r, mask=r < N, other=0.0)
        hx /= C
        if CENTRED:
            h0 = tl.sum(h, 1, keep_dims=True) if sums is None else tl.load(sums + N + r, mask=r < N, other=0.0)
            v0 = tl.sum(v, 1, keep_dims=True) if sums is None else tl.load(sums + 2 * N + r, mask=r < N, other=0.0)
            h0, v0 = h0 / C, v0 / C
            hx -= v0 * h0
            h -= h0
            v -= v0
        d = inverse * (h - v * hx)
        if dsum is not None:
            d += tl.load(dsum + row_offset(r, n1, n2, s0, s1, s2) + c, mask=here, other=0.0).to(tl.float32)
        tl.store(dx + row_offset(r, n1, n2, y0, y1, y2) + c, d.to(dx.dtype.element_ty), mask=here)
    if DWEIGHT or DBIAS:
        c = start + tl.arange(0, BC)
        partial += tl.cast(group, tl.int64) * (DWEIGHT + DBIAS) * C + c
        if DWEIGHT:
            tl.store(partial, tl.sum(dweight, 0), mask=c < C)
        if DBIAS:
            tl.store(partial + DWEIGHT * C, tl.sum(dbias, 0), mask=c < C)


@triton.jit
def _total(partial, first, second, groups, C, width, BG: tl.constexpr, BC: tl.constexpr):
    """first = the sum over groups of the first C columns of partial [groups, width], second that of the others."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    total = tl.zeros((BG, BC), tl.float32)
    for start in range(0, groups, BG):
        g = start + tl.arange(0, BG)[:, None]
        total += tl.load(partial + g * width + c[None, :], mask=(g < groups) & (c < width)[None, :], other=0.0)
    result = tl.sum(total, 0)
    tl.store(first + c, result.to(first.dtype.element_ty), mask=c < C)
    if second is not None:
        tl.store(second + c - C, result.to(second.dtype.element_ty), mask=(c >= C) & (c < width))


def _column(statistic: Tensor | None, x: Tensor) -> Tensor | None:
    """A contiguous statistic of each row in x's leading shape, for over_rows to index; kernels need no stride of it."""
    return None if statistic is None else statistic.view(*x.shape[:-1], 1)


def _over(launch, x: Tensor, *tensors: Tensor | None) -> None:
    """over_rows for tensors some of which may be absent: they come back as None, with strides 0."""
    given = [t for t in tensors if t is not None]

    def spread(rows, sizes, strides, x, *parts):
        left = iter(zip(parts, strides[1:], strict=True))
        pairs = [next(left) if t is not None else (None, [0, 0, 0]) for t in tensors]
        launch(rows, sizes, [strides[0], *(s for _, s in pairs)], x, *(p for p, _ in pairs))

    over_rows(spread, x, *given)


def _forward(x, residual, weight, bias, eps: float, offset: float, out, total, mean, rstd, centred: bool) -> None:
    C = x.shape[-1]
    BC = next_power_of_2(C)
    widest = max(t.element_size() for t in (x, weight, bias) if t is not None)

    def launch(rows, sizes, strides, x, out, residual, total, mean, rstd):
        flat = [s for each in strides[:4] for s in each]
        args = x, residual, weight, bias, out, total, mean, rstd, eps, offset, rows, C, *sizes[1:], *flat, centred
        if C * widest > LONGEST:
            _fwd_long[(rows,)](*args, TILE, num_warps=8)
        else:
            BR = max(1, TILE // BC)
            _fwd[(triton.cdiv(rows, BR),)](*args, BR, BC, num_warps=max(8, min(16, BC // 512)))

    if C:
        _over(launch, x, out, residual, total, _column(mean, x), _column(rstd, x))


def _add_up(partials: list[Tensor], gains: list[Tensor], C: int) -> None:
    """gains = the sums over the rows of partials, one for each launch; without rows they are 0."""
    if not partials:
        for gain in gains:
            gain.zero_()
        return
    partial = partials[0] if len(partials) == 1 else torch.cat(partials)
    groups, width = partial.shape
    BC = min(256, max(32, next_power_of_2(width // 256)))
    second = gains[1] if len(gains) == 2 else None
    _total[(triton.cdiv(width, BC),)](partial, gains[0], second, groups, C, width, 2048 // BC, BC, num_warps=4)


def _backward(dout, x, weight, mean, rstd, dsum, offset: float, dx, dweight, dbias, centred: bool) -> None:
    C = x.shape[-1]
    gains = [g for g in (dweight, dbias) if g is not None]
    whole = C <= LONGEST_BWD
    BC = next_power_of_2(C) if whole else COLUMNS
    BR, parts, partials = max(1, TILE_BWD // BC), triton.cdiv(C, BC), []
    warps = max(8, BC // 512)
    ahead = 1 if centred and dsum is not None else 2  # addresses of more would not fit in the registers
    stages = 1 + min(ahead, SHARED // (BR * BC * x.element_size() * (2 if dsum is None else 3)))

    def launch(rows, sizes, strides, x, dout, dx, dsum, mean, rstd):
        blocks, sums, partial = triton.cdiv(rows, BR), None, None
        flat = [s for each in (strides[1], strides[0], *strides[2:4]) for s in each]
        if not whole:
            sums = x.new_empty((3, rows), dtype=torch.float32)
            args = dout, x, weight, mean, rstd, sums, offset, rows, C, *sizes[1:], *flat[:6]
            _row_sums[(rows,)](*args, centred, TILE, num_warps=8, enable_fp_fusion=False)
        groups = blocks
        if gains:
            groups = min(triton.cdiv(GROUPS, parts), triton.cdiv(blocks, 4))
            partial = x.new_empty((groups, len(gains) * C), dtype=torch.float32)
            partials.append(partial)
        _bwd[(groups, parts)](
            *(dout, x, weight, mean, rstd, dsum, dx, sums, partial, offset, rows, C, *sizes[1:], *flat),
            *(centred, dweight is not None, dbias is not None, BR, BC, stages if gains else 1),
            num_warps=warps,
            maxnreg=128,  # two blocks of 8 warps a multiprocessor
            enable_fp_fusion=False,  # h - mean h is 0 in a row of one only if h is rounded first
        )

    if C:
        _over(launch, x, dout, dx, dsum, _column(mean, x), _column(rstd, x))
    _add_up(partials, gains, C)


# fmt: off
def rms_norm_fwd(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, offset: float,
    out: Tensor, sum: Tensor | None, rstd: Tensor | None,
) -> None:
    _forward(x, residual, weight, None, eps, offset, out, sum, None, rstd, False)


def rms_norm_bwd(
    dout: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, dsum: Tensor | None, offset: float,
    dx: Tensor, dweight: Tensor | None,
) -> None:
    _backward(dout, x, weight, None, rstd, dsum, offset, dx, dweight, None, False)


def layer_norm_fwd(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, offset: float,
    out: Tensor, sum: Tensor | None, mean: Tensor | None, rstd: Tensor | None,
) -> None:
    _forward(x, residual, weight, bias, eps, offset, out, sum, mean, rstd, True)


def layer_norm_bwd(
    dout: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, dsum: Tensor | None, offset: float,
    dx: Tensor, dweight: Tensor | None, dbias: Tensor | None,
) -> None:
    _backward(dout, x, weight, mean, rstd, dsum, offset, dx, dweight, dbias, True)
