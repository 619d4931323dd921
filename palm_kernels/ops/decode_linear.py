"""decode_linear: a linear layer for a few rows, bound by reading its weight once; inference only."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import HALVES, autocast, check_device, check_dim, check_floats, check_shape
from ..dispatch import define, empty, flops, public, served

MOST_ROWS = 16  # beyond, a GEMM reads the weight no more often either

_linear = define(
    "decode_linear",
    "decode_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    lambda x, weight, bias: empty(x, (*x.shape[:-1], weight.shape[0])),
)
flops(_linear, lambda x, weight, *_, out_shape=None, **__: 2 * math.prod(x) * weight[0])


def reads_once(x: Tensor, rows: int) -> bool:
    """Whether the kernel serves so many rows of x; a GEMM is the other way (under torch.compile, which can plan for it, always)."""
    return rows <= MOST_ROWS and not torch.compiler.is_compiling() and served("decode_linear", "decode_linear", x)


@public
def decode_linear(x: Tensor, weight: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias for up to 16 rows, reading the weight once; more rows call F.linear. Inference only, on the CPU.

    x [..., C]; weight [F, C] in x's dtype (float32, bfloat16, float16, float64), or 16-bit beside float32 x; bias [F] in x's or
    weight's dtype. Returns [..., F] in x's dtype, summed in float32 (float64), rounded once. Under autocast all are cast to its dtype.
    Raises ValueError (shape, device), TypeError (dtype), RuntimeError if grad is on and an input requires it, NotImplementedError on
    CUDA: F.linear serves there.
    """
    op = "decode_linear"
    x, weight, bias = autocast(x, weight, bias)
    check_floats(op, x=x)
    check_device(op, x=x, weight=weight, bias=bias)
    if weight.dtype != x.dtype and not (x.dtype == torch.float32 and weight.dtype in HALVES):
        raise TypeError(f"{op}: weight is {weight.dtype}, need {x.dtype} (or bfloat16, float16 beside float32 x)")
    if x.dim() == 0:
        raise ValueError(f"{op}: x has no dimensions, need [..., C]")
    check_dim(op, "weight", weight, (2,), "[F, C]")
    check_shape(op, "weight", weight, (weight.shape[0], x.shape[-1]), "[F, C]")
    if bias is not None:
        if bias.dtype not in (x.dtype, weight.dtype):
            raise TypeError(f"{op}: bias is {bias.dtype}, need {x.dtype} or {weight.dtype}")
        check_shape(op, "bias", bias, weight.shape[:1], "[F]")
        bias = bias.to(x.dtype)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        raise RuntimeError(f"{op}: has no backward; use torch.no_grad() or F.linear")
    if x.device.type == "cuda":
        raise NotImplementedError(f"{op}: the CPU has kernels for it; on CUDA use torch.nn.functional.linear")
    if math.prod(x.shape[:-1]) > MOST_ROWS:
        return F.linear(x, weight.to(x.dtype), bias)
    return _linear(x, weight, bias)
