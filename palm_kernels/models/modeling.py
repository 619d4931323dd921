"""PaLM's trunk (Chowdhery 2022, section 2) as a Hugging Face model; heads.py holds what stands on it.

Letters: B batch, T new tokens, S tokens with the cache's, H heads, K key/value heads, D head dim, C model dim, V vocabulary.
"""

import dataclasses
from functools import partial

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

from ..nn import LayerNorm, ParallelBlock, RMSNorm, RotaryEmbedding, fan_in_init_, sequence_bounds, why_not_plain
from ..ops.attention import attention_varlen
from ..ops.soft_weak_embedding import soft_weak_embedding
from .configuration import PaLMConfig
from .decoding import attends, decode_step, length_stays, static_room

_LOG = logging.get_logger(__name__)
# transformers renamed this output from past_key_values to cache
_CACHE = "cache" if "cache" in {f.name for f in dataclasses.fields(BaseModelOutputWithPast)} else "past_key_values"


class PaLMBlock(GradientCheckpointingLayer, ParallelBlock):
    """ParallelBlock with transformers' activation checkpointing around it."""


def soft_key_bias(strength: Tensor, kappa: float) -> Tensor:
    """log(1 - min(kappa strength, 1 - 2^-10)): a softly masked key counts as a fraction of a token."""
    return torch.log1p(-(kappa * strength).clamp(max=1 - 2**-10))


def packed_starts(position_ids_BT: Tensor) -> Tensor:
    """[B,T] bool: where a sequence begins, in rows that hold several with restarting positions."""
    starts = torch.ones_like(position_ids_BT, dtype=torch.bool)
    starts[:, 1:] = position_ids_BT[:, 1:] != position_ids_BT[:, :-1] + 1
    return starts


def _attend_packed(q, k, v, *, starts, causal, window, key_bias):
    """Attention of each packed sequence to itself; q [B,T,H,D], k and v [B,T,K,D], starts int32 [sequences + 1]."""
    flat_bias = None if key_bias is None else key_bias.expand(q.shape[:2]).flatten()
    q_, k_, v_ = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    out = attention_varlen(q_, k_, v_, starts, starts, causal=causal, window=window, key_bias=flat_bias)
    return out.view(q.shape)  # type: ignore


class PaLMPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation; `kernels()` says which path each block takes."""

    config: PaLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _can_compile_fullgraph = True
    _no_split_modules = ["PaLMBlock"]  # noqa: RUF012 (transformers' own attribute, never changed)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Kernels N(0, 1/sqrt(n_in)), embeddings N(0,1), gains 1, no biases (PaLM section 5).

        Only torch.nn.init writes parameters here: transformers makes those skip what a checkpoint has loaded.
        """
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.embedding_std)
        elif isinstance(module, nn.Linear):
            fan_in_init_(module.weight, self.config.initializer_factor)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, RMSNorm | LayerNorm):
            module.reset_parameters()
        elif isinstance(module, RotaryEmbedding):
            module.reset_tables()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """transformers' from_pretrained; a file of weights that is cut off or no safetensors is an OSError that says where."""
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except SafetensorError as error:
            raise OSError(
                f"{cls.__name__}: the weights in {str(pretrained_model_name_or_path)!r} are cut off or corrupt ({error}): "
                "save or fetch them anew"
            ) from error

    def kernels(self) -> dict[str, str]:
        """Block name: "parallel_block" (the fused op), or "composition: why" (its children one by one, with our ops)."""
        return {name: block.path() for name, block in self.named_modules() if isinstance(block, ParallelBlock)}


class PaLMModel(PaLMPreTrainedModel):
    """The trunk: token embeddings, parallel blocks, a final norm."""

    def __init__(self, config: PaLMConfig):
        super().__init__(config)
        config.check()
        C = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, C)
        self.embedding_dropout = nn.Dropout(config.embedding_dropout)
        self.rotary = RotaryEmbedding(
            config.rotary_dim,
            max_positions=config.max_position_embeddings,
            base=config.rope_theta,
            interleaved=config.rope_type == "interleaved",
        )
        self.layers = nn.ModuleList(
            PaLMBlock(
                C,
                config.num_attention_heads,
                config.head_dim,
                config.intermediate_size,
                kv_heads=config.num_key_value_heads,
                norm=config.norm,
                eps=config.norm_eps,
                norm_offset=config.norm_offset,
                interleaved=self.rotary.interleaved,
                dropout=config.residual_dropout,
            )
            for _ in range(config.num_hidden_layers)
        )
        self.norm = (RMSNorm if config.norm == "rms_norm" else LayerNorm)(
            C, eps=config.norm_eps, offset=config.norm_offset
        )
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache=None,
        past_key_values=None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        prefix_lengths: Tensor | None = None,
        strength: Tensor | None = None,
        source_ids: Tensor | None = None,
        kappa: float = 0.0,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Hidden states [B,T,C] of input_ids [B,T] (or inputs_embeds [B,T,C]).

        attention_mask [B,S] 0/1 or bool: False keys are removed; S counts the cached tokens too. Positions follow it (left padding).
        position_ids [B,T] or [1,T]; restarting ones without attention_mask mean packed rows, each sequence attends to itself.
        use_cache: whether a cache is made where none is given. None means config.use_cache in eval mode without grad, unless attention is
        bidirectional or rows may be packed (position_ids without attention_mask): a cache costs the fused block.
        strength [B,T] float32 in [0,1], source_ids [B,T]: soft weak masking (absent: the row of config.mask_token_id); kappa: its
        attention half. prefix_lengths int32 [B] counts from column 0, padding included, and needs config.attention "prefix".
        """
        if output_attentions or self.config.output_attentions:
            raise ValueError(
                "PaLMModel: output_attentions is not available, the kernels never hold the attention matrix"
            )
        if cache is not None and past_key_values is not None:
            raise ValueError("PaLMModel: cache and past_key_values are two names of one thing, give one")
        cache = past_key_values if cache is None else cache
        x_BTC = self._embed(input_ids, inputs_embeds, strength, source_ids)
        B, T, _ = x_BTC.shape
        cache = self._cache(cache, use_cache, maybe_packed=position_ids is not None and attention_mask is None)
        past = 0 if cache is None else cache.get_seq_length()
        room = static_room(cache)
        stays = isinstance(past, Tensor) and self._stays(past, room, T, prefix_lengths)
        past = past if stays else int(past)
        attention_mask = self._check_mask(attention_mask, B, room if stays else past + T, T if stays else room)
        if cache is not None and self._says_nothing(attention_mask):
            attention_mask = None
        mask = self._mask(attention_mask, strength, kappa, prefix_lengths, T, cached=stays or past > 0)
        packed = None
        if cache is None and attention_mask is None and position_ids is not None:
            packed = self._packed(position_ids, mask, B, T)
        positions = self._positions(position_ids, attention_mask, past, T, x_BTC.device)
        want_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        states = [x_BTC] if want_states else []
        hidden_BTC = None
        if cache is not None and not isinstance(past, Tensor) and not want_states:
            hidden_BTC = decode_step(self, PaLMBlock, x_BTC, cache, past + T, mask, positions)
        if hidden_BTC is None:
            if positions is None and past:
                positions = torch.arange(T, device=x_BTC.device) + past
            cached = None if cache is None else attends(cache, past + T, mask, x_BTC, self.config.num_attention_heads)
            cos, sin = self.rotary.cos, self.rotary.sin
            for i, layer in enumerate(self.layers):
                attend = packed if cached is None else cached(i)
                x_BTC = layer(x_BTC, cos, sin, positions=positions, attend=attend, **mask)
                if want_states:
                    states.append(x_BTC)
            hidden_BTC = self.norm(x_BTC)
        if want_states:
            states[-1] = hidden_BTC
        kept = tuple(states) if want_states else None
        return BaseModelOutputWithPast(last_hidden_state=hidden_BTC, hidden_states=kept, **{_CACHE: cache})  # type: ignore

    def _embed(self, input_ids, inputs_embeds, strength, source_ids) -> Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("PaLMModel: give either input_ids or inputs_embeds")
        if strength is None:
            if source_ids is not None:
                raise ValueError("PaLMModel: source_ids without strength, pass both")
            embedded = self._rows(input_ids) if inputs_embeds is None else inputs_embeds
            return self.embedding_dropout(embedded) if self.training else embedded
        if input_ids is None:
            raise ValueError("PaLMModel: strength mixes token embeddings, give input_ids, not inputs_embeds")
        mask_id = self.config.mask_token_id
        if source_ids is None:
            if mask_id is None:
                raise ValueError("PaLMModel: strength needs source_ids or config.mask_token_id")
            source_ids = torch.full_like(input_ids, mask_id)
        elif mask_id is not None:
            source_ids = torch.where(source_ids >= 0, source_ids, mask_id)
        table = self.embed_tokens
        if why_not_plain("embed_tokens", table, nn.Embedding, strength) is None:
            mixed = soft_weak_embedding(input_ids, table.weight, strength, source_ids=source_ids)
        else:  # a wrapped table: only the module knows its rows
            row, source, a = self._rows(input_ids), self._rows(source_ids.clamp(min=0)), strength[..., None]
            source = source.masked_fill((source_ids < 0)[..., None], 0.0)
            mixed = ((1 - a) * row + a * source).to(row.dtype)
        return self.embedding_dropout(mixed)

    def _rows(self, ids: Tensor) -> Tensor:
        """embed_tokens(ids), with an error that says which id it does not have; on a GPU nobody looks."""
        try:
            return self.embed_tokens(ids)
        except IndexError as error:
            low, high = ids.aminmax()
            raise ValueError(
                f"PaLMModel: ids from {low} to {high}, vocab_size is {self.config.vocab_size}: the tokenizer has another vocabulary"
            ) from error

    def _cache(self, cache, use_cache: bool | None, maybe_packed: bool):
        """The cache to fill: the given one, a new one if asked for (None: if the config does and nothing is lost by it), else None."""
        if use_cache is None:
            learns = self.training or torch.is_grad_enabled()
            use_cache = self.config.use_cache and not (
                learns or maybe_packed or self.config.attention == "bidirectional"
            )
        if cache is None and not use_cache:
            return None
        if self.config.attention == "bidirectional":
            raise ValueError("PaLMModel: a cache needs attention 'causal' or 'prefix', the config says 'bidirectional'")
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            if cache is not None:
                raise ValueError("PaLMModel: a cache and gradient checkpointing exclude each other: give no cache")
            _LOG.warning_once("PaLMModel: no cache is made, since gradient checkpointing is on: pass use_cache=False")
            return None
        return DynamicCache(config=self.config) if cache is None else cache

    def _stays(self, past: Tensor, room: int | None, T: int, prefix_lengths) -> bool:
        """Whether nobody looks at the length of a static cache; not where it could hold more tokens than there are positions."""
        served = room is not None and room <= self.config.max_position_embeddings and (prefix_lengths is None or T == 1)
        return served and length_stays(past, T, self.config.num_attention_heads)

    @staticmethod
    def _check_mask(attention_mask, B, S, shortest=None) -> Tensor | None:
        """attention_mask as bool [B,S], or an error that says what would do.

        Over a static cache it may have another length, from `shortest` on: as long as the room it is cut to S, and where S is the room
        it is made as long.
        """
        if attention_mask is None:
            return None
        if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
            given = list(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
            raise ValueError(
                f"PaLMModel: attention_mask is {given}, need [B,S] of 0/1 or bool; causal, prefix and window masks are the config's"
            )
        rows, length = attention_mask.shape
        if rows != B or not (length == S or (shortest is not None and shortest <= length <= max(S, shortest))):
            raise ValueError(
                f"PaLMModel: attention_mask has shape {[rows, length]}, need [B,S] = {[B, S]} (cached tokens included)"
            )
        keep = attention_mask != 0
        return keep if length == S else F.pad(keep, (0, S - length), value=True)

    @staticmethod
    def _says_nothing(attention_mask) -> bool:
        """Whether it removes no key, where looking is cheap: `generate` always gives one."""
        if attention_mask is None or attention_mask.device.type != "cpu" or torch.compiler.is_compiling():
            return False
        return bool(attention_mask.all())

    def _mask(self, attention_mask, strength, kappa, prefix_lengths, T, cached) -> dict:
        """The mask keywords of `parallel_block`."""
        mode, window = self.config.attention, self.config.sliding_window
        if prefix_lengths is not None and mode != "prefix":
            raise ValueError(f"PaLMModel: prefix_lengths needs config.attention = 'prefix', it is {mode!r}")
        if mode == "bidirectional" and window is not None:
            window = (window, window)
        key_bias = attention_mask
        if strength is not None and kappa:
            if cached:
                raise ValueError("PaLMModel: kappa > 0 needs all keys in one call, not a filled cache")
            key_bias = soft_key_bias(strength, kappa)
            if attention_mask is not None:
                key_bias = key_bias.masked_fill(~attention_mask, -torch.inf)
        if prefix_lengths is not None:  # a single token is the last, and sees every key that is there
            prefix_lengths = None if T == 1 else prefix_lengths.to(torch.int32)
        causal = mode != "bidirectional"
        return {"causal": causal, "key_bias": key_bias, "window": window, "prefix_lengths": prefix_lengths}

    @staticmethod
    def _packed(position_ids, mask, B, T):
        """The attention of packed rows, or None where each row is one sequence."""
        starts_BT = packed_starts(position_ids.expand(B, T))
        if not starts_BT[:, 1:].any():
            return None
        if mask["prefix_lengths"] is not None:
            raise ValueError("PaLMModel: prefix_lengths and packed rows exclude each other")
        rest = {k: mask[k] for k in ("causal", "window", "key_bias")}
        return partial(_attend_packed, starts=sequence_bounds(starts_BT), **rest)

    def _positions(self, position_ids, attention_mask, past, T, device) -> Tensor | None:
        """[T] or [B,T] positions, given or counted by the mask; None where they go on behind the `past` cached ones, a known number."""
        stays = isinstance(past, Tensor)
        if position_ids is not None:
            positions = position_ids[0] if position_ids.dim() == 2 and position_ids.shape[0] == 1 else position_ids
        elif attention_mask is not None:
            counted = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
            positions = counted[:, torch.arange(T, device=device) + past] if stays else counted[:, past:]
        else:
            positions = torch.arange(T, device=device) + past if stays else None
        limit = self.config.max_position_embeddings
        if not stays and past + T > limit and (positions is None or int(positions.max()) >= limit):
            raise ValueError(
                f"PaLMModel: {past + T} tokens, max_position_embeddings is {limit}: cut or split the input"
            )
        return positions
