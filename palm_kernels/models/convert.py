"""Weights of other people's PaLM-shaped models under our names.

Each function takes a state dict and gives (PaLMConfig, state dict of PaLMForCausalLM): `PaLMForCausalLM(config).load_state_dict(state)`.
Nothing is downloaded and nothing is executed: load the tensors with safetensors or `torch.load(weights_only=True)`.
"""

import itertools
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from .configuration import PaLMConfig

State = Mapping[str, Tensor]
IGNORED = r"(.*\.)?(beta|rotary_emb\.(inv_freq|scale)|rotary_emb\.inv_freq)"  # buffers that our config says


def _take(state: State, given: str, names: dict[str, str]) -> dict[str, Tensor]:
    """Ours by their name; every tensor of theirs must have a name or be an ignored buffer."""
    missing = [theirs for theirs in names.values() if theirs not in state]
    if missing:
        raise ValueError(f"{given}: the state dict has no {missing[0]!r} ({len(missing)} names are missing)")
    left = [name for name in state.keys() - set(names.values()) if not re.fullmatch(IGNORED, name)]
    if left:
        raise ValueError(
            f"{given}: {sorted(left)[0]!r} has no place in a PaLM of ours ({len(left)} such names); merge adapters first, "
            "query and key norms are not supported"
        )
    shifted = [n for n, t in state.items() if n.endswith("beta") and bool(t.count_nonzero())]
    if shifted:
        raise ValueError(f"{given}: {shifted[0]!r} is not zero, our norms have no bias")
    return {ours: state[theirs] for ours, theirs in names.items()}


def _tied(given: str, embedding: Tensor, head: Tensor | None) -> bool:
    if head is not None and head.shape != embedding.shape:
        raise ValueError(f"{given}: head {list(head.shape)} and embedding {list(embedding.shape)} differ in shape")
    return head is None or torch.equal(head, embedding)


def _lucidrains(state: State, given: str, names: dict[str, str], layers: int, norm_offset: float, **fields):
    """The block of both packages: rows [q | k | v | up | gate] of one projection, two output projections, layer norm with eps 1e-5."""
    found = _take(state, given, names)
    embedding, head = found["embed"], found.pop("head", None)
    first = {part: found[f"0.{part}"] for part in ("fused", "attended", "fed")}
    width, hidden = first["attended"].shape[1], first["fed"].shape[1]
    dim = (first["fused"].shape[0] - width - 2 * hidden) // 2
    if dim < 1 or width % dim or first["fused"].shape[0] != width + 2 * dim + 2 * hidden:
        raise ValueError(
            f"{given}: a projection of {list(first['fused'].shape)} beside {width} and {hidden} is no PaLM's"
        )
    tied = _tied(given, embedding, head)
    config = PaLMConfig(
        vocab_size=embedding.shape[0],
        hidden_size=embedding.shape[1],
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=width // dim,
        head_dim=dim,
        norm="layer_norm",
        norm_eps=1e-5,
        norm_offset=norm_offset,
        logit_scale=1.0,
        tie_word_embeddings=tied,
        **fields,
    )
    ours = {"model.embed_tokens.weight": embedding, "model.norm.weight": found["norm"]}
    ours["lm_head.weight"] = embedding if head is None else head
    for i in range(layers):
        heads, up, gate = found[f"{i}.fused"].split([width + 2 * dim, hidden, hidden])
        ours[f"model.layers.{i}.norm.weight"] = found[f"{i}.norm"]
        ours[f"model.layers.{i}.in_proj.weight"] = torch.cat((heads, gate, up))
        ours[f"model.layers.{i}.out_proj.weight"] = torch.cat((found[f"{i}.attended"], found[f"{i}.fed"]), 1)
    return config, ours


def _count(state: State, given: str, pattern: str) -> int:
    """How many layers: one more than the largest number in names that match."""
    numbers = [int(m[1]) for name in state if (m := re.fullmatch(pattern, name))]
    if not numbers:
        raise ValueError(f"{given}: no name of the state dict looks like {pattern!r}")
    return max(numbers) + 1


def from_palm_pytorch(state: State, **fields) -> tuple[PaLMConfig, dict[str, Tensor]]:
    """PyPI's `PaLM-pytorch`: layers are numbered in a Sequential, from the embedding (0) on. fields go into the config."""
    given = "from_palm_pytorch"
    layers = _count(state, given, r"(\d+)\.fn\.norm\.gamma") - 1
    names = {"embed": "0.weight", "norm": f"{layers + 1}.gamma"}
    if f"{layers + 2}.weight" in state:
        names["head"] = f"{layers + 2}.weight"
    for i in range(layers):
        block = f"{i + 1}.fn"
        names |= {f"{i}.norm": f"{block}.norm.gamma", f"{i}.fused": f"{block}.fused_attn_ff_proj.weight"}
        names |= {f"{i}.attended": f"{block}.attn_out.weight", f"{i}.fed": f"{block}.ff_out.1.weight"}
    return _lucidrains(state, given, names, layers, 0.0, **fields)


def from_palm_rlhf(state: State, *, norm_offset: float, **fields) -> tuple[PaLMConfig, dict[str, Tensor]]:
    """PyPI's `palm-rlhf-pytorch`, and the public checkpoints made with it; trained without xPos, which we do not have.

    norm_offset: 0.0 for weights of a version below 0.2.4, where the gain is gamma; 1.0 from it on, where it is gamma + 1. The names do
    not tell, and the wrong one gives wrong outputs without an error. fields go into the config.
    """
    given = "from_palm_rlhf"
    if norm_offset not in (0.0, 1.0):
        raise ValueError(f"{given}: norm_offset is {norm_offset}, need 0.0 (below 0.2.4) or 1.0 (from 0.2.4 on)")
    layers = _count(state, given, r"layers\.(\d+)\.fn\.norm\.gamma")
    names = {"embed": "token_emb.weight", "norm": "norm.gamma"}
    if "to_logits.weight" in state:
        names["head"] = "to_logits.weight"
    for i in range(layers):
        block = f"layers.{i}.fn"
        names |= {f"{i}.norm": f"{block}.norm.gamma", f"{i}.fused": f"{block}.fused_attn_ff_proj.weight"}
        names |= {f"{i}.attended": f"{block}.attn_out.weight", f"{i}.fed": f"{block}.ff_out.2.weight"}
    return _lucidrains(state, given, names, layers, norm_offset, **fields)


def from_cohere(state: State, config, **fields) -> tuple[PaLMConfig, dict[str, Tensor]]:
    """transformers' `CohereForCausalLM` (Command-R) with its CohereConfig. fields go into the config.

    Cohere rotates pairs (2i, 2i + 1) of a head's dimensions, and so do we then; with rope_type="half" the rows of q and k are put in
    the order that PaLM's rotation of (i, i + D/2) wants.
    """
    given = "from_cohere"
    if config.use_qk_norm or config.attention_bias:
        raise ValueError(f"{given}: use_qk_norm or attention_bias is set, a PaLM has neither")
    if config.hidden_act != "silu":
        raise ValueError(f"{given}: hidden_act is {config.hidden_act!r}, a PaLM's is 'silu'")
    rope = config.rope_parameters
    if rope["rope_type"] != "default":
        raise ValueError(f"{given}: rope_type is {rope['rope_type']!r}, need 'default'")
    parts = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    outs = ("self_attn.o_proj", "mlp.down_proj")
    names = {"embed": "model.embed_tokens.weight", "norm": "model.norm.weight"}
    if "lm_head.weight" in state:
        names["head"] = "lm_head.weight"
    for i in range(config.num_hidden_layers):
        for part in (*parts, *outs, "input_layernorm"):
            names[f"{i}.{part}"] = f"model.layers.{i}.{part}.weight"
    found = _take(state, given, names)
    if fields.get("rope_type") == "half":
        for i, part in itertools.product(range(config.num_hidden_layers), parts[:2]):
            rows = found[f"{i}.{part}"]
            found[f"{i}.{part}"] = rows.unflatten(0, (-1, config.head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
    embedding, head = found["embed"], found.get("head")
    ours = {"model.embed_tokens.weight": embedding, "model.norm.weight": found["norm"]}
    ours["lm_head.weight"] = embedding if head is None else head
    for i in range(config.num_hidden_layers):
        ours[f"model.layers.{i}.norm.weight"] = found[f"{i}.input_layernorm"]
        ours[f"model.layers.{i}.in_proj.weight"] = torch.cat([found[f"{i}.{part}"] for part in parts])
        ours[f"model.layers.{i}.out_proj.weight"] = torch.cat([found[f"{i}.{part}"] for part in outs], 1)
    found_config = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "norm": "layer_norm",
        "norm_eps": config.layer_norm_eps,
        "norm_offset": 0.0,
        "rope_type": "interleaved",
        "rope_theta": rope["rope_theta"],
        "logit_scale": config.logit_scale,
        "tie_word_embeddings": _tied(given, embedding, head),
        "pad_token_id": config.pad_token_id,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
    }
    return PaLMConfig(**{**found_config, **fields}), ours
