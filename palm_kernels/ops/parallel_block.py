"""PaLM's parallel block (PaLM section 2): x + [attention | swiglu] w_out^T, composed of the other ops."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import public
from .attention import attention
from .norm import layer_norm, rms_norm
from .rotary import rotary
from .swiglu import swiglu


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
    """x + [attention | swiglu] w_out^T with [q | k | v | gate | up] = norm(x) w_in^T.

    x [B,T,C]; w_in [(H+2K)*D + 2F, C]; w_out [C, H*D + F]; the rest as in rms_norm, rotary and attention.
    """
    H, K, D = heads, kv_heads, head_dim
    width = (w_in.shape[0] - (H + 2 * K) * D) // 2
    normed = {"rms_norm": rms_norm, "layer_norm": layer_norm}[norm](x, norm_weight, eps=eps, offset=norm_offset)
    q, k, v, gate, up = F.linear(normed, w_in).split([H * D, K * D, K * D, width, width], -1)
    q = rotary(q.unflatten(-1, (H, D)), cos, sin, positions=positions, interleaved=interleaved)
    k = rotary(k.unflatten(-1, (K, D)), cos, sin, positions=positions, interleaved=interleaved)
    mixed = attention(
        q,
        k,
        v.unflatten(-1, (K, D)),
        causal=causal,
        key_bias=key_bias,
        window=window,
        prefix_lengths=prefix_lengths,
    )
    return (x + F.linear(torch.cat((mixed.flatten(-2), swiglu(gate, up)), -1), w_out)).to(x.dtype)
