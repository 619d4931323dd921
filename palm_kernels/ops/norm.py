"""RMSNorm (Zhang and Sennrich 2019) and LayerNorm (Ba 2016), each with the residual add that often stands before it."""

import torch
from torch import Tensor

from ..checks import check_device, check_floats, check_gain, check_shape, distinct
from ..dispatch import define, empty, empty_statistic, needs_autograd, public, refuse_double_backward


def _like(x: Tensor, wanted: bool) -> Tensor:
    """An output in x's shape, or an empty one that stands for none: a functional op's outputs are not optional."""
    return empty(x, x.shape if wanted else (0,))


def _gradients(x: Tensor, gain_grads: bool, *gains: Tensor | None) -> tuple[Tensor, ...]:
    """dx and the gradients of weight and bias, empty where there is none."""
    return empty(x, x.shape), *(
        x.new_empty(0) if g is None else empty(g, g.shape if gain_grads else (0,)) for g in gains
    )


_rms_fwd = define(
    "norm",
    "rms_norm_fwd(Tensor x, Tensor? residual, Tensor? weight, float eps, float offset) -> (Tensor, Tensor, Tensor)",
    lambda x, residual, *_: (empty(x, x.shape), _like(x, residual is not None), empty_statistic(x, x.shape[:-1])),
    spread=lambda x, residual, weight, eps, offset, out, total, rstd: (
        *(x, residual, weight, eps, offset, out),
        *(None if residual is None else total, rstd),
    ),
)
_rms_bwd = define(
    "norm",
    "rms_norm_bwd(Tensor dout, Tensor x, Tensor? weight, Tensor rstd, Tensor? dsum, float offset, bool gain_grads) -> (Tensor, Tensor)",
    lambda dout, x, weight, rstd, dsum, offset, gain_grads: _gradients(x, gain_grads, weight),
    spread=lambda dout, x, weight, rstd, dsum, offset, gain_grads, dx, dweight: (
        *(dout, x, weight, rstd, dsum, offset, dx),
        dweight if gain_grads and weight is not None else None,
    ),
)
_layer_fwd = define(
    "norm",
    "layer_norm_fwd(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, float offset) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    lambda x, residual, *_: (
        empty(x, x.shape),
        _like(x, residual is not None),
        empty_statistic(x, x.shape[:-1]),
        empty_statistic(x, x.shape[:-1]),
    ),
    spread=lambda x, residual, weight, bias, eps, offset, out, total, mean, rstd: (
        *(x, residual, weight, bias, eps, offset, out),
        *(None if residual is None else total, mean, rstd),
    ),
)
_layer_bwd = define(
    "norm",
    "layer_norm_bwd(Tensor dout, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd, Tensor? dsum, float offset, "
    "bool gain_grads) -> (Tensor, Tensor, Tensor)",
    lambda dout, x, weight, bias, mean, rstd, dsum, offset, gain_grads: _gradients(x, gain_grads, weight, bias),
    spread=lambda dout, x, weight, bias, mean, rstd, dsum, offset, gain_grads, dx, dweight, dbias: (
        *(dout, x, weight, mean, rstd, dsum, offset, dx),
        dweight if gain_grads and weight is not None else None,
        dbias if gain_grads and bias is not None else None,
    ),
)


class RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, eps, offset):
        ctx.set_materialize_grads(False)
        out, total, rstd = _rms_fwd(x, residual, weight, eps, offset)
        ctx.save_for_backward(x if residual is None else total, weight, rstd)
        ctx.offset, ctx.summed = offset, residual is not None
        return out, total

    @staticmethod
    def backward(ctx, dout, dsum):
        refuse_double_backward("rms_norm")
        x, weight, rstd = ctx.saved_tensors
        dout = x.new_zeros(x.shape) if dout is None else dout
        _, residual, gain, *_ = ctx.needs_input_grad
        dx, dweight = _rms_bwd(dout, x, weight, rstd, dsum if ctx.summed else None, ctx.offset, gain)
        return dx, dx if residual else None, dweight if gain else None, None, None


class LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, bias, eps, offset):
        ctx.set_materialize_grads(False)
        out, total, mean, rstd = _layer_fwd(x, residual, weight, bias, eps, offset)
        ctx.save_for_backward(x if residual is None else total, weight, bias, mean, rstd)
        ctx.offset, ctx.summed = offset, residual is not None
        return out, total

    @staticmethod
    def backward(ctx, dout, dsum):
        refuse_double_backward("layer_norm")
        x, *saved = ctx.saved_tensors
        dout = x.new_zeros(x.shape) if dout is None else dout
        _, residual, gain, shift, *_ = ctx.needs_input_grad
        dx, dweight, dbias = _layer_bwd(dout, x, *saved, dsum if ctx.summed else None, ctx.offset, gain or shift)
        return dx, dx if residual else None, dweight if gain else None, dbias if shift else None, None, None


def _check(op: str, x: Tensor, residual: Tensor | None, **gains: Tensor | None) -> None:
    """x [..., C], residual in its shape and dtype, gains [C] in its dtype or float32 beside 16 bits."""
    check_floats(op, x=x, residual=residual)
    if x.dim() == 0:
        raise ValueError(f"{op}: x has no dimensions, need [..., C]")
    if residual is not None:
        check_shape(op, "residual", residual, x.shape, "x's shape")
    for name, gain in gains.items():
        if gain is not None:
            check_gain(op, name, gain, x)
            check_shape(op, name, gain, x.shape[-1:], "[C]")
    check_device(op, x=x, **gains)


@public
def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    *,
    eps: float = 1e-6,
    offset: float = 0.0,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """s rsqrt(mean(s^2) + eps) (weight + offset), s = x or x + residual (Zhang and Sennrich 2019; PaLM has offset 1).

    x: [..., C], float32, bfloat16, float16 (float64 on the CPU); residual: x's shape and dtype.
    weight: [C] in x's dtype, or float32 beside 16-bit x; None leaves the gain (and offset) out.
    Returns [..., C] in x's dtype, and with residual the pair (norm, s), both differentiable, s rounded to x's dtype before the
    norm. Sums and gradients accumulate in float32 (float64).
    Raises ValueError (shape, device), TypeError (dtype).
    """
    _check("rms_norm", x, residual, weight=weight)
    x, residual, weight = distinct(x, residual, weight)
    if needs_autograd(x, residual, weight):
        out, total = RMSNorm.apply(x, residual, weight, eps, offset)
    else:
        out, total, _ = _rms_fwd(x, residual, weight, eps, offset)
    return out if residual is None else (out, total)


@public
def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    *,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    offset: float = 0.0,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """(s - mean(s)) rsqrt(var(s) + eps) (weight + offset) + bias, s = x or x + residual (Ba 2016).

    x: [..., C], float32, bfloat16, float16 (float64 on the CPU); residual: x's shape and dtype.
    weight, bias: [C] in x's dtype, or float32 beside 16-bit x; a weight of None leaves the gain (and offset) out.
    Returns [..., C] in x's dtype, and with residual the pair (norm, s), both differentiable, s rounded to x's dtype before the
    norm. Sums, the variance about the mean, and gradients accumulate in float32 (float64).
    Raises ValueError (shape, device), TypeError (dtype).
    """
    _check("layer_norm", x, residual, weight=weight, bias=bias)
    if weight is not None and bias is not None and weight.dtype != bias.dtype:
        weight, bias = weight.float(), bias.float()
    x, residual, weight, bias = distinct(x, residual, weight, bias)
    if needs_autograd(x, residual, weight, bias):
        out, total = LayerNorm.apply(x, residual, weight, bias, eps, offset)
    else:
        out, total, *_ = _layer_fwd(x, residual, weight, bias, eps, offset)
    return out if residual is None else (out, total)
