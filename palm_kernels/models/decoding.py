"""New tokens over a cache: attention to what it holds, and all blocks of a decode step in one native call. Letters as in modeling.py."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from ..nn import why_called, why_not_plain
from ..ops.attention import DECODE_ROWS, attention, attention_decode
from ..ops.parallel_block import blocks_serve, decode_blocks
from .generation import SharedPrefix, attend_shared

# layers of a cache whose update gives back what they store
STORED = (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer)


def static_room(cache) -> int | None:
    """The tokens that a static cache has room for; None for every other cache."""
    layers = getattr(cache, "layers", ())
    return layers[0].max_cache_len if layers and all(type(layer) is StaticLayer for layer in layers) else None


def _few(heads: int, T: int) -> bool:
    """Whether T new tokens meet a cache by attention_decode."""
    return heads * T <= DECODE_ROWS and not torch.is_grad_enabled()


def length_stays(past: Tensor, T: int, heads: int) -> bool:
    """Whether the length of a static cache is left on its device: in compiled code, and where looking would wait for a GPU.

    Nobody sees then whether the cache is full, or a position too large.
    """
    if torch.is_grad_enabled():
        return False
    return torch.compiler.is_compiling() or (past.device.type != "cpu" and _few(heads, T))


def _additive(keep: Tensor | None, x: Tensor) -> Tensor | None:
    """key_bias as numbers: 0 where a bool one is true, -inf where not."""
    if keep is None or keep.dtype != torch.bool:
        return keep
    zeros = torch.zeros(keep.shape, dtype=torch.promote_types(x.dtype, torch.float32), device=keep.device)
    return zeros.masked_fill(~keep, -torch.inf)


def _attend(q, k, v, *, cache, layer, few, total, lengths, key_bias, window, prefix_lengths):
    """Attention of new tokens to all that the cache then holds of `total`; few: by attention_decode. Its tensors are [B,K,S,D].

    total is a tensor where a static cache's length stays on its device (`length_stays`): the whole room is given then, and `lengths` say.
    """
    k, v = cache.update(k.transpose(1, 2), v.transpose(1, 2), layer)
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    if isinstance(cache, SharedPrefix):
        own_bias = None if key_bias is None else key_bias[:, cache.prefix_length :]
        return attend_shared(q, k, v, cache.prefix[layer], own_bias)
    dropped = 0 if isinstance(total, Tensor) else total - k.shape[1]
    if dropped < 0:  # a static cache has room for more
        k, v = k[:, :total], v[:, :total]
    elif dropped > 0:  # a sliding cache has let its oldest keys go
        lengths = lengths - dropped
        key_bias = None if key_bias is None else key_bias[:, dropped:]
    if few:
        return attention_decode(q, k, v, cache_lengths=lengths, key_bias=key_bias, window=window)
    if prefix_lengths is not None:
        prefix_lengths = prefix_lengths - max(dropped, 0)
    return attention(q, k, v, causal=True, key_bias=key_bias, window=window, prefix_lengths=prefix_lengths)


def attends(cache, total: int | Tensor, mask: dict, x: Tensor, heads: int) -> Callable:
    """The `attend` of x's [B,T,C] new tokens and a cache that will hold `total`, by layer; what all layers share is made once."""
    B, T, _ = x.shape
    if stays := isinstance(total, Tensor):
        lengths = total.to(torch.int32).repeat(B)
    else:
        lengths = torch.full((B,), total, dtype=torch.int32, device=x.device)
    few = stays or (_few(heads, T) and mask["prefix_lengths"] is None)
    shared = {"few": few, "total": total, "lengths": lengths, "key_bias": _additive(mask["key_bias"], x)}
    shared |= {"window": mask["window"], "prefix_lengths": mask["prefix_lengths"]}
    return lambda layer: partial(_attend, cache=cache, layer=layer, **shared)


def _weights(blocks, norm: nn.Module, x: Tensor, kind: type) -> tuple[list[Tensor], ...] | None:
    """What decode_blocks takes of the blocks and the norm behind them, or None where one of them is more than its plain `kind`."""
    if nn.modules.module._has_any_global_hook():
        return None
    norms, w_in, w_out = [], [], []
    for block in blocks:
        if why_called("", block, kind) or block.why_composed(x):
            return None
        children = block._modules  # the way through nn.Module.__getattr__ is felt in a decode step
        for name, found in (("norm", norms), ("in_proj", w_in), ("out_proj", w_out)):
            found.append(children[name]._parameters["weight"])
    if why_not_plain("", norm, type(blocks[0].norm), x):
        return None
    return [*norms, norm.weight], w_in, w_out


def _room(cache, layers: int, total: int, x: Tensor, shape: tuple[int, ...]):
    """The cache's tensors [B,K,S,D] by layer, holding `total` tokens, the last of them zeros of `shape` [B,K,T,D]: (keys, values)."""
    grown = [layer for layer in cache.layers if type(layer) is StaticLayer and layer.is_initialized]
    if len(grown) == layers:  # what `update` does, less the copying
        if total > (room := grown[0].max_cache_len):
            raise ValueError(f"PaLMModel: {total} tokens, the static cache has room for {room}: make it longer")
        torch._foreach_add_([layer.cumulative_length for layer in grown], shape[2])  # type: ignore
        return [layer.keys for layer in grown], [layer.values for layer in grown]
    new = x.new_zeros(shape)
    return tuple(zip(*(cache.update(new, new, i) for i in range(layers)), strict=True))


def decode_step(trunk, kind: type, x_BTC: Tensor, cache, total: int, mask: dict, positions) -> Tensor | None:
    """x_BTC through the trunk's blocks and norm by decode_blocks, into a cache that then holds `total`; None where something forbids it.

    kind: the class that each block must be, and no more.
    """
    (B, T, _), layers = x_BTC.shape, cache.layers
    block = trunk.layers[0]
    few = _few(block.heads, T) and mask["prefix_lengths"] is None and blocks_serve(x_BTC)
    if not few or type(cache) not in (DynamicCache, StaticCache) or cache.offloading:
        return None
    made = len(layers) == len(trunk.layers) or (not layers and cache.layer_class_to_replicate in STORED)
    if not made or any(type(layer) not in STORED for layer in layers):
        return None
    if (weights := _weights(trunk.layers, trunk.norm, x_BTC, kind)) is None:
        return None
    shape = (B, block.kv_heads, T, block.head_dim)
    keys, values = _room(cache, len(trunk.layers), total, x_BTC, shape)
    room = keys[0].shape[2]  # type: ignore
    held = min(total, room)  # a sliding cache has let its oldest keys go
    key_bias = _additive(mask["key_bias"], x_BTC)
    if key_bias is not None:
        key_bias = F.pad(key_bias[:, total - held :], (0, room - held))
    return decode_blocks(
        *(x_BTC, weights, trunk.rotary.cos, trunk.rotary.sin, keys, values),
        held,
        heads=block.heads,
        norm=block.norm_kind,
        eps=block.norm.eps,
        norm_offset=block.norm.offset,
        window=mask["window"],
        positions=positions,
        start=total - T,
        key_bias=key_bias,
        interleaved=block.interleaved,
    )
