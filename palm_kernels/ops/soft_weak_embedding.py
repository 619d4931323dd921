"""Soft weak masking's embedding: from token ids to rows mixed with a mask, in one pass."""

import torch
from torch import Tensor

from ..checks import check_device, check_dim, check_floats, check_integers, check_shape, companion, distinct
from ..dispatch import define, empty, needs_autograd, public, refuse_double_backward

IDS = (torch.int32, torch.int64)


def _column(t: Tensor | None) -> Tensor | None:
    """[...] as [..., 1]: one element a row, as the kernels read it."""
    return None if t is None else t.unsqueeze(-1)


def _refuse(row: int, ids: Tensor, strength: Tensor, source_ids: Tensor | None, vocab: int) -> None:
    """The error for the bad row that a kernel found."""
    at = [int(i) for i in torch.unravel_index(torch.tensor(row), ids.shape)]
    where = str(at) if at else ""
    id, source = int(ids.flatten()[row]), -1 if source_ids is None else int(source_ids.flatten()[row])
    if not 0 <= id < vocab:
        raise ValueError(f"soft_weak_embedding: ids{where} is {id}, need 0 <= id < {vocab} (weight's rows)")
    if source >= vocab:
        raise ValueError(
            f"soft_weak_embedding: source_ids{where} is {source}, need below {vocab} (weight's rows; negative: the mask)"
        )
    value = float(strength.flatten()[row])
    raise ValueError(f"soft_weak_embedding: strength{where} is {value}, need 0 <= strength <= 1")


_fwd = define(
    "soft_weak_embedding",
    "soft_weak_embedding_fwd(Tensor ids, Tensor weight, Tensor strength, Tensor? mask_embedding, Tensor? source_ids, "
    "bool variance_preserving) -> Tensor",
    lambda ids, weight, *_: empty(weight, (*ids.shape, weight.shape[1])),
    spread=lambda ids, weight, strength, mask, source_ids, preserving, out: (
        *(_column(ids), weight, _column(strength), mask, _column(source_ids), preserving, out),
    ),
    check=lambda row, ids, weight, strength, mask, source_ids, preserving: _refuse(
        row, ids, strength, source_ids, weight.shape[0]
    ),
)


def _gradients(dout, ids, strength, weight, mask, source_ids, preserving, vocab, need_weight, need_mask):
    """dweight, dmask, dstrength; empty where not asked for."""
    C = dout.shape[-1]
    return (
        empty(dout, (vocab, C) if need_weight else (0,)),
        empty(dout, (C,) if need_mask else (0,)),
        empty(strength, (0,) if weight is None else strength.shape),
    )


def _spread_bwd(dout, ids, strength, weight, mask, source_ids, preserving, vocab, need_weight, need_mask, *outs):
    dweight, dmask, dstrength = outs
    outs = (
        dweight if need_weight else None,
        dmask if need_mask else None,
        None if weight is None else _column(dstrength),
    )
    return dout, _column(ids), _column(strength), weight, mask, _column(source_ids), preserving, vocab, *outs


# dstrength is computed where weight is given: only it reads weight and mask_embedding.
_bwd = define(
    "soft_weak_embedding",
    "soft_weak_embedding_bwd(Tensor dout, Tensor ids, Tensor strength, Tensor? weight, Tensor? mask_embedding, "
    "Tensor? source_ids, bool variance_preserving, SymInt vocab, bool need_weight, bool need_mask) "
    "-> (Tensor, Tensor, Tensor)",
    _gradients,
    spread=_spread_bwd,
    check=lambda row, dout, ids, strength, weight, mask, source_ids, preserving, vocab, *_: _refuse(
        row, ids, strength, source_ids, vocab
    ),
)


class SoftWeakEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ids, weight, strength, mask_embedding, source_ids, variance_preserving):
        rows = (weight, mask_embedding) if ctx.needs_input_grad[2] else (None, None)
        ctx.save_for_backward(ids, strength, *rows, source_ids)
        ctx.variance_preserving, ctx.vocab = variance_preserving, weight.shape[0]
        return _fwd(ids, weight, strength, mask_embedding, source_ids, variance_preserving)

    @staticmethod
    def backward(ctx, dout):
        refuse_double_backward("soft_weak_embedding")
        _, need_weight, need_strength, need_mask, _, _ = ctx.needs_input_grad
        dweight, dmask, dstrength = _bwd(
            dout, *ctx.saved_tensors, ctx.variance_preserving, ctx.vocab, need_weight, need_mask
        )
        return (
            None,
            dweight if need_weight else None,
            dstrength if need_strength else None,
            dmask if need_mask else None,
            None,
            None,
        )


@public
def soft_weak_embedding(
    ids: Tensor,
    weight: Tensor,
    strength: Tensor,
    *,
    mask_embedding: Tensor | None = None,
    source_ids: Tensor | None = None,
    variance_preserving: bool = False,
) -> Tensor:
    """r(a) [(1 - a) weight[ids] + a c]: each token's embedding, softly masked (this package's definition).

    ids: [...], int32 or int64, 0 <= ids < V. weight: [V, C], float32, bfloat16, float16 (float64 on the CPU).
    strength: [...], a in [0, 1], float32 (float64 beside float64). c is weight[source_ids] where source_ids >= 0 (source_ids: [...],
    int32 or int64), else mask_embedding: [C], weight's dtype (absent: zeros). r is 1; variance_preserving: ((1-a)^2 + a^2)^(-1/2).
    Returns [..., C] in weight's dtype; computed in float32 (float64), rounded once; a = 0 gives the row and a = 1 the source bit for
    bit, without reading the other. Gradients: weight and mask_embedding (deterministic sums in float32, float64), strength.
    Raises ValueError for shapes, devices, and on the CPU for ids or strengths out of range or NaN; TypeError for dtypes.
    """
    op = "soft_weak_embedding"
    check_floats(op, weight=weight, mask_embedding=mask_embedding)
    check_dim(op, "weight", weight, (2,), "[V,C]")
    check_integers(op, "ids", ids, IDS)
    strength = companion(op, "strength", strength, weight)
    check_shape(op, "strength", strength, ids.shape, "ids' shape")
    if mask_embedding is not None:
        check_shape(op, "mask_embedding", mask_embedding, weight.shape[1:], "[C]")
    if source_ids is not None:
        check_integers(op, "source_ids", source_ids, IDS)
        check_shape(op, "source_ids", source_ids, ids.shape, "ids' shape")
        ids, source_ids = distinct(ids, source_ids)
    check_device(op, weight=weight, ids=ids, strength=strength, source_ids=source_ids)
    function = SoftWeakEmbedding.apply if needs_autograd(weight, strength, mask_embedding) else _fwd
    return function(ids, weight, strength, mask_embedding, source_ids, variance_preserving)
