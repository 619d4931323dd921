"""SwiGLU (Shazeer 2020, equation 5; PaLM section 2): out = silu(gate) * up."""

import torch
from torch import Tensor

from ..checks import autocast, check_floats, check_shape, distinct
from ..dispatch import define, empty, needs_autograd, public, refuse_double_backward

_fwd = define("swiglu", "swiglu_fwd(Tensor gate, Tensor up) -> Tensor", lambda gate, up: empty(gate, gate.shape))
_bwd = define(
    "swiglu",
    "swiglu_bwd(Tensor dout, Tensor gate, Tensor up) -> (Tensor, Tensor)",
    lambda dout, gate, up: (empty(gate, gate.shape), empty(up, up.shape)),
)


def _halves(x: Tensor, gate_first: bool) -> tuple[Tensor, Tensor]:
    """(gate, up) as views of the two halves of x's last dimension."""
    first, second = x.chunk(2, -1)
    return (first, second) if gate_first else (second, first)


_packed_fwd = define(
    "swiglu",
    "swiglu_packed_fwd(Tensor x, bool gate_first) -> Tensor",
    lambda x, gate_first: empty(x, (*x.shape[:-1], x.shape[-1] // 2)),
    kernel="swiglu_fwd",
    spread=lambda x, gate_first, out: (*_halves(x, gate_first), out),
)
_packed_bwd = define(
    "swiglu",
    "swiglu_packed_bwd(Tensor dout, Tensor x, bool gate_first) -> Tensor",
    lambda dout, x, gate_first: empty(x, x.shape),
    kernel="swiglu_bwd",
    spread=lambda dout, x, gate_first, dx: (dout, *_halves(x, gate_first), *_halves(dx, gate_first)),
)


class Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return _fwd(gate, up)

    @staticmethod
    def backward(ctx, dout):
        refuse_double_backward("swiglu")
        return _bwd(dout, *ctx.saved_tensors)


class SwigluPacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gate_first):
        ctx.save_for_backward(x)
        ctx.gate_first = gate_first
        return _packed_fwd(x, gate_first)

    @staticmethod
    def backward(ctx, dout):
        refuse_double_backward("swiglu_packed")
        return _packed_bwd(dout, *ctx.saved_tensors, ctx.gate_first), None


@public
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise (Shazeer 2020, equation 5; PaLM section 2).

    gate, up: [..., F], one shape, dtype (float32, bfloat16, float16; float64 on the CPU) and device.
    Returns [..., F] in that dtype; computed in float32 (float64), rounded once.
    Under autocast both are cast to its dtype first.
    Raises ValueError for shapes or devices that differ, TypeError for dtypes.
    """
    gate, up = autocast(gate, up)
    check_floats("swiglu", gate=gate, up=up)
    if gate.dim() == 0:
        raise ValueError("swiglu: gate has no dimensions, need [..., F]")
    check_shape("swiglu", "up", up, gate.shape, "gate's shape")
    gate, up = distinct(gate, up)
    return Swiglu.apply(gate, up) if needs_autograd(gate, up) else _fwd(gate, up)


@public
def swiglu_packed(x: Tensor, *, gate_first: bool = True) -> Tensor:
    """swiglu of the two halves of one tensor, with one gradient buffer and no copies of the halves.

    x: [..., 2F], float32, bfloat16, float16 (float64 on the CPU); gate is the first half, or with gate_first=False the second
    (the order of PaLM-pytorch). Returns [..., F] in x's dtype.
    Raises ValueError if the last dimension is odd, TypeError for the dtype.
    """
    (x,) = autocast(x)
    check_floats("swiglu_packed", x=x)
    if x.dim() == 0 or x.shape[-1] % 2:
        raise ValueError(f"swiglu_packed: x has shape {list(x.shape)}, need [..., 2F]")
    return SwigluPacked.apply(x, gate_first) if needs_autograd(x) else _packed_fwd(x, gate_first)
