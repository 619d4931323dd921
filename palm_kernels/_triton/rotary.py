"""Rotary position embedding: pairs of columns turned by the angle of their token, one pass, in float32."""

import triton
import triton.language as tl
from torch import Tensor

from .common import multiprocessors, next_power_of_2

BLOCK = 1024  # pairs a program and head: 16 bytes a thread from each member at 4 warps and 16 bits
WARPS = 4


@triton.jit
def _turned(x1, x2, c, s):
    """(x1 c - x2 s, x2 c + x1 s), contracted the same way wherever it stands."""
    x1, x2 = x1.to(tl.float32), x2.to(tl.float32)
    return tl.fma(x1, c, -(x2 * s)), tl.fma(x2, c, x1 * s)


@triton.jit
def _halves(x, out, c, s, col, here, HALF: tl.constexpr):
    """One head of a block of tokens, pairs (col, col + HALF): both members are loaded before either is stored, so out may be x."""
    x1 = tl.load(x + col, mask=here, other=0.0)
    x2 = tl.load(x + HALF + col, mask=here, other=0.0)
    y1, y2 = _turned(x1, x2, c, s)
    tl.store(out + col, y1.to(out.dtype.element_ty), mask=here)
    tl.store(out + HALF + col, y2.to(out.dtype.element_ty), mask=here)


@triton.jit
def _neighbours(x, out, c, s, col, here, BT: tl.constexpr, BC: tl.constexpr):
    """The same for pairs (2i, 2i + 1): col are all columns of the pairs, moved in one piece and taken apart in registers."""
    x1, x2 = tl.split(tl.reshape(tl.load(x + col, mask=here, other=0.0), (BT, BC, 2)))
    y1, y2 = _turned(x1, x2, c, s)
    y = tl.reshape(tl.join(y1, y2), (BT, 2 * BC))
    tl.store(out + col, y.to(out.dtype.element_ty), mask=here)


# fmt: off
@triton.jit(debug=True)
def _rotary(
    x, cos, sin, positions, out, tokens, T, H, length, x0, x1, x2, o0, o1, o2, p0, p1,
    COS: tl.constexpr, SIN: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
    INTERLEAVED: tl.constexpr, CONJUGATE: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr,
):
    """BH heads of BT tokens: x [B, T, H, 2 HALF + REST], a row of cos and sin for each token, read once for all of them.

    The tables' strides and HALF are constants so that a half such as 40 is still known to be a multiple of 16 bytes.
    """
    # fmt: on
    groups = tl.cdiv(H, BH)
    pid = tl.program_id(0).to(tl.int64)
    n = pid // groups * BT + tl.arange(0, BT)[:, None]
    first = (pid % groups).to(tl.int32) * BH
    end = tl.minimum(first + BH, H)
    b, t = n // T, n % T
    p, here = t, n < tokens
    if positions is not None:
        p = tl.load(positions + b * p0 + t * p1, mask=here, other=0).to(tl.int64)
    known = (p >= 0) & (p < length)
    tl.device_assert(known | (n >= tokens), "rotary: every position must be a row of cos and sin")
    here &= known
    x += b * x0 + t * x1
    out += b * o0 + t * o1
    for start in range(0, HALF, BC):
        i = start + tl.arange(0, BC)[None, :]
        some = here & (i < HALF)
        c = tl.load(cos + p * COS + i, mask=some, other=0.0)
        s = tl.load(sin + p * SIN + i, mask=some, other=0.0)
        if CONJUGATE:
            s = -s
        if INTERLEAVED:
            i = 2 * start + tl.arange(0, 2 * BC)[None, :]
            some = here & (i < 2 * HALF)
        for h in range(first, end):
            h = tl.cast(h, tl.int64)
            if INTERLEAVED:
                _neighbours(x + h * x2, out + h * o2, c, s, i, some, BT, BC)
            else:
                _halves(x + h * x2, out + h * o2, c, s, i, some, HALF)
    for start in range(2 * HALF, 2 * HALF + REST, BR):
        i = start + tl.arange(0, BR)[None, :]
        some = here & (i < 2 * HALF + REST)
        for h in range(first, end):
            h = tl.cast(h, tl.int64)
            tl.store(out + h * o2 + i, tl.load(x + h * x2 + i, mask=some), mask=some)


def rotary(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, conjugate: bool, out: Tensor
) -> None:
    if x.numel() == 0:
        return
    length, half = cos.shape
    if x.dim() == 3:
        x, out = x.unsqueeze(2), out.unsqueeze(2)
    B, T, H, D = x.shape
    BC = min(next_power_of_2(half or D), BLOCK)
    BT = min(BLOCK // BC, next_power_of_2(B * T))
    blocks, BH = triton.cdiv(B * T, BT), H
    while BH > 1 and blocks * triton.cdiv(H, BH) < 8 * multiprocessors(x.device):  # few tokens: spread the heads
        BH = triton.cdiv(BH, 2)
    rest = 0 if x.data_ptr() == out.data_ptr() else D - 2 * half
    p0, p1 = (0, 0) if positions is None else (positions.stride(0) if positions.dim() == 2 else 0, positions.stride(-1))
    _rotary[(blocks * triton.cdiv(H, BH),)](
        *(x, cos, sin, positions, out, B * T, T, H, length),
        *(*x.stride()[:3], *out.stride()[:3], p0, p1),
        *(cos.stride(0), sin.stride(0), half, rest, interleaved, conjugate),
        *(BT, BH, BC, min(next_power_of_2(rest), 2 * BC)),
        num_warps=WARPS,
        sanitize_overflow=False,
    )
