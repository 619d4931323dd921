"""PaLM's parallel block (PaLM section 2) as one autograd node: x + [attention | swiglu] w_out^T, [q|k|v|gate|up] = norm(x) w_in^T.

Composed of the other ops' backend functions on slices and torch's GEMMs. What forward keeps: x, the norm's statistics, the fused
projection (q and k rotated in place in it), lse, the attention output. The normed x and the SwiGLU product are made again.
"""

import contextlib
import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from .. import gemm
from ..checks import (
    HALVES,
    autocast,
    check_device,
    check_dim,
    check_floats,
    check_gain,
    check_shape,
    distinct,
)
from ..dispatch import (
    define,
    empty,
    empty_statistic,
    flops,
    last_contiguous,
    needs_autograd,
    public,
    refuse_double_backward,
    select,
    served,
)
from .attention import attention_flops, check_head_dim, check_prefix, normalise_bias, normalise_window
from .decode_linear import reads_once
from .rotary import bad_position, check_tables

_SIZES = "int heads, int kv_heads, int head_dim"
_OPTIONS = f"{_SIZES}, str norm, float eps, float norm_offset, bool causal, int left, int right, bool interleaved"


def _kernel(stem: str, name: str, x: Tensor) -> Callable:
    return select(stem, name, x.device, x.dtype)


def _without_autocast(x: Tensor):
    """The casts were made outside; inside, a GEMM in float32 must stay one."""
    on = x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)
    return torch.autocast(x.device.type, enabled=False) if on else contextlib.nullcontext()


def _body(compose: Callable) -> Callable:
    """compose with every last dimension contiguous, as kernels need it, and no autograd: `out=` refuses it, raw ops give none."""

    @functools.wraps(compose)
    def call(*args):
        args = [last_contiguous(a) if isinstance(a, Tensor) else a for a in args]
        with torch.no_grad(), _without_autocast(args[0]):
            return compose(*args)

    return call


def _split(fused: Tensor, H: int, K: int, D: int) -> tuple[Tensor, ...]:
    """Views of [B,T,(H+2K)D+2F]: q [B,T,H,D], k and v [B,T,K,D], gate and up [B,T,F]."""
    B, T, width = fused.shape
    F = (width - (H + 2 * K) * D) // 2
    heads, gate, up = torch.split_with_sizes(fused, [(H + 2 * K) * D, F, F], -1)
    q, k, v = torch.split_with_sizes(heads.view(B, T, H + 2 * K, D), [H, K, K], 2)
    return q, k, v, gate, up


def _apply_norm(norm: str, x: Tensor, weight, eps: float, offset: float, mean, rstd, dtype: torch.dtype) -> Tensor:
    """norm(x) as [N,C] in dtype; mean and rstd are written where given."""
    out = empty(x, x.shape)
    if norm == "rms_norm":
        _kernel("norm", "rms_norm_fwd", x)(x, None, weight, eps, offset, out, None, rstd)
    else:
        _kernel("norm", "layer_norm_fwd", x)(x, None, weight, None, eps, offset, out, None, mean, rstd)
    return out.flatten(0, 1).to(dtype)


def _fwd_outputs(x, norm_weight, w_in, w_out, cos, sin, positions, key_bias, prefix_lengths, *options):
    """out, and what backward reads: mean, rstd, fused, the attention output, lse (all empty when `save` is false)."""
    H, D, norm, save = options[0], options[2], options[3], options[-1]
    B, T, _ = x.shape
    rows = (B, T) if save else (0,)
    return (
        empty(x, x.shape),
        empty_statistic(x, rows if norm == "layer_norm" else (0,)),
        empty_statistic(x, rows),
        empty(w_in, (B, T, w_in.shape[0]) if save else (0,)),
        empty(w_in, (B, T, H, D) if save else (0,)),
        empty_statistic(w_in, (B, H, T) if save else (0,)),
    )


@_body
def _fwd_body(x, norm_weight, w_in, w_out, cos, sin, positions, key_bias, prefix_lengths, *options):
    H, K, D, norm, eps, offset, causal, left, right, interleaved, save = options
    args = x, norm_weight, w_in, w_out, cos, sin, positions, key_bias, prefix_lengths
    out, mean, rstd, fused, attended, lse = outs = _fwd_outputs(*args, *options)
    B, T = x.shape[:2]
    if not save:
        fused, lse = empty(w_in, (B, T, w_in.shape[0])), empty_statistic(w_in, (B, H, T))
    statistics = (mean if norm == "layer_norm" else None, rstd) if save else (None, None)
    normed = _apply_norm(norm, x, norm_weight, eps, offset, *statistics, w_in.dtype)
    gemm.mm(normed, w_in.t(), fused.flatten(0, 1))
    del normed
    q, k, v, gate, up = _split(fused, H, K, D)
    for part in (q, k):
        bad = _kernel("rotary", "rotary", part)(part, cos, sin, positions, interleaved, False, part)
        if bad is not None and bad >= 0:
            bad_position("parallel_block", bad, x, cos, positions)
    mixed = empty(fused, (B, T, w_out.shape[1]))
    heads, product = mixed[..., : H * D].unflatten(-1, (H, D)), mixed[..., H * D :]
    _kernel("attention", "attention_fwd", q)(
        q, k, v, key_bias, prefix_lengths, causal, D**-0.5, left, right, heads, lse
    )
    _kernel("swiglu", "swiglu_fwd", gate)(gate, up, product)
    if save:
        attended.copy_(heads)  # an own copy, so that the wide buffer can go
    _add_product(x, mixed.flatten(0, 1), w_out.t(), out)
    return outs


def _product(a: Tensor, b: Tensor) -> Tensor:
    return gemm.mm(a, b, empty(a, (a.shape[0], b.shape[1])))


def _add_product(x: Tensor, a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = x + a b, in one GEMM where the dtypes are one."""
    if x.dtype == a.dtype:
        gemm.addmm(x.reshape(-1, x.shape[-1]), a, b, out.flatten(0, 1))
    else:  # autocast: the residual stream keeps its own dtype
        torch.add(x, _product(a, b).view(x.shape), out=out)


def _bwd_outputs(dout, x, norm_weight, w_in, w_out, cos, sin, positions, key_bias, prefix_lengths, *rest):
    """dx, dnorm_weight, dw_in, dw_out, dkey_bias: empty where not wanted."""
    wanted = zip((x, norm_weight, w_in, w_out, key_bias), rest[-1], strict=True)
    return tuple(empty(t, t.shape) if want else x.new_empty(0) for t, want in wanted)


@_body
def _bwd_body(
    dout,
    x,
    norm_weight,
    w_in,
    w_out,
    cos,
    sin,
    positions,
    key_bias,
    prefix_lengths,
    mean,
    rstd,
    fused,
    attended,
    lse,
    *rest,
):
    H, K, D, norm, eps, offset, causal, left, right, interleaved, wants = rest
    args = dout, x, norm_weight, w_in, w_out, cos, sin, positions, key_bias, prefix_lengths
    dx, dnorm_weight, dw_in, dw_out, dkey_bias = outs = _bwd_outputs(*args, *rest)
    want_x, want_norm, want_in, want_out, want_bias = wants
    q, k, v, gate, up = _split(fused, H, K, D)
    dresult = dout.reshape(-1, x.shape[-1]).to(w_out.dtype)
    if want_out:
        mixed = empty(fused, (*x.shape[:2], w_out.shape[1]))
        mixed[..., : H * D].unflatten(-1, (H, D)).copy_(attended)
        _kernel("swiglu", "swiglu_fwd", gate)(gate, up, mixed[..., H * D :])
        gemm.mm(dresult.t(), mixed.flatten(0, 1), dw_out)
        del mixed
    if not (want_x or want_norm or want_in or want_bias):
        return outs
    dmixed = _product(dresult, w_out).view(*x.shape[:2], w_out.shape[1])
    dfused = empty(fused, fused.shape)
    dq, dk, dv, dgate, dup = _split(dfused, H, K, D)
    dheads = dmixed[..., : H * D].unflatten(-1, (H, D))
    options = (causal, D**-0.5, left, right)
    _kernel("attention", "attention_bwd", q)(
        *(dheads, None, q, k, v, attended, lse, key_bias, prefix_lengths, *options),
        *(dq, dk, dv, dkey_bias if want_bias else None),
    )
    if not (want_x or want_norm or want_in):
        return outs
    _kernel("swiglu", "swiglu_bwd", gate)(dmixed[..., H * D :], gate, up, dgate, dup)
    del dmixed, dheads
    for part in (dq, dk):  # the rotation's transpose is the rotation by the negated angle
        _kernel("rotary", "rotary", part)(part, cos, sin, positions, interleaved, True, part)
    dprojection = dfused.flatten(0, 1)
    if want_in:
        normed = _apply_norm(norm, x, norm_weight, eps, offset, None, None, w_in.dtype)
        gemm.mm(dprojection.t(), normed, dw_in)
        del normed
    if want_x or want_norm:
        dnormed = _product(dprojection, w_in).view(x.shape).to(x.dtype)
        dx = dx if want_x else dnormed  # the kernel writes dx in any case
        gain = dnorm_weight if want_norm else None
        if norm == "rms_norm":
            _kernel("norm", "rms_norm_bwd", x)(dnormed, x, norm_weight, rstd, dout, offset, dx, gain)
        else:
            _kernel("norm", "layer_norm_bwd", x)(dnormed, x, norm_weight, mean, rstd, dout, offset, dx, gain, None)
    return outs


_TENSORS = (
    "Tensor x, Tensor? norm_weight, Tensor w_in, Tensor w_out, Tensor cos, Tensor sin, Tensor? positions, Tensor? key_bias, "
    "Tensor? prefix_lengths"
)
_fwd = define(
    "parallel_block",
    f"parallel_block_fwd({_TENSORS}, {_OPTIONS}, bool save) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fwd_outputs,
    body=_fwd_body,
)
_bwd = define(
    "parallel_block",
    f"parallel_block_bwd(Tensor dout, {_TENSORS}, Tensor mean, Tensor rstd, Tensor fused, Tensor attended, Tensor lse, "
    f"{_OPTIONS}, bool[5] wants) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _bwd_outputs,
    body=_bwd_body,
)


def _flops(x, w_in, w_out, sizes, gemms: int, products: int) -> int:
    heads, kv_heads, head_dim = sizes
    attention = attention_flops((*x[:2], heads, head_dim), (x[0], x[1], kv_heads, head_dim), products)
    return gemms * 2 * math.prod(x[:2]) * (math.prod(w_in) + math.prod(w_out)) + attention


flops(_fwd, lambda x, _, w_in, w_out, *rest, out_shape=None, **__: _flops(x, w_in, w_out, rest[5:8], 1, 2))
flops(_bwd, lambda _, x, __, w_in, w_out, *rest, out_shape=None, **___: _flops(x, w_in, w_out, rest[10:13], 2, 5))


class ParallelBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, norm_weight, w_in, w_out, cos, sin, positions, key_bias, prefix_lengths, options):
        tensors = x, norm_weight, w_in, w_out, cos, sin, positions, key_bias, prefix_lengths
        out, *kept = _fwd(*tensors, *options, True)
        ctx.save_for_backward(*tensors, *kept)
        ctx.options = options
        return out

    @staticmethod
    def backward(ctx, dout):
        refuse_double_backward("parallel_block")
        need = ctx.needs_input_grad
        wants = [need[0], need[1], need[2], need[3], need[7]]
        grads = _bwd(dout, *ctx.saved_tensors, *ctx.options, wants)
        dx, dnorm_weight, dw_in, dw_out, dkey_bias = (g if want else None for g, want in zip(grads, wants, strict=True))
        return dx, dnorm_weight, dw_in, dw_out, None, None, None, dkey_bias, None, None


def _check_weights(x: Tensor, norm_weight, w_in: Tensor, w_out: Tensor, H: int, K: int, D: int) -> None:
    op = "parallel_block"
    check_dim(op, "x", x, (3,), "[B,T,C]")
    check_head_dim(op, D)
    if H < 1 or K < 1 or H % K:
        raise ValueError(f"{op}: heads is {H}, kv_heads {K}: heads must be a positive multiple of kv_heads")
    C, heads = x.shape[-1], (H + 2 * K) * D
    check_dim(op, "w_in", w_in, (2,), "[(H+2K)*D + 2F, C]")
    if w_in.shape[1] != C or w_in.shape[0] < heads or (w_in.shape[0] - heads) % 2:
        raise ValueError(
            f"{op}: w_in has shape {list(w_in.shape)}, need [(H+2K)*D + 2F, C] = [{heads} + 2F, {C}] "
            f"for heads={H}, kv_heads={K}, head_dim={D}"
        )
    check_shape(op, "w_out", w_out, (C, H * D + (w_in.shape[0] - heads) // 2), "[C, H*D + F]")
    if norm_weight is not None:
        check_gain(op, "norm_weight", norm_weight, x)
        check_shape(op, "norm_weight", norm_weight, (C,), "[C]")
    check_device(op, x=x, norm_weight=norm_weight, w_in=w_in, w_out=w_out)


def blocks_serve(x: Tensor) -> bool:
    """Whether decode_blocks serves x [B,T,C]: few rows on the CPU, inference, no autocast, and nothing that watches or traces ops."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or type(x) is not Tensor or x.dim() != 3:
        return False
    if torch._C._len_torch_dispatch_stack():
        return False
    few = reads_once(x, x.shape[0] * x.shape[1])
    return few and served("parallel_block", "decode_blocks", x) and not torch.is_autocast_enabled("cpu")


def decode_blocks(
    x,
    weights,
    cos,
    sin,
    k_caches,
    v_caches,
    length,
    *,
    heads,
    norm,
    eps,
    norm_offset,
    window,
    positions,
    start,
    key_bias,
    interleaved,
):
    """A few new tokens [B,T,C] through all blocks of a model, each against its cache, in one native call: the calls are what costs.

    weights: the lists (norm_weights, w_in, w_out) by block, with cos, sin and the options as in parallel_block; one norm weight more
    is the norm's behind the blocks. k_caches, v_caches: [B,K,Smax,D] by block; of their `length` tokens the last T are the new ones, and
    written here. Without positions they stand at start, start + 1, ... key_bias [B,Smax] or [1,Smax] as in attention_decode.
    Returns [B,T,C]. Raises ValueError for a position beyond the tables; the library checks the rest (RuntimeError).
    """
    if x.dtype == torch.float64:
        cos, sin = cos.double(), sin.double()
    x, weights = last_contiguous(x), [[last_contiguous(w) for w in part] for part in weights]
    left, right = normalise_window("decode_blocks", window, True)
    bias = normalise_bias("decode_blocks", key_bias, x, (len(x), k_caches[0].shape[2]), "[B,Smax] or [1,Smax]")
    out = torch.empty_like(x)
    bad = _kernel("parallel_block", "decode_blocks", x)(
        *(x, *weights, cos, sin, positions, start, k_caches, v_caches, length, bias),
        *(heads, norm, eps, norm_offset, left, right, interleaved, out),
    )
    if bad >= 0:
        bad_position("parallel_block", bad, x, cos, positions)
    return out


@public
def parallel_block(
    x: Tensor,
    norm_weight: Tensor | None,
    w_in: Tensor,
    w_out: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    heads: int,
    kv_heads: int = 1,
    head_dim: int,
    norm: str = "rms_norm",
    eps: float = 1e-6,
    norm_offset: float = 1.0,
    causal: bool = True,
    key_bias: Tensor | None = None,
    window: int | tuple[int, int] | None = None,
    prefix_lengths: Tensor | None = None,
    positions: Tensor | None = None,
    interleaved: bool = False,
) -> Tensor:
    """x + [attention | swiglu] w_out^T with [q | k | v | gate | up] = norm(x) w_in^T, as one autograd node (PaLM section 2).

    x [B,T,C] float32, bfloat16, float16 (float64 on the CPU); norm_weight [C], the same or float32 beside 16-bit x, or None;
    w_in [(H+2K)*D + 2F, C] and w_out [C, H*D + F] in x's dtype, H heads, K kv_heads, D head_dim (1 to 256).
    norm: "rms_norm" or "layer_norm" with eps, gain norm_weight + norm_offset. cos, sin, positions, interleaved as in rotary; causal,
    key_bias [B,T] or [1,T], window, prefix_lengths as in attention.
    Returns [B,T,C] in x's dtype. Under autocast the two GEMMs, attention and SwiGLU run in its dtype, norm and residual in x's.
    Gradients for x, norm_weight, w_in, w_out, key_bias. Raises ValueError (shape, range, device, a position beyond the tables),
    TypeError (dtype), NotImplementedError (D > 256).
    """
    op = "parallel_block"
    check_floats(op, x=x)
    _check_weights(x, norm_weight, w_in, w_out, heads, kv_heads, head_dim)
    w_in, w_out = autocast(w_in, w_out)
    check_floats(op, w_in=w_in, w_out=w_out)
    if w_in.dtype != x.dtype and not (w_in.dtype in HALVES and autocast(x)[0].dtype == w_in.dtype):
        raise TypeError(f"{op}: w_in is {w_in.dtype}, x is {x.dtype}: they must be the same outside autocast")
    if norm not in ("rms_norm", "layer_norm"):
        raise ValueError(f"{op}: norm is {norm!r}, need 'rms_norm' or 'layer_norm'")
    cos, sin = check_tables(op, x, head_dim, cos, sin, positions)
    left, right = normalise_window(op, window, causal)
    check_prefix(op, x, prefix_lengths, causal)
    bias = normalise_bias(op, key_bias, x, x.shape[:2], "[B,T] or [1,T]")
    options = (heads, kv_heads, head_dim, norm, eps, norm_offset, causal, left, right, interleaved)
    tensors = distinct(x, norm_weight, w_in, w_out, cos, sin, positions, bias, prefix_lengths)
    if needs_autograd(x, norm_weight, w_in, w_out, bias):
        return ParallelBlock.apply(*tensors, options)
    return _fwd(*tensors, *options, False)[0]
