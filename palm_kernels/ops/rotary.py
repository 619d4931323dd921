"""Rotary position embedding (Su 2021; PaLM section 2)."""

import torch
from torch import Tensor

from ..checks import check_device, check_dim, check_floats, check_integers, check_shape, companion, distinct
from ..dispatch import define, empty, needs_autograd, public, refuse_double_backward


def bad_position(op, row, x, cos, positions):
    """Raises for row `row` of [B*T] that a kernel reported."""
    b, t = divmod(row, x.shape[1])
    place = (t,) if positions is None or positions.dim() == 1 else (b, t)
    value = t if positions is None else int(positions[place])
    raise ValueError(
        f"{op}: positions[{', '.join(map(str, place))}] is {value}, cos and sin hold positions 0 to {cos.shape[0] - 1}: "
        "make longer tables with rotary_tables"
    )


_rotary = define(
    "rotary",
    "rotary(Tensor x, Tensor cos, Tensor sin, Tensor? positions, bool interleaved, bool conjugate) -> Tensor",
    lambda x, *_: empty(x, x.shape),
    check=lambda row, x, cos, sin, positions, *_: bad_position("rotary", row, x, cos, positions),
)


class Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin, positions, interleaved):
        ctx.save_for_backward(cos, sin, positions)
        ctx.interleaved = interleaved
        return _rotary(x, cos, sin, positions, interleaved, False)

    @staticmethod
    def backward(ctx, dout):
        refuse_double_backward("rotary")
        return _rotary(dout, *ctx.saved_tensors, ctx.interleaved, True), None, None, None, None


def rotary_tables(
    length: int, dim: int, *, base: float = 10000.0, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin of position * base^(-2i/dim) (Su 2021, equation 15): [length, dim/2] float32, angles in float64.

    dim is the even number of dimensions that rotate: the head dim, or less for partial rotation. Raises ValueError.
    """
    if length < 0 or dim < 0 or dim % 2:
        raise ValueError(f"rotary_tables: length is {length}, dim is {dim}, need length >= 0 and an even dim >= 0")
    powers = torch.arange(0, dim, 2, dtype=torch.float64, device=device) / max(dim, 1)
    angles = torch.arange(length, dtype=torch.float64, device=device)[:, None] * base**-powers
    return angles.cos().float(), angles.sin().float()


def check_tables(
    op: str, x: Tensor, D: int, cos: Tensor, sin: Tensor, positions: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Checks cos, sin [length, half] and positions [T] or [B,T] against x [B,T,...]; returns cos and sin in their dtype beside x.

    Without positions T must be within the tables; their values are the kernel's to check.
    """
    check_dim(op, "cos", cos, (2,), "[length, half]")
    check_shape(op, "sin", sin, cos.shape, "cos's shape")
    check_device(op, x=x, cos=cos, sin=sin)
    cos, sin = distinct(companion(op, "cos", cos, x), companion(op, "sin", sin, x))
    length, half = cos.shape
    if 2 * half > D:
        raise ValueError(f"{op}: cos has shape {list(cos.shape)}, x has {D} dims a head: need at most {D // 2} columns")
    B, T = x.shape[:2]
    if positions is None:
        if length < T:
            raise ValueError(
                f"{op}: x has {T} tokens, cos and sin hold {length} positions: make longer tables with rotary_tables"
            )
        return cos, sin
    check_integers(op, "positions", positions, (torch.int32, torch.int64))
    check_dim(op, "positions", positions, (1, 2), "[T] or [B,T]")
    shape, meaning = ((T,), "[T]") if positions.dim() == 1 else ((B, T), "[B,T]")
    check_shape(op, "positions", positions, shape, meaning)
    check_device(op, x=x, positions=positions)
    return cos, sin


@public
def rotary(
    x: Tensor, cos: Tensor, sin: Tensor, *, positions: Tensor | None = None, interleaved: bool = False
) -> Tensor:
    """(x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin) over the first 2 half dims; the rest is copied (Su 2021, equation 34).

    x: [B,T,H,D] or [B,T,D] (one head), float32, bfloat16, float16 (float64 on the CPU).
    cos, sin: [length, half], float32 (float64 beside float64), without gradients; 2 half <= D. See rotary_tables.
    positions: the tables' row of each token, int32 or int64 [T] or [B,T]; absent: 0 to T-1.
    interleaved: pairs are neighbours (x[2i], x[2i+1]); else halves (x[i], x[i + half]).
    Returns a new tensor in x's shape and dtype; computed in float32 (float64), rounded once.
    Raises ValueError (shape, device, T or a position beyond the tables), TypeError (dtype).
    """
    check_floats("rotary", x=x)
    check_dim("rotary", "x", x, (3, 4), "[B,T,H,D] or [B,T,D]")
    cos, sin = check_tables("rotary", x, x.shape[-1], cos, sin, positions)
    if needs_autograd(x):
        return Rotary.apply(x, cos, sin, positions, interleaved)
    return _rotary(x, cos, sin, positions, interleaved, False)
