"""SwiGLU: out = silu(gate) * up, one pass over rows of any stride, in float32."""

import triton
import triton.language as tl
from torch import Tensor

from .common import next_power_of_2, over_rows, row_offset

BLOCK = 4096  # elements a program: 16 bytes a thread and load at 8 warps and 16 bits, twice
WARPS = 8


@triton.jit
def _places(N, F, BR: tl.constexpr, BF: tl.constexpr):
    """Rows [BR, 1], columns [1, BF] and which of them exist, of the tile that this program works on."""
    tiles = tl.cdiv(F, BF)
    pid = tl.program_id(0).to(tl.int64)
    r = pid // tiles * BR + tl.arange(0, BR)[:, None]
    f = (pid % tiles).to(tl.int32) * BF + tl.arange(0, BF)[None, :]
    return r, f, (r < N) & (f < F)


@triton.jit
def _fwd(gate, up, out, N, F, n1, n2, g0, g1, g2, u0, u1, u2, o0, o1, o2, BR: tl.constexpr, BF: tl.constexpr):
    """out = gate sigmoid(gate) up"""
    r, f, here = _places(N, F, BR, BF)
    g = tl.load(gate + row_offset(r, n1, n2, g0, g1, g2) + f, mask=here).to(tl.float32)
    u = tl.load(up + row_offset(r, n1, n2, u0, u1, u2) + f, mask=here).to(tl.float32)
    value = g * tl.sigmoid(g) * u
    tl.store(out + row_offset(r, n1, n2, o0, o1, o2) + f, value.to(out.dtype.element_ty), mask=here)


# fmt: off
@triton.jit
def _bwd(
    dout, gate, up, dgate, dup, N, F, n1, n2,
    d0, d1, d2, g0, g1, g2, u0, u1, u2, a0, a1, a2, b0, b1, b2, BR: tl.constexpr, BF: tl.constexpr,
):
    """dup = dout silu(gate), dgate = dout up s (1 + gate (1 - s)), s = sigmoid(gate)."""
    # fmt: on
    r, f, here = _places(N, F, BR, BF)
    d = tl.load(dout + row_offset(r, n1, n2, d0, d1, d2) + f, mask=here).to(tl.float32)
    g = tl.load(gate + row_offset(r, n1, n2, g0, g1, g2) + f, mask=here).to(tl.float32)
    u = tl.load(up + row_offset(r, n1, n2, u0, u1, u2) + f, mask=here).to(tl.float32)
    s = tl.sigmoid(g)
    slope = s * (1 + g * (1 - s))
    tl.store(dgate + row_offset(r, n1, n2, a0, a1, a2) + f, (d * u * slope).to(dgate.dtype.element_ty), mask=here)
    tl.store(dup + row_offset(r, n1, n2, b0, b1, b2) + f, (d * g * s).to(dup.dtype.element_ty), mask=here)


def _launch(kernel, *tensors: Tensor) -> None:
    F = tensors[0].shape[-1]
    BF = min(next_power_of_2(F), BLOCK)
    BR = BLOCK // BF

    def launch(rows, sizes, strides, *parts):
        grid = (triton.cdiv(rows, BR) * triton.cdiv(F, BF),)
        flat = (s for each in strides for s in each)
        kernel[grid](*parts, rows, F, *sizes[1:], *flat, BR=BR, BF=BF, num_warps=WARPS)

    if F:
        over_rows(launch, *tensors)


def swiglu_fwd(gate: Tensor, up: Tensor, out: Tensor) -> None:
    _launch(_fwd, gate, up, out)


def swiglu_bwd(dout: Tensor, gate: Tensor, up: Tensor, dgate: Tensor, dup: Tensor) -> None:
    _launch(_bwd, dout, gate, up, dgate, dup)
