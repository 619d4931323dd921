"""Argument checks of the public functions: each message names the op, the argument, what was given and what would do."""

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HALVES = (torch.bfloat16, torch.float16)


def _first(tensors: dict) -> tuple[str, Tensor]:
    for name, t in tensors.items():
        if t is not None:
            return name, t
    raise AssertionError("no tensor given")


def check_floats(op: str, **tensors: Tensor | None) -> None:
    """All floating tensors given share one dtype (TypeError) and one device (ValueError)."""
    first_name, first = _first(tensors)
    if first.dtype not in FLOATS:
        raise TypeError(f"{op}: {first_name} is {first.dtype}, need float32, bfloat16, float16 or float64")
    for name, t in tensors.items():
        if t is not None and t.dtype != first.dtype:
            raise TypeError(f"{op}: {name} is {t.dtype}, {first_name} is {first.dtype}: they must be the same")
    if len(tensors) > 1:
        check_device(op, **tensors)


def check_device(op: str, **tensors: Tensor | None) -> None:
    """All tensors given are on one device."""
    first_name, first = _first(tensors)
    device = first.device
    for name, t in tensors.items():
        if t is not None and t.device != device:
            raise ValueError(f"{op}: {name} is on {t.device}, {first_name} on {device}: move one of them")


def check_shape(op: str, name: str, t: Tensor, shape: tuple, meaning: str) -> None:
    """t has this shape; meaning says it in letters, such as "[B,S]"."""
    if tuple(t.shape) != tuple(shape):
        raise ValueError(f"{op}: {name} has shape {list(t.shape)}, need {meaning} = {list(shape)}")


def check_dim(op: str, name: str, t: Tensor, dims: tuple[int, ...], meaning: str) -> None:
    """t has one of these numbers of dimensions."""
    if t.dim() not in dims:
        raise ValueError(f"{op}: {name} has shape {list(t.shape)}, need {meaning}")


def check_integers(op: str, name: str, t: Tensor, dtypes: tuple) -> None:
    """t is an integer tensor of one of these dtypes."""
    if t.dtype not in dtypes:
        names = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{op}: {name} is {t.dtype}, need {names}")


def companion(op: str, name: str, t: Tensor, beside: Tensor) -> Tensor:
    """A float32 companion (key_bias, cos, strength, class weights): float32, or float64 beside float64, widened if need be."""
    if beside.dtype == torch.float64:
        if t.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{op}: {name} is {t.dtype}, need float64 or float32 beside float64")
        return t.to(torch.float64)
    if t.dtype != torch.float32:
        raise TypeError(f"{op}: {name} is {t.dtype}, need float32")
    return t


def check_gain(op: str, name: str, t: Tensor, beside: Tensor) -> None:
    """A norm's weight or bias: the dtype of x, or float32 beside 16-bit x."""
    if t.dtype != beside.dtype and not (t.dtype == torch.float32 and beside.dtype in HALVES):
        raise TypeError(f"{op}: {name} is {t.dtype}, need {beside.dtype} (or float32 beside 16-bit x)")


def autocast(*tensors: Tensor | None) -> tuple:
    """The tensors in the autocast dtype where autocast is on (float64 is never cast)."""
    first = tensors[0]
    device = (first if first is not None else next(t for t in tensors if t is not None)).device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t is not None and t.dtype in FLOATS[:3] else t for t in tensors)


def distinct(*tensors: Tensor | None) -> tuple:
    """The tensors, a repeated one as a view: torch.compile rejects one tensor twice in an autograd.Function."""
    return tuple(
        t.view_as(t) if t is not None and any(t is u for u in tensors[:i]) else t for i, t in enumerate(tensors)
    )
