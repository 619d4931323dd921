"""Cross entropy: rows of logits to losses in one pass (running maximum and sum of every lane), their gradient in a second one.

z = logit_scale logits. What belongs to a row alone (target, token weight, dloss, results) is read and written as a contiguous vector:
it is V times smaller than the logits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import next_power_of_2, over_rows, row_offset

BLOCK = 4096  # logits a program and step: 16 a thread, 32 bytes of 16-bit logits in flight in each
WARPS = 8
ROWS = 32  # rows a program at most: of narrow rows a thread would hold so many places and scalars that they spill
# Long rows that are read twice: one program with all of a multiprocessor's threads, so that the rows under way at one time (132 of
# 256 KB on an H100) are still in the second cache when they are read again.
LONG_BLOCK = 16384
LONG_WARPS = 32
SUM_BLOCK = 4096  # rows a program that adds row terms up
# z = logit_scale x rounds alike wherever it is used, so that it cancels in lse - z_y and in exp(z_y - lse): no fused multiply-add.
OPTIONS = {"sanitize_overflow": False, "enable_fp_fusion": False}
LARGEST: tl.constexpr = tl.constexpr(3.4028234663852886e38)
# exp gives a subnormal number below this. As on the CPU such probabilities are 0: a GEMM over subnormal numbers can be slow.
LOWEST: tl.constexpr = tl.constexpr(-87.33)


@triton.jit
def _label(r, target, token_weight, weight, V, N, ignore_index, HAS_T: tl.constexpr, HAS_W: tl.constexpr):
    """Target, token weight t, class weight w_y of rows r, and which are kept: nothing else of an ignored row is read."""
    here = r < N
    y = tl.load(target + r, mask=here, other=ignore_index)
    kept = here & (y != ignore_index)
    good = (y >= 0) & (y < V)
    tl.device_assert(good | ~kept, "cross_entropy: need 0 <= target < V, or ignore_index")
    kept = kept & good
    t = tl.load(token_weight + r, mask=kept, other=0.0) if HAS_T else kept.to(tl.float32)
    w = tl.load(weight + y, mask=kept, other=0.0) if HAS_W else kept.to(tl.float32)
    return y, t, w, kept


@triton.jit
def _slope(z, lse, c, y, a, b, d, weight, inside, HAS_W: tl.constexpr, SMOOTH: tl.constexpr):
    """a p_c - b w_c - d [c = y], p = exp(z - lse)."""
    gap = z - lse
    value = a * tl.where(gap < LOWEST, 0.0, tl.exp(gap))
    if SMOOTH:
        value -= b * tl.load(weight + c, mask=inside, other=0.0) if HAS_W else b
    return tl.where(c == y, value - d, value)


@triton.jit
def _factors(g, t, w, lse, total, V, label_smoothing, z_loss, SMOOTH: tl.constexpr, Z: tl.constexpr):
    """a = g t ((1-eps) w_y + eps/V sum w + 2 z_loss w_y lse), b = g t eps/V, d = g t (1-eps) w_y."""
    gt = g * t
    own = w
    b = gt * 0
    if SMOOTH:
        own = (1 - label_smoothing) * w
        b = gt * (label_smoothing / V)
    slope = own
    if SMOOTH:
        slope += label_smoothing / V * total
    if Z:
        slope += 2 * z_loss * w * lse
    return gt * slope, b, gt * own


# fmt: off
@triton.jit(debug=True)
def _rows(
    logits, target, token_weight, dloss, weight, total, loss, z_term, row_weight, lse_out,
    N, V, n1, n2, s0, s1, s2, ignore_index, label_smoothing, z_loss, logit_scale,
    HAS_T: tl.constexpr, HAS_W: tl.constexpr, SMOOTH: tl.constexpr, Z: tl.constexpr, HAS_D: tl.constexpr,
    LSE: tl.constexpr, GRAD: tl.constexpr, BR: tl.constexpr, BL: tl.constexpr, U: tl.constexpr,
):
    """Rows of BL lanes, each lane U neighbouring logits (16 bytes) a step: loss, z term, t w_y, lse; GRAD: dlogits in place.

    l = t ((1-eps) w_y (lse - z_y) + eps/V sum_c w_c (lse - z_c)) + z, z = t z_loss w_y lse^2, with lse = top + log_sum left in its two
    parts, so that no difference of large numbers is rounded. A lane's top is kept finite: neither -inf - -inf nor inf - inf arises.
    """
    # fmt: on
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    y, t, w, kept = _label(r, target, token_weight, weight, V, N, ignore_index, HAS_T, HAS_W)
    x = logits + row_offset(r, n1, n2, s0, s1, s2)
    z_y = tl.load(x + y, mask=kept, other=0.0).to(tl.float32) * logit_scale
    stop = tl.max(kept.to(tl.int32), 0) * V  # a program of ignored rows has nothing to read
    at = (tl.arange(0, BL)[:, None] * U + tl.arange(0, U)[None, :])[None]  # [1, BL, U]
    x3, kept3 = x[:, None, None], kept[:, None, None]

    pivot = tl.zeros((BR,), tl.float32)
    if SMOOTH:  # a level near the logits, about which the gaps keep their digits
        first = tl.load(x3 + at, mask=kept3 & (at < V), other=-float("inf")).to(tl.float32) * logit_scale
        highest = tl.minimum(tl.max(tl.max(tl.where(at < V, first, -LARGEST), 2), 1), LARGEST)
        pivot = tl.where(highest > -LARGEST, highest, 0.0)
    top = tl.full((BR, BL), -LARGEST, tl.float32)
    mass = tl.zeros((BR, BL), tl.float32)
    gap = tl.zeros((BR, BL), tl.float32)
    for start in range(0, stop, BL * U):
        c = start + at
        inside = c < V
        z = tl.load(x3 + c, mask=kept3 & inside, other=0.0).to(tl.float32) * logit_scale
        z = tl.where(inside, z, -float("inf"))
        higher = tl.minimum(tl.maximum(top, tl.max(z, 2)), LARGEST)
        mass = mass * tl.exp(top - higher) + tl.sum(tl.exp(z - higher[:, :, None]), 2)
        top = higher
        if SMOOTH:
            share = tl.where(inside, pivot[:, None, None] - z, 0.0)
            if HAS_W:
                share *= tl.load(weight + c, mask=inside, other=0.0)
            gap += tl.sum(share, 2)

    row_top = tl.max(top, 1)
    log_sum = tl.log(tl.sum(mass * tl.exp(top - row_top[:, None]), 1))
    lse = row_top + log_sum
    value = w * (log_sum + (row_top - z_y))
    sum_w = V + 0.0
    if SMOOTH:
        sum_w = tl.load(total).to(tl.float32) if HAS_W else sum_w
        gaps = tl.sum(gap, 1) + sum_w * (log_sum + (row_top - pivot))
        value = (1 - label_smoothing) * value + label_smoothing / V * gaps
    value *= t
    squares = tl.zeros((BR,), tl.float32)
    if Z:
        squares = t * z_loss * w * lse * lse
        value += squares
    here = r < N
    tl.store(loss + r, tl.where(kept, value, 0.0), mask=here)
    tl.store(z_term + r, tl.where(kept, squares, 0.0), mask=here)
    if row_weight is not None:
        tl.store(row_weight + r, t * w, mask=here)
    if LSE:
        tl.store(lse_out + r, tl.where(kept, lse, 0.0), mask=here)
    if GRAD:
        g = tl.load(dloss + r, mask=kept, other=0.0) * logit_scale if HAS_D else kept.to(tl.float32) * logit_scale
        a, b, d = _factors(g, t, w, lse, sum_w, V, label_smoothing, z_loss, SMOOTH, Z)
        tl.debug_barrier()  # z_y may have been read by another warp than the one that overwrites it
        for start in range(0, V, BL * U):
            c = start + at
            inside = c < V
            z = tl.load(x3 + c, mask=kept3 & inside, other=0.0).to(tl.float32) * logit_scale
            # fmt: off
            value3 = _slope(
                z, lse[:, None, None], c, y[:, None, None], a[:, None, None], b[:, None, None], d[:, None, None],
                weight, inside, HAS_W, SMOOTH,
            )
            # fmt: on
            value3 = tl.where(kept3, value3, 0.0)
            tl.store(x3 + c, value3.to(logits.dtype.element_ty), mask=here[:, None, None] & inside)


# fmt: off
@triton.jit(debug=True)
def _bwd(
    logits, dlogits, target, token_weight, dloss, lse, weight, total, scale,
    N, V, n1, n2, x0, x1, x2, d0, d1, d2, dloss_stride, ignore_index, label_smoothing, z_loss, logit_scale,
    HAS_T: tl.constexpr, HAS_W: tl.constexpr, SMOOTH: tl.constexpr, Z: tl.constexpr, BR: tl.constexpr, BV: tl.constexpr,
):
    """dlogits = dloss scale logit_scale dl/dz, tile by tile; 0 in ignored rows."""
    # fmt: on
    tiles = tl.cdiv(V, BV)
    pid = tl.program_id(0).to(tl.int64)
    r = pid // tiles * BR + tl.arange(0, BR)
    c = ((pid % tiles).to(tl.int32) * BV + tl.arange(0, BV))[None, :]
    y, t, w, kept = _label(r, target, token_weight, weight, V, N, ignore_index, HAS_T, HAS_W)
    g = tl.load(dloss + r * dloss_stride, mask=kept, other=0.0) * tl.load(scale) * logit_scale
    e = tl.load(lse + r, mask=kept, other=0.0)
    sum_w = tl.load(total).to(tl.float32) if HAS_W and SMOOTH else V + 0.0
    a, b, d = _factors(g, t, w, e, sum_w, V, label_smoothing, z_loss, SMOOTH, Z)
    inside = c < V
    x = logits + row_offset(r, n1, n2, x0, x1, x2)[:, None] + c
    z = tl.load(x, mask=kept[:, None] & inside, other=0.0).to(tl.float32) * logit_scale
    value = _slope(z, e[:, None], c, y[:, None], a[:, None], b[:, None], d[:, None], weight, inside, HAS_W, SMOOTH)
    value = tl.where(kept[:, None], value, 0.0)
    out = dlogits + row_offset(r, n1, n2, d0, d1, d2)[:, None] + c
    tl.store(out, value.to(dlogits.dtype.element_ty), mask=(r < N)[:, None] & inside)


@triton.jit
def _partial_sums(terms, sums, N, BLOCK: tl.constexpr):
    """sums[k, i] (float64) of block i of terms[k]: loss, z, t w_y."""
    r = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    for k in tl.static_range(3):
        value = tl.load(terms + tl.cast(N, tl.int64) * k + r, mask=r < N, other=0.0).to(tl.float64)
        tl.store(sums + k * tl.num_programs(0) + tl.program_id(0), tl.sum(value, 0))


@triton.jit
def _mean_or_sum(sums, loss, z, scale, n, MEAN: tl.constexpr, BLOCK: tl.constexpr):
    """loss and z of the sums of all rows, times scale = 1 / sum of t w_y (MEAN; 1 where that is 0)."""
    i = tl.arange(0, BLOCK)
    losses, zs, weights = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
    for start in range(0, n, BLOCK):
        here = start + i < n
        losses += tl.load(sums + start + i, mask=here, other=0.0)
        zs += tl.load(sums + n + start + i, mask=here, other=0.0)
        weights += tl.load(sums + 2 * n + start + i, mask=here, other=0.0)
    weight = tl.sum(weights, 0)
    factor = 1 / tl.where(weight == 0, 1.0, weight) if MEAN else weight * 0 + 1
    tl.store(loss, (tl.sum(losses, 0) * factor).to(tl.float32))
    tl.store(z, (tl.sum(zs, 0) * factor).to(tl.float32))
    tl.store(scale, factor.to(tl.float32))


def _columns(*tensors: Tensor) -> list[Tensor]:
    """Row vectors [...] as contiguous [..., 1], to walk beside the logits."""
    return [t.contiguous().unsqueeze(-1) for t in tensors]


def _weight_total(weight: Tensor | None, label_smoothing: float) -> Tensor | None:
    """sum_c w_c, which smoothing needs."""
    return weight.sum(dtype=torch.float64) if weight is not None and label_smoothing else None


def _run_rows(logits, target, weight, token_weight, dloss, options, gradient, loss, z, row_weight, lse) -> None:
    ignore_index, label_smoothing, z_loss, logit_scale = options
    V, U = logits.shape[-1], 16 // logits.element_size()
    block, warps = (LONG_BLOCK, LONG_WARPS) if gradient and V > 2 * BLOCK else (BLOCK, WARPS)
    columns = max(U, min(next_power_of_2(V), block))
    total = _weight_total(weight, label_smoothing)
    given = {"loss": loss, "z": z, "target": target, "t": token_weight, "d": dloss, "w": row_weight, "lse": lse}
    given = {name: t for name, t in given.items() if t is not None}

    def launch(rows, sizes, strides, x, *row_vectors):
        v = dict(zip(given, row_vectors, strict=True))
        BR = max(1, min(ROWS, block // columns))
        # fmt: off
        _rows[triton.cdiv(rows, BR),](
            x, v["target"], v.get("t"), v.get("d"), weight, total, v["loss"], v["z"], v.get("w"), v.get("lse"),
            rows, V, *sizes[1:], *strides[0], ignore_index, label_smoothing, z_loss, logit_scale,
            HAS_T="t" in v, HAS_W=weight is not None, SMOOTH=label_smoothing != 0, Z=z_loss != 0, HAS_D="d" in v,
            LSE="lse" in v, GRAD=gradient, BR=BR, BL=columns // U, U=U, num_warps=warps, **OPTIONS,
        )
        # fmt: on

    over_rows(launch, logits, *_columns(*given.values()))


# fmt: off
def cross_entropy_fwd(
    logits: Tensor, target: Tensor, weight: Tensor | None, token_weight: Tensor | None, ignore_index: int,
    label_smoothing: float, z_loss: float, logit_scale: float, reduction: str,
    loss: Tensor, z: Tensor, lse: Tensor, scale: Tensor,
) -> None:
    # fmt: on
    options = ignore_index, label_smoothing, z_loss, logit_scale
    if reduction == "none":
        _run_rows(logits, target, weight, token_weight, None, options, False, loss, z, None, lse)
        scale.fill_(1)
        return
    terms = loss.new_empty(3, *target.shape)
    _run_rows(logits, target, weight, token_weight, None, options, False, *terms, lse)
    N = target.numel()
    pieces = triton.cdiv(N, SUM_BLOCK)
    sums = loss.new_empty(3, pieces, dtype=torch.float64)
    if N:
        _partial_sums[pieces,](terms, sums, N, BLOCK=SUM_BLOCK, num_warps=8)
    _mean_or_sum[1,](sums, loss, z, scale, pieces, MEAN=reduction == "mean", BLOCK=1024, num_warps=4)


# fmt: off
def cross_entropy_bwd(
    logits: Tensor, dloss: Tensor, lse: Tensor, scale: Tensor, target: Tensor, weight: Tensor | None,
    token_weight: Tensor | None, ignore_index: int, label_smoothing: float, z_loss: float, logit_scale: float,
    dlogits: Tensor,
) -> None:
    # fmt: on
    V = logits.shape[-1]
    BV = min(next_power_of_2(V), BLOCK)
    BR = max(1, min(ROWS, BLOCK // 2 // BV))  # half a block of narrow rows: their scalars need registers too
    total = _weight_total(weight, label_smoothing)
    one = dloss.dim() == 0 and target.dim() != 0  # mean and sum

    def launch(rows, sizes, strides, x, dx, y, e, *rest):
        rest = list(rest)
        d = dloss if one else rest.pop()
        # fmt: off
        _bwd[triton.cdiv(rows, BR) * triton.cdiv(V, BV),](
            x, dx, y, rest[0] if rest else None, d, e, weight, total, scale, rows, V, *sizes[1:], *strides[0], *strides[1],
            0 if one else 1, ignore_index, label_smoothing, z_loss, logit_scale,
            HAS_T=token_weight is not None, HAS_W=weight is not None, SMOOTH=label_smoothing != 0, Z=z_loss != 0,
            BR=BR, BV=BV, num_warps=WARPS, **OPTIONS,
        )
        # fmt: on

    if V:
        optional = [t for t in (token_weight, None if one else dloss) if t is not None]
        over_rows(launch, logits, dlogits, *_columns(target, lse, *optional))


# fmt: off
def linear_cross_entropy_rows(
    logits: Tensor, target: Tensor, weight: Tensor | None, token_weight: Tensor | None, dloss: Tensor | None,
    ignore_index: int, label_smoothing: float, z_loss: float, logit_scale: float, gradient: bool,
    loss: Tensor, z: Tensor, row_weight: Tensor,
) -> None:
    # fmt: on
    options = ignore_index, label_smoothing, z_loss, logit_scale
    _run_rows(logits, target, weight, token_weight, dloss, options, gradient, loss, z, row_weight, None)
