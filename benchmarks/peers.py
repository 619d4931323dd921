"""What others offer for our ops, in our layouts and signatures, and floors; each bench file lists the ones it runs."""

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

import palm_kernels as pk

from .common import in_mode


def sdpa(q, k, v, *, causal=False, gqa=False, cache_lengths=None):
    """torch's attention; without gqa the key heads are expanded to the query heads, as most models do. Caches are full."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if not gqa:
        k, v = (x[:, :, None].expand(-1, -1, q.shape[1] // k.shape[1], -1, -1).flatten(1, 2) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=gqa).transpose(1, 2)


def sdpa_gqa(q, k, v, **options):
    """torch's attention told that query heads share key heads."""
    return sdpa(q, k, v, gqa=True, **options)


def sdpa_padded(q, k, v, cu_seqlens, _, *, causal):
    """Packed sequences padded to a batch; the padding stands behind every sequence, so only the causal mask is needed."""
    lengths = cu_seqlens.diff().tolist()
    out = sdpa(*(pad_sequence(x.split(lengths), batch_first=True) for x in (q, k, v)), causal=causal)
    return torch.cat([x[:n] for x, n in zip(out, lengths, strict=True)])


def palm_padded(mode, q, k, v, cu_seqlens, _, *, causal):
    """Floor: our attention on the padded batch, whose padding is not timed."""
    lengths = cu_seqlens.diff().tolist()
    batch = [pad_sequence(x.detach().split(lengths), batch_first=True).requires_grad_() for x in (q, k, v)]
    return in_mode(mode, lambda: pk.attention(*batch, causal=causal), batch)


def matmul_pair(q, k, v, *, cache_lengths):
    """Decoding by hand with one key head: all query heads are the rows of two products. The caches are full."""
    scores = torch.matmul(q[:, 0] * q.shape[-1] ** -0.5, k[:, :, 0].transpose(1, 2))
    return torch.matmul(scores.softmax(-1, dtype=torch.float32).to(q.dtype), v[:, :, 0])[:, None]


def rotate(x, cos, sin):
    """Rotary positions of [B,T,H,D], halves as in Llama."""
    cos, sin = cos[:, None], sin[:, None]
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


def silu_up(gate, up):
    return F.silu(gate) * up


def silu_up_packed(x):
    return silu_up(*x.chunk(2, -1))


def rms_norm(x, weight, *, residual=None):
    s = x if residual is None else x + residual
    y = F.rms_norm(s, weight.shape, weight, 1e-6)
    return y if residual is None else (y, s)


def layer_norm(x, weight):
    return F.layer_norm(x, weight.shape, weight, None, 1e-5)


def mixed_embedding(ids, weight, strength, *, mask_embedding):
    """Two gathers' worth of torch: look up, then mix with the mask embedding."""
    a = strength[..., None].to(weight.dtype)
    return (1 - a) * F.embedding(ids, weight) + a * mask_embedding


def cross_entropy(logits, target):
    """In float32, as transformers has it: torch rounds the loss of 16-bit logits to 16 bits, which is over the error budget."""
    return F.cross_entropy(logits.float(), target)


def linear_then_cross_entropy(hidden, linear_weight, target):
    return F.cross_entropy(F.linear(hidden, linear_weight), target)


def linear_cross_entropy(hidden, linear_weight, target, options=None):
    """torch 2.13's own: by default it stores all logits."""
    if not hasattr(F, "linear_cross_entropy"):
        raise NotImplementedError(f"torch {torch.__version__} has no F.linear_cross_entropy")
    return F.linear_cross_entropy(hidden, linear_weight, target, options=options)


def linear_cross_entropy_chunked(hidden, linear_weight, target):
    """The same with the options that make it chunk."""
    return linear_cross_entropy(hidden, linear_weight, target, torch.nn.LinearCrossEntropyOptions())


def block(x, norm_weight, w_in, w_out, cos, sin, *, heads, head_dim):
    """PaLM's parallel block as one writes it in torch: fused projections, SDPA with the one key head expanded."""
    B, T, C = x.shape
    width = (w_in.shape[0] - (heads + 2) * head_dim) // 2
    sizes = [heads * head_dim, head_dim, head_dim, width, width]
    projected = F.linear(F.rms_norm(x, (C,), 1 + norm_weight, 1e-6), w_in)
    q, k, v, gate, up = projected.split(sizes, -1)
    q, k = rotate(q.reshape(B, T, heads, head_dim), cos, sin), rotate(k[:, :, None], cos, sin)
    mixed = sdpa(q, k, v[:, :, None], causal=True).flatten(2)
    return x + F.linear(torch.cat((mixed, silu_up(gate, up)), -1), w_out)
