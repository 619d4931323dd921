"""Our attention in other people's transformers models: `register()`, then `attn_implementation="palm_kernels"`.

transformers asks two functions of an implementation: one makes the mask that all layers get, one is called by each layer.
"""

import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from ..nn import sequence_bounds
from ..ops.attention import DECODE_ROWS, attention, attention_decode, attention_varlen

NAME = "palm_kernels"


@dataclass(frozen=True)
class Mask:
    """What a query may see; causal and window as in `attention`. end: the keys that are there, a static cache has room for more.

    A filled static cache knows its length as a tensor, int64 []: nobody waits for it, and all steps look the same to a compiler.
    starts: int32 bounds of packed sequences in the flattened batch. padded: whether a key that is there is removed.
    """

    causal: bool
    window: int | tuple[int, int] | None
    end: int | Tensor
    starts: Tensor | None = None
    padded: bool = False


def _refuse(what: str, way_out: str = 'attn_implementation="sdpa"') -> NoReturn:
    raise NotImplementedError(f"{NAME}: {what} cannot be served by attention kernels, use {way_out}")


def _read(function: Callable, found: dict[str, Any]) -> dict[str, Any]:
    """Collects what a mask function of transformers.masking_utils says; those functions are closures over their settings."""
    name, held = function.__qualname__, inspect.getclosurevars(function).nonlocals
    if name == "causal_mask_function":
        found["causal"] = True
    elif name == "and_masks.<locals>.and_mask":
        for part in held["mask_functions"]:
            _read(part, found)
    elif name == "sliding_window_overlay.<locals>.inner_mask":
        found["left"] = held["sliding_window"]
    elif name == "sliding_window_bidirectional_overlay.<locals>.inner_mask":
        found["both"] = held["sliding_window"]
    elif name == "packed_sequence_mask_function.<locals>.inner_mask":
        found["sequences"] = held["packed_sequence_mask"]
    elif name == "remap_positions_for_packed_sequence.<locals>.inner_mask":
        _read(held["mask_function"], found)
    elif name != "bidirectional_mask_function":
        _refuse(f"the mask of {name.split('.')[0]!r}")
    return found


@functools.cache
def _asks_us(config: type) -> bool:
    """Whether the models of a config let AttentionInterface compute attention; others ask for a mask and add it to their own scores.

    They stand in the file beside the config's, know the table of implementations by its name, and claim to support SDPA or backends.
    """
    models = sys.modules.get(config.__module__.replace(".configuration_", ".modeling_"))
    if models is None or ".configuration_" not in config.__module__:
        return True  # nothing is known of them
    flags = ("_supports_sdpa", "_supports_attention_backend")
    classes = [x for x in vars(models).values() if isinstance(x, type)]
    return hasattr(models, "ALL_ATTENTION_FUNCTIONS") and any(getattr(c, f, False) for c in classes for f in flags)


def _starts(sequences_BT: Tensor) -> Tensor:
    """[[0, 0, 1], [0, 0, 0]] -> [0, 2, 3, 6]."""
    new_BT = torch.ones_like(sequences_BT, dtype=torch.bool)
    new_BT[:, 1:] = sequences_BT[:, 1:] != sequences_BT[:, :-1]
    return sequence_bounds(new_BT)


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset=0,
    kv_offset=0,
    mask_function: Callable | None = None,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    config=None,
    **_,
) -> Tensor:
    """The keys that are kept, bool [B,1,1,S], with a `Mask` as its attribute `palm`. For AttentionMaskInterface.

    A 4-D tensor passes unchanged through a model (2-D ones are taken for padding masks and made anew).
    """
    if config is not None and not _asks_us(type(config)):
        _refuse(f"what {type(config).__name__}'s models compute themselves", 'attn_implementation="eager"')
    found: dict[str, Any] = {"causal": True} if mask_function is None else _read(mask_function, {})
    window, causal = found.get("left"), found.get("causal", False)
    if not causal:  # cross-attention too, whose keys are another text's
        end = held = kv_length
    elif isinstance(q_offset, Tensor):
        end, held = q_offset + q_length, kv_length
    else:
        end = held = min(kv_length, q_offset + q_length - kv_offset)
    if attention_mask is None:
        keep = torch.ones(1, held, dtype=torch.bool, device=device)
    else:
        keep = attention_mask[:, kv_offset : kv_offset + held] != 0
        keep = F.pad(keep, (0, held - keep.shape[1]), value=True)
    if "both" in found:
        window = (found["both"], found["both"])
    elif window is not None and not causal:
        window = (window - 1, -1)
    starts = _starts(found["sequences"].expand(batch_size, -1)) if "sequences" in found else None
    out = keep[:, None, None]
    padded = attention_mask is not None and (isinstance(end, Tensor) or not bool(keep.all()))
    out.palm = Mask(causal, window, end, starts, padded)  # type: ignore
    return out


def forward(
    module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """One layer: query [B,H,T,D], key and value [B,K,S,D] -> ([B,T,H,D], None). For AttentionInterface."""
    if dropout:
        _refuse(f"attention dropout ({dropout})", "attention_dropout=0.0 in the config")
    if kwargs.get("output_attentions"):
        _refuse("output_attentions", 'attn_implementation="eager"')
    for name, given in (
        ("softcap", softcap),
        ("attention sinks", s_aux),
        ("a position bias", kwargs.get("position_bias")),
    ):
        if given is not None:
            _refuse(name, 'attn_implementation="eager"')
    if value.shape[-1] != key.shape[-1]:
        _refuse(f"a value head dim of {value.shape[-1]} beside {key.shape[-1]}")
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if attention_mask is None:  # the model asked for no mask
        causal = bool(getattr(module, "is_causal", False) if is_causal is None else is_causal)
        said, key_bias = Mask(causal, None, k.shape[1]), None
    elif isinstance(said := getattr(attention_mask, "palm", None), Mask):
        key_bias = attention_mask[:, 0, 0] if said.padded else None
    else:
        _refuse(f"a mask of shape {list(attention_mask.shape)}")
    if not said.causal and k.shape[1] > said.end:
        _refuse("a cache under bidirectional attention", "is_decoder=True in the config, or use_cache=False")
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    few = said.causal and q.shape[1] * q.shape[2] <= DECODE_ROWS and not needs_grad
    lengths = None
    if few and isinstance(said.end, Tensor):
        lengths = said.end.to(torch.int32).repeat(len(q))
    else:
        end = int(said.end)
        k, v = k[:, :end], v[:, :end]
        key_bias = None if key_bias is None else key_bias[:, :end]
    if said.starts is not None:
        q_, k_, v_ = (x.flatten(0, 1) for x in (q, k, v))
        keywords = {"causal": said.causal, "window": said.window, "scale": scaling}
        out = attention_varlen(q_, k_, v_, said.starts, said.starts, **keywords)
        return out.view(q.shape), None  # type: ignore
    if few and k.shape[1] > q.shape[1]:
        if lengths is None:
            lengths = torch.full((len(q),), k.shape[1], dtype=torch.int32, device=q.device)
        out = attention_decode(q, k, v, cache_lengths=lengths, scale=scaling, key_bias=key_bias, window=said.window)
    else:
        out = attention(q, k, v, causal=said.causal, scale=scaling, key_bias=key_bias, window=said.window)
    return out, None  # type: ignore


def register() -> None:
    """Make attn_implementation="palm_kernels" known to transformers: once a process, before it is asked for."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, forward)
    AttentionMaskInterface.register(NAME, mask)
