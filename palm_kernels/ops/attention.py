"""Multi-query and grouped-query attention (PaLM section 2; Shazeer 2019): dense, packed, and against a cache."""

import torch
from torch import Tensor

from ..checks import (
    autocast,
    check_device,
    check_dim,
    check_floats,
    check_integers,
    check_shape,
    companion,
    distinct,
)
from ..dispatch import define, empty, empty_statistic, flops, needs_autograd, public, refuse_double_backward

MAX_HEAD_DIM = 256
DECODE_ROWS = 128  # query heads times new tokens up to which attention_decode is the faster reader of a cache
OPTIONS = "bool causal, float scale, int left, int right"


def _out_and_lse(q, k, v, *_):
    return empty(q, q.shape), empty_statistic(q, (q.shape[0], q.shape[2], q.shape[1]))


def _packed_out_and_lse(q, k, v, *_):
    return empty(q, q.shape), empty_statistic(q, (q.shape[1], q.shape[0]))


def _gradients(dout, dlse, q, k, v, out, lse, *rest):
    """dq, dk, dv and dbias (empty when not asked for); rest ends with key_bias at its place and bias_grad last."""
    dbias = empty_statistic(k, k.shape[:-2] if rest[-1] else (0,))
    return empty(q, q.shape), empty(k, k.shape), empty(v, v.shape), dbias


def _spread_gradients(*args):
    """Drops bias_grad; an empty dbias is passed as None."""
    *inputs, bias_grad, dq, dk, dv, dbias = args
    return (*inputs, dq, dk, dv, dbias if bias_grad else None)


def _bad_offsets(b, q, k, v, cu_q, cu_k, *_):
    raise ValueError(
        f"attention_varlen: cu_seqlens_q and cu_seqlens_k must ascend from 0 to {len(q)} and {len(k)} rows; entry {b} "
        f"holds {int(cu_q[b])} and {int(cu_k[b])}"
    )


_fwd = define(
    "attention",
    f"attention_fwd(Tensor q, Tensor k, Tensor v, Tensor? key_bias, Tensor? prefix_lengths, {OPTIONS}) -> (Tensor, Tensor)",
    _out_and_lse,
)
_bwd = define(
    "attention",
    "attention_bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? key_bias, "
    f"Tensor? prefix_lengths, {OPTIONS}, bool bias_grad) -> (Tensor, Tensor, Tensor, Tensor)",
    _gradients,
    spread=_spread_gradients,
)
_varlen_fwd = define(
    "attention",
    "attention_varlen_fwd(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? key_bias, "
    f"{OPTIONS}) -> (Tensor, Tensor)",
    _packed_out_and_lse,
    check=_bad_offsets,
)
_varlen_bwd = define(
    "attention",
    "attention_varlen_bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor cu_seqlens_q, "
    f"Tensor cu_seqlens_k, Tensor? key_bias, {OPTIONS}, bool bias_grad) -> (Tensor, Tensor, Tensor, Tensor)",
    _gradients,
    spread=_spread_gradients,
)


def bad_length(b, q, k_cache, v_cache, cache_lengths, *_):
    raise ValueError(
        f"attention_decode: cache_lengths[{b}] is {int(cache_lengths[b])}, the cache holds 0 to {k_cache.shape[1]} rows"
    )


_decode = define(
    "attention",
    "attention_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_lengths, Tensor? key_bias, float scale, int left, "
    "int right) -> (Tensor, Tensor)",
    _out_and_lse,
    check=bad_length,
)


def attention_flops(q, k, products: int) -> int:
    """2 B H T S D a product, masks not discounted (as torch counts its own attention): 2 products forward, 5 backward."""
    B, T, H, D = q
    return 2 * products * B * H * T * k[1] * D


flops(_fwd, lambda q, k, *_, out_shape=None, **__: attention_flops(q, k, 2))
flops(_bwd, lambda dout, dlse, q, k, *_, out_shape=None, **__: attention_flops(q, k, 5))


class Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, key_bias, prefix_lengths, causal, scale, left, right):
        ctx.set_materialize_grads(False)
        out, lse = _fwd(q, k, v, key_bias, prefix_lengths, causal, scale, left, right)
        ctx.save_for_backward(q, k, v, out, lse, key_bias, prefix_lengths)
        ctx.options = causal, scale, left, right
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        refuse_double_backward("attention")
        dout = torch.zeros_like(ctx.saved_tensors[3]) if dout is None else dout
        grads = _bwd(dout, dlse, *ctx.saved_tensors, *ctx.options, ctx.needs_input_grad[3])
        dbias = grads[3] if ctx.needs_input_grad[3] else None
        return *grads[:3], dbias, None, None, None, None, None


class AttentionVarlen(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, cu_seqlens_q, cu_seqlens_k, key_bias, causal, scale, left, right):
        ctx.set_materialize_grads(False)
        out, lse = _varlen_fwd(q, k, v, cu_seqlens_q, cu_seqlens_k, key_bias, causal, scale, left, right)
        ctx.save_for_backward(q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, key_bias)
        ctx.options = causal, scale, left, right
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        refuse_double_backward("attention_varlen")
        dout = torch.zeros_like(ctx.saved_tensors[3]) if dout is None else dout
        grads = _varlen_bwd(dout, dlse, *ctx.saved_tensors, *ctx.options, ctx.needs_input_grad[5])
        dbias = grads[3] if ctx.needs_input_grad[5] else None
        return *grads[:3], None, None, dbias, None, None, None, None


def normalise_window(op: str, window, causal: bool) -> tuple[int, int]:
    """(left, right) with -1 for unlimited: an int w needs causal and bounds the left side only, j > i + S - T - w."""
    if window is None:
        return -1, -1
    if isinstance(window, int) and not isinstance(window, bool):
        if window < 1:
            raise ValueError(f"{op}: window is {window}, need an int >= 1 or (left, right)")
        if not causal:
            raise ValueError(f"{op}: an int window needs causal=True; without it give window=({window}, {window})")
        return window - 1, -1
    if not (
        isinstance(window, tuple | list) and len(window) == 2 and all(isinstance(w, int) and w >= -1 for w in window)
    ):
        raise ValueError(f"{op}: window is {window!r}, need an int >= 1 or (left, right) of ints >= -1")
    return window[0], window[1]


def check_prefix(op: str, x: Tensor, prefix_lengths: Tensor | None, causal: bool) -> None:
    """prefix_lengths is int32 [B] beside x [B,...], and only with causal."""
    if prefix_lengths is None:
        return
    if not causal:
        raise ValueError(f"{op}: prefix_lengths needs causal=True")
    check_integers(op, "prefix_lengths", prefix_lengths, (torch.int32,))
    check_shape(op, "prefix_lengths", prefix_lengths, x.shape[:1], "[B]")
    check_device(op, x=x, prefix_lengths=prefix_lengths)


def check_head_dim(op: str, D: int) -> None:
    """D from 1 to 256."""
    if D < 1:
        raise ValueError(f"{op}: the head dim is {D}, need 1 to {MAX_HEAD_DIM}")
    if D > MAX_HEAD_DIM:
        raise NotImplementedError(
            f"{op}: the head dim is {D}, the kernels serve 1 to {MAX_HEAD_DIM}; use `with palm_kernels.backend('reference'):`"
        )


def normalise_bias(op: str, key_bias: Tensor | None, q: Tensor, shape: tuple, meaning: str) -> Tensor | None:
    """key_bias in float32 (float64 beside float64), expanded to `shape`; bool (True keeps) becomes 0 and -inf."""
    if key_bias is None:
        return None
    check_device(op, q=q, key_bias=key_bias)
    wanted = [shape, (1, *shape[1:])] if len(shape) == 2 else [shape]
    if tuple(key_bias.shape) not in wanted:
        raise ValueError(f"{op}: key_bias has shape {list(key_bias.shape)}, need {meaning} = {list(shape)}")
    if key_bias.dtype == torch.bool:
        zeros = torch.zeros(key_bias.shape, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
        key_bias = zeros.masked_fill(~key_bias, -torch.inf)
    return companion(op, "key_bias", key_bias, q).expand(shape)


def _check_heads(
    op: str, q: Tensor, k: Tensor, v: Tensor, k_name: str, v_name: str, lead: str
) -> tuple[Tensor, Tensor]:
    """Checks q against k and v; returns k and v with their head dimension."""
    check_floats(op, **{"q": q, k_name: k, v_name: v})
    rank = len(lead.split(",")) + 1
    check_dim(op, "q", q, (rank + 1,), f"[{lead},H,D]")
    check_dim(op, k_name, k, (rank, rank + 1), f"[{lead},D] or [{lead},K,D]")
    check_shape(op, v_name, v, k.shape, f"{k_name}'s shape")
    H, D = q.shape[-2:]
    check_head_dim(op, D)
    if k.shape[-1] != D:
        raise ValueError(f"{op}: {k_name} has head dim {k.shape[-1]}, q has {D}")
    if k.dim() == rank:
        k, v = k.unsqueeze(-2), v.unsqueeze(-2)
    K = k.shape[-2]
    if K == 0 or H % K:
        raise ValueError(f"{op}: {k_name} has {K} heads, q has {H}: q heads must be a multiple of k heads")
    return k, v


@public
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    window: int | tuple[int, int] | None = None,
    prefix_lengths: Tensor | None = None,
    query_positions: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale q k^T + key_bias) v over the visible keys (PaLM section 2; Dao 2022): no [T,S] matrix, K and V never expanded.

    q [B,T,H,D]; k, v [B,S,D] or [B,S,K,D], K dividing H, D 1 to 256: query head h reads key/value head h // (H // K). One dtype,
    float32, bfloat16, float16 (float64 on the CPU); softmax and sums in float32 (float64).
    causal: query i sees keys j <= i + S - T. scale: default D**-0.5.
    key_bias [B,S] or [1,S], float32 or bool (True keeps), added to the scores of a key, differentiable; -inf removes the key by
    selection: what stands in its k and v never matters and its gradients are 0.
    window: int w (with causal) keeps j > i + S - T - w; (left, right) keeps i + S - T - left <= j <= i + S - T + right, -1 unlimited.
    prefix_lengths [B] int32 (with causal): the first keys of a row are visible to all of its queries.
    query_positions: reserved, NotImplementedError.
    Returns out [B,T,H,D], and with return_lse the natural log-sum-exp [B,H,T] in float32 (float64), differentiable too. A row that
    sees nothing gives 0, lse -inf, gradient 0.
    Raises ValueError (shape, window, device), TypeError (dtype), NotImplementedError (D > 256).
    """
    q, k, v = autocast(q, k, v)
    heads_k, heads_v = _check_heads("attention", q, k, v, "k", "v", "B,S")
    B, S = q.shape[0], k.shape[1]
    if k.shape[0] != B:
        raise ValueError(f"attention: k has batch {k.shape[0]}, q has {B}")
    if query_positions is not None:
        raise NotImplementedError("attention: query_positions is reserved and not implemented yet")
    left, right = normalise_window("attention", window, causal)
    check_prefix("attention", q, prefix_lengths, causal)
    bias = normalise_bias("attention", key_bias, q, (B, S), "[B,S] or [1,S]")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    args = (*distinct(q, heads_k, heads_v), bias, prefix_lengths, causal, scale, left, right)
    out, lse = Attention.apply(*args) if needs_autograd(q, k, v, bias) else _fwd(*args)
    return (out, lse) if return_lse else out


@public
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    window: int | tuple[int, int] | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """attention of packed sequences, each by itself.

    q [sum T,H,D]; k, v [sum S,D] or [sum S,K,D]; cu_seqlens_q, cu_seqlens_k int32 [B+1], ascending from 0 to the row counts;
    sequences of length 0 are allowed. key_bias [sum S]; causal and window as in attention, per sequence.
    Returns out [sum T,H,D], and with return_lse lse [H, sum T]. Errors as attention's; offsets that do not fit are a ValueError.
    """
    op = "attention_varlen"
    q, k, v = autocast(q, k, v)
    heads_k, heads_v = _check_heads(op, q, k, v, "k", "v", "sum S")
    for name, cu in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        check_integers(op, name, cu, (torch.int32,))
        check_dim(op, name, cu, (1,), "[B+1]")
        if cu.shape[0] < 1:
            raise ValueError(f"{op}: {name} is empty, need [B+1] offsets from 0")
    check_shape(op, "cu_seqlens_k", cu_seqlens_k, cu_seqlens_q.shape, "cu_seqlens_q's shape")
    check_device(op, q=q, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    left, right = normalise_window(op, window, causal)
    bias = normalise_bias(op, key_bias, q, (k.shape[0],), "[sum S]")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    args = (*distinct(q, heads_k, heads_v), *distinct(cu_seqlens_q, cu_seqlens_k), bias, causal, scale, left, right)
    out, lse = AttentionVarlen.apply(*args) if needs_autograd(q, k, v, bias) else _varlen_fwd(*args)
    return (out, lse) if return_lse else out


@public
def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_lengths: Tensor,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    window: int | tuple[int, int] | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention of T new tokens to a cache whose last T rows are their own keys; inference only.

    q [B,T,H,D]; k_cache, v_cache [B,Smax,D] or [B,Smax,K,D]; cache_lengths int32 [B], 0 to Smax: query t of row b sees keys
    j <= cache_lengths[b] - T + t. Rows of the cache at or beyond cache_lengths are never read. key_bias [B,Smax] or [1,Smax], window
    as in attention. Returns out [B,T,H,D], and with return_lse lse [B,H,T]. Length 0 gives 0 and -inf.
    Raises ValueError (shape, length beyond Smax), TypeError (dtype), RuntimeError if grad is on and an input requires it.
    """
    op = "attention_decode"
    q, k_cache, v_cache = autocast(q, k_cache, v_cache)
    heads_k, heads_v = _check_heads(op, q, k_cache, v_cache, "k_cache", "v_cache", "B,Smax")
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k_cache, v_cache, key_bias)):
        raise RuntimeError(f"{op}: has no backward; use torch.no_grad() or attention")
    B, S = q.shape[0], k_cache.shape[1]
    if k_cache.shape[0] != B:
        raise ValueError(f"{op}: k_cache has batch {k_cache.shape[0]}, q has {B}")
    check_integers(op, "cache_lengths", cache_lengths, (torch.int32,))
    check_shape(op, "cache_lengths", cache_lengths, (B,), "[B]")
    check_device(op, q=q, cache_lengths=cache_lengths)
    left, right = normalise_window(op, window, True)
    bias = normalise_bias(op, key_bias, q, (B, S), "[B,Smax] or [1,Smax]")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out, lse = _decode(q, heads_k, heads_v, cache_lengths, bias, scale, left, right)
    return (out, lse) if return_lse else out


def merge_attention(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """(out, lse) over the union of disjoint key sets: out = sum_i exp(lse_i - lse) out_i, lse = log sum_i exp(lse_i).

    parts: pairs of out [B,T,H,D] and lse [B,H,T]; batches of 1 are broadcast (a few-shot prompt cached once). Combined in float32
    (float64), out in the first out's dtype; rows whose lse are all -inf give 0 and -inf. Plain PyTorch, differentiable.
    """
    if not parts:
        raise ValueError("merge_attention: no parts given, need at least one (out, lse)")
    lses = torch.stack(torch.broadcast_tensors(*(lse for _, lse in parts)))
    top = lses.detach().amax(0)
    base = torch.where(top == -torch.inf, 0.0, top)
    weights = torch.exp(lses - base)
    total = weights.sum(0)
    empty = total == 0
    safe = torch.where(empty, 1.0, total)
    shares = (weights / safe).transpose(-1, -2).unsqueeze(-1)  # [parts,B,T,H,1]
    out = torch.stack([share * out.to(share.dtype) for share, (out, _) in zip(shares, parts, strict=True)]).sum(0)
    lse = torch.where(empty, -torch.inf, torch.log(safe) + base)
    return out.to(parts[0][0].dtype), lse
