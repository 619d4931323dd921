"""soft_weak_embedding: forward is one pass from ids to mixed rows; backward a sum over sorted contributions.

Backward, as on the CPU: each token has two entries, its share of weight[id] and of its source. Entries are sorted by the row of dweight
that they add to (the mask is a row behind the last one) and each row's segment is summed in that order. A long segment (a frequent token,
the mask) is summed in pieces first: those of PIECE sorted entries between fixed places, so that all shapes are static and no program sums
more than PIECE entries, or one row's pieces.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import MAX_LEADING, leading, next_power_of_2, row_offset

BLOCK = 4096  # elements a program: 16 bytes a thread and load at 8 warps and 16 bits, twice
WARPS = 8
ROWS = 32  # tokens a program at most: of narrow rows a thread would hold so many places and scalars that they spill
PIECE = 256  # entries a piece; segments of more are summed by pieces
AT_ONCE = 4  # entries or pieces, at least, that are read side by side: rows far apart, each read waits for memory
KEYS = 1024  # tokens a program that makes keys


@triton.jit
def _token(r, N, vocab, ids, strength, sources, HAS_SOURCES: tl.constexpr):
    """id, source (-1: the mask), strength a of tokens r, and which are there."""
    here = r < N
    id = tl.load(ids + r, mask=here, other=0).to(tl.int64)
    source = tl.load(sources + r, mask=here, other=-1).to(tl.int64) if HAS_SOURCES else id * 0 - 1
    a = tl.load(strength + r, mask=here, other=0.0)
    good_id, good_source, good_a = (id >= 0) & (id < vocab), source < vocab, (a >= 0) & (a <= 1)
    tl.device_assert(good_id | ~here, "soft_weak_embedding: need 0 <= id < V (weight's rows)")
    tl.device_assert(good_source | ~here, "soft_weak_embedding: need source_ids below V (weight's rows)")
    tl.device_assert(good_a | ~here, "soft_weak_embedding: need 0 <= strength <= 1")
    return id, tl.maximum(source, -1), a, here & good_id & good_source & good_a


@triton.jit
def _scale(a, PRESERVING: tl.constexpr):
    """r(a) = ((1-a)^2 + a^2)^(-1/2), or 1."""
    return 1 / tl.sqrt_rn((1 - a) * (1 - a) + a * a) if PRESERVING else a * 0 + 1


@triton.jit
def _source(weight, mask, source, w0, c, read, HAS_SOURCES: tl.constexpr, HAS_MASK: tl.constexpr):
    """The source's elements c where `read`, as stored: weight[source], the mask where source < 0, or zeros."""
    from_mask = read & (source < 0)
    if HAS_MASK:
        value = tl.load(mask + c + source * 0, mask=from_mask, other=0.0)
    else:
        value = (c + source * 0).to(tl.float32) * 0
        value = value.to(weight.dtype.element_ty)
    if HAS_SOURCES:
        from_row = read & (source >= 0)
        value = tl.where(from_row, tl.load(weight + source * w0 + c, mask=from_row, other=0.0), value)
    return value


# fmt: off
@triton.jit(debug=True)
def _fwd(
    ids, weight, strength, mask, sources, out, N, C, vocab, w0,
    HAS_SOURCES: tl.constexpr, HAS_MASK: tl.constexpr, PRESERVING: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):
    """out = r(a) ((1-a) weight[id] + a source); at a = 0 and 1 the bits of one of them, and the other is not read."""
    # fmt: on
    tiles = tl.cdiv(C, BC)
    pid = tl.program_id(0).to(tl.int64)
    r = pid // tiles * BR + tl.arange(0, BR)
    c = ((pid % tiles).to(tl.int32) * BC + tl.arange(0, BC))[None, :]
    id, source, a, good = _token(r, N, vocab, ids, strength, sources, HAS_SOURCES)
    scale = _scale(a, PRESERVING)[:, None]
    id, source, a, here = id[:, None], source[:, None], a[:, None], good[:, None] & (c < C)
    e = tl.load(weight + id * w0 + c, mask=here & (a < 1), other=0.0)
    s = _source(weight, mask, source, w0, c, here & (a > 0), HAS_SOURCES, HAS_MASK)
    mixed = (scale * ((1 - a) * e.to(tl.float32) + a * s.to(tl.float32))).to(out.dtype.element_ty)
    value = tl.where(a == 0, e, tl.where(a == 1, s, mixed))
    tl.store(out + r.to(tl.int64)[:, None] * C + c, value, mask=here)


@triton.jit(debug=True)
def _keys(ids, strength, sources, keys, N, vocab, rows, HAS_SOURCES: tl.constexpr, MASK: tl.constexpr, B: tl.constexpr):
    """keys[2 r], keys[2 r + 1]: the rows of the result that token r's shares add to; rows is the mask, rows + 1 nothing.

    An exact 0 or 1 leaves one side out; rows is 0 where dweight is not wanted.
    """
    r = tl.program_id(0) * B + tl.arange(0, B)
    id, source, a, _ = _token(r, N, vocab, ids, strength, sources, HAS_SOURCES)
    nothing = rows + 1
    own = tl.where((a < 1) & (rows > 0), id, nothing)
    other = tl.where((source >= 0) & (rows > 0), source, nothing)
    if MASK:
        other = tl.where(source < 0, rows, other)
    other = tl.where(a > 0, other, nothing)
    tl.store(keys + 2 * r, own.to(tl.int32), mask=r < N)
    tl.store(keys + 2 * r + 1, other.to(tl.int32), mask=r < N)


# fmt: off
@triton.jit
def _sum_entries(
    dout, strength, order, begin, end, c, C, n1, n2, d0, d1, d2, PRESERVING: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr,
):
    """The sum of sorted entries begin .. end - 1 over columns c: r(a) (1-a) dout, or r(a) a dout for a source."""
    # fmt: on
    total = tl.zeros((BK, BC), tl.float32)
    for k in range(begin, end, BK):
        at = k + tl.arange(0, BK)
        here = at < end
        entry = tl.load(order + at, mask=here, other=0)
        r = entry // 2
        a = tl.load(strength + r, mask=here, other=0.0)
        share = _scale(a, PRESERVING) * tl.where(entry % 2 == 1, a, 1 - a)
        x = dout + row_offset(r, n1, n2, d0, d1, d2)[:, None] + c
        g = tl.load(x, mask=here[:, None] & (c < C), other=0.0).to(tl.float32)
        total += tl.where(here[:, None], share[:, None] * g, 0.0)
    return tl.sum(total, 0)


# fmt: off
@triton.jit
def _pieces(
    dout, strength, order, keys, starts, sums, M, C, n1, n2, d0, d1, d2, rows,
    PRESERVING: tl.constexpr, PIECE: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr,
):
    """sums[p, 0]: what piece p has of the long segment that covers its first entry; sums[p, 1]: of one that begins within it."""
    # fmt: on
    tiles = tl.cdiv(C, BC)
    p = tl.program_id(0) // tiles
    c = (tl.program_id(0) % tiles * BC + tl.arange(0, BC))[None, :]
    first, last = p * PIECE, tl.minimum(p * PIECE + PIECE, M) - 1
    for side in tl.static_range(2):
        key = tl.load(keys + (first if side == 0 else last))
        kept = key <= rows  # else entries that add to nothing
        begin = tl.load(starts + key, mask=kept, other=0)
        end = tl.load(starts + key + 1, mask=kept, other=0)
        if (end - begin > PIECE) & ((begin <= first) if side == 0 else (begin > first)):
            # fmt: off
            total = _sum_entries(
                dout, strength, order, tl.maximum(begin, first), tl.minimum(end, last + 1), c, C, n1, n2, d0, d1, d2,
                PRESERVING, BK, BC,
            )
            # fmt: on
            at = sums + (p * 2 + side).to(tl.int64) * C + c
            tl.store(at, total[None, :], mask=c < C)


# fmt: off
@triton.jit
def _segments(
    dout, strength, order, starts, sums, dweight, dmask, C, n1, n2, d0, d1, d2, rows,
    PRESERVING: tl.constexpr, PIECE: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr,
):
    """dweight[row] (dmask for row = rows) = the sum of its segment, in order; 0 where it is empty."""
    # fmt: on
    tiles = tl.cdiv(C, BC)
    pid = tl.program_id(0).to(tl.int64)
    row = pid // tiles
    c = ((pid % tiles).to(tl.int32) * BC + tl.arange(0, BC))[None, :]
    begin, end = tl.load(starts + row), tl.load(starts + row + 1)
    if end - begin > PIECE:
        total = tl.zeros((BK, BC), tl.float32)
        for k in range(begin // PIECE, (end - 1) // PIECE + 1, BK):
            p = k + tl.arange(0, BK)[:, None]
            slot = 2 * p + (begin > p * PIECE).to(tl.int64)
            total += tl.load(sums + slot * C + c, mask=(p <= (end - 1) // PIECE) & (c < C), other=0.0)
        value = tl.sum(total, 0)
    else:
        value = _sum_entries(dout, strength, order, begin, end, c, C, n1, n2, d0, d1, d2, PRESERVING, BK, BC)
    if dmask is not None and row == rows:
        tl.store(dmask + c, value[None, :].to(dmask.dtype.element_ty), mask=c < C)
    if dweight is not None and row < rows:
        tl.store(dweight + row * C + c, value[None, :].to(dweight.dtype.element_ty), mask=c < C)


# fmt: off
@triton.jit(debug=True)
def _slope(
    dout, ids, weight, strength, mask, sources, dstrength, N, C, vocab, w0, n1, n2, d0, d1, d2,
    HAS_SOURCES: tl.constexpr, HAS_MASK: tl.constexpr, PRESERVING: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):
    """dstrength = dout.(r (c - E) + r' u), u = (1-a) E + a c, r' = (1-2a) r^3.

    At 0 and 1 what is not finite counts as 0: forward did not read the side it comes from.
    """
    # fmt: on
    r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    id, source, a, good = _token(r, N, vocab, ids, strength, sources, HAS_SOURCES)
    x = dout + row_offset(r, n1, n2, d0, d1, d2)[:, None]
    edge, a_ = ((a == 0) | (a == 1))[:, None], a[:, None]
    scale = _scale(a_, PRESERVING)
    turn = (1 - 2 * a_) * scale * scale * scale
    total = tl.zeros((BR, BC), tl.float32)
    for start in range(0, C, BC):
        c = (start + tl.arange(0, BC))[None, :]
        here = good[:, None] & (c < C)
        g = tl.load(x + c, mask=here, other=0.0).to(tl.float32)
        e = tl.load(weight + id[:, None] * w0 + c, mask=here, other=0.0).to(tl.float32)
        s = _source(weight, mask, source[:, None], w0, c, here, HAS_SOURCES, HAS_MASK).to(tl.float32)
        slope = s - e
        slope = tl.where(edge & (slope - slope != 0), 0.0, slope)
        if PRESERVING:
            u = tl.where(a_ == 0, e, tl.where(a_ == 1, s, (1 - a_) * e + a_ * s))
            slope = scale * slope + turn * tl.where(edge & (u - u != 0), 0.0, u)
        total += g * slope
    value = tl.sum(total, 1)
    tl.store(dstrength + r, value, mask=r < N)


def _flat(t: Tensor | None) -> Tensor | None:
    """One element a token, next to each other (a reshape alone may be a view with a stride)."""
    return None if t is None else t.reshape(-1).contiguous()


def _columns(C: int, block: int) -> int:
    return min(next_power_of_2(C), block)


# fmt: off
def soft_weak_embedding_fwd(
    ids: Tensor, weight: Tensor, strength: Tensor, mask_embedding: Tensor | None, source_ids: Tensor | None,
    variance_preserving: bool, out: Tensor,
) -> None:
    # fmt: on
    N, C, BC = ids.numel(), weight.shape[1], _columns(weight.shape[1], BLOCK)
    BR = min(ROWS, BLOCK // BC)
    if N * C == 0:
        return
    # fmt: off
    _fwd[triton.cdiv(N, BR) * triton.cdiv(C, BC),](
        _flat(ids), weight, _flat(strength), mask_embedding, _flat(source_ids), out, N, C, weight.shape[0], weight.stride(0),
        HAS_SOURCES=source_ids is not None, HAS_MASK=mask_embedding is not None, PRESERVING=variance_preserving,
        BR=BR, BC=BC, num_warps=WARPS, sanitize_overflow=False,
    )
    # fmt: on


def _row_gradients(dout, walk, ids, strength, source_ids, preserving, vocab, dweight, dmask) -> None:
    """dweight and dmask, each may be None."""
    N, C = ids.numel(), dout.shape[-1]
    rows = 0 if dweight is None else vocab
    keys = torch.empty(2 * N, dtype=torch.int32, device=dout.device)
    # fmt: off
    _keys[triton.cdiv(N, KEYS),](
        ids, strength, source_ids, keys, N, vocab, rows, HAS_SOURCES=source_ids is not None, MASK=dmask is not None, B=KEYS,
        num_warps=WARPS, sanitize_overflow=False,
    )
    # fmt: on
    keys, order = keys.sort(stable=True)
    starts = torch.searchsorted(keys, torch.arange(rows + 2, dtype=torch.int32, device=dout.device))
    BC = _columns(C, BLOCK // AT_ONCE)
    tiles, pieces, count = triton.cdiv(C, BC), triton.cdiv(2 * N, PIECE), rows + (dmask is not None)
    sums = torch.empty(pieces, 2, C, dtype=torch.float32, device=dout.device)

    def shape(elements, a_thread):
        BK = max(AT_ONCE, min(2 * ROWS, elements // BC))
        warps = max(1, BK * BC // (32 * a_thread))
        return {"PRESERVING": preserving, "PIECE": PIECE, "BK": BK, "BC": BC, "num_warps": warps}

    # _pieces: with 32 elements a thread it spills. _segments: 8 columns of each of 4 rows, so that it stores 16 bytes of 16-bit dweight a
    # thread; most segments are short: of few columns it takes fewer entries at once.
    _pieces[pieces * tiles,](dout, strength, order, keys, starts, sums, 2 * N, C, *walk, rows, **shape(BLOCK, 16))
    of = shape(BLOCK // 4, 8 * AT_ONCE)
    _segments[count * tiles,](dout, strength, order, starts, sums, dweight, dmask, C, *walk, rows, **of)


# fmt: off
def soft_weak_embedding_bwd(
    dout: Tensor, ids: Tensor, strength: Tensor, weight: Tensor | None, mask_embedding: Tensor | None,
    source_ids: Tensor | None, variance_preserving: bool, vocab: int, dweight: Tensor | None,
    dmask_embedding: Tensor | None, dstrength: Tensor | None,
) -> None:
    # fmt: on
    N, C = ids.numel(), dout.shape[-1]
    if N * C == 0:
        for gradient in (dweight, dmask_embedding, dstrength):
            if gradient is not None:
                gradient.zero_()
        return
    sizes, (strides,) = leading(dout)
    if len(sizes) > MAX_LEADING:
        dout = dout.contiguous()
        sizes, (strides,) = leading(dout)
    walk = *sizes[1:], *strides
    ids, strength, sources = _flat(ids), _flat(strength), _flat(source_ids)
    if dweight is not None or dmask_embedding is not None:
        gradients = dweight, dmask_embedding
        _row_gradients(dout, walk, ids, strength, sources, variance_preserving, vocab, *gradients)
    if dstrength is not None:
        BC = _columns(C, BLOCK)
        BR = min(ROWS, BLOCK // BC)
        # fmt: off
        _slope[triton.cdiv(N, BR),](
            dout, ids, weight, strength, mask_embedding, sources, dstrength, N, C, vocab, weight.stride(0), *walk,
            HAS_SOURCES=sources is not None, HAS_MASK=mask_embedding is not None, PRESERVING=variance_preserving,
            BR=BR, BC=BC, num_warps=WARPS, sanitize_overflow=False,
        )
        # fmt: on
