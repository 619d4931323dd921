"""Every language model of transformers, tiny and random: our attention equals its own, or is refused; nothing is wrong in silence."""

import copy
import logging

import pytest
import torch
import transformers
from transformers import AutoConfig
from transformers.models.auto import modeling_auto

from palm_kernels import integrations

KINDS = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "masked": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
}
WIDTHS = ("hidden_size", "n_embd", "d_model", "dim", "embedding_size", "word_embed_proj_dim")
INNER = ("intermediate_size", "ffn_dim", "hidden_dim", "encoder_ffn_dim", "decoder_ffn_dim")
HEADS = ("num_attention_heads", "n_head", "n_heads", "encoder_attention_heads", "decoder_attention_heads")
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers")
LENGTHS = ("max_position_embeddings", "n_positions", "n_ctx")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
DROPOUTS = ("attention_dropout", "attention_probs_dropout_prob", "attn_pdrop", "dropout", "hidden_dropout_prob")
FIELDS = {
    **dict.fromkeys(WIDTHS, 64),
    **dict.fromkeys(INNER, 96),
    **dict.fromkeys(HEADS, 4),
    **dict.fromkeys(LAYERS, 2),
    **dict.fromkeys(LENGTHS, 64),
    **dict.fromkeys(EXPERTS, 4),
    **dict.fromkeys(DROPOUTS, 0.0),
    "vocab_size": 99,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
}
SERVED = (  # never to be refused
    *(
        "llama",
        "mistral",
        "mixtral",
        "gemma",
        "gemma3_text",
        "qwen2",
        "qwen3",
        "qwen3_moe",
        "phi",
        "phi3",
        "olmo2",
        "opt",
    ),
    *("gpt2", "gpt_neox", "gpt_bigcode", "stablelm", "starcoder2", "granite", "cohere", "cohere2", "smollm3", "biogpt"),
    *(
        "bert",
        "roberta",
        "electra",
        "distilbert",
        "modernbert",
        "albert",
        "bart",
        "mbart",
        "m2m_100",
        "pegasus",
        "whisper",
    ),
)
MOST = 3e7  # parameters: some configs cannot be made small by these fields


@pytest.fixture(autouse=True)
def registered():
    integrations.register()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(logging.WARNING)


def pair(kind, family):
    """(the model with its own attention, the same with ours); skips what these fields cannot build."""
    name = KINDS[kind][family]
    try:
        model = getattr(transformers, name if isinstance(name, str) else name[0])
        default = AutoConfig.for_model(family)
        known = default.to_dict().keys() | getattr(type(default), "attribute_map", {}).keys()
        config = type(default)(**{k: v for k, v in FIELDS.items() if k in known})
        with torch.device("meta"):
            size = sum(p.numel() for p in model(config).parameters())
        assert size < MOST, f"{size / 1e6:.0f} M parameters"
        theirs = model._from_config(copy.deepcopy(config), attn_implementation="eager").eval()
        for p in theirs.parameters():
            torch.nn.init.normal_(p, std=0.2 if p.dim() > 1 else 1.0)
    except Exception as error:  # a config that contradicts itself, a library that is not there
        pytest.skip(f"{type(error).__name__}: {error}"[:120])
    try:
        ours = model._from_config(copy.deepcopy(config), attn_implementation="palm_kernels").eval()
    except (ValueError, KeyError) as error:
        pytest.skip(f"transformers refuses: {error}"[:120])
    ours.load_state_dict(theirs.state_dict(), strict=False)
    return theirs, ours


def told(model, inputs, keep):
    """(logits of the tokens in keep, all gradients)."""
    logits = model(**inputs).logits
    logits.backward(torch.ones_like(logits) * keep[..., None])
    return logits[keep].detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("kind, family", [(kind, family) for kind in KINDS for family in KINDS[kind]])
def test_equal_or_refused(kind, family):
    torch.manual_seed(0)
    theirs, ours = pair(kind, family)
    ids, mask = torch.randint(3, 99, (3, 14)), torch.ones(3, 14, dtype=torch.long)
    mask[1, :4], mask[2, -4:] = 0, 0
    inputs, keep = {"input_ids": ids, "attention_mask": mask}, mask.bool()
    if kind == "seq2seq":  # fewer queries than keys
        inputs["decoder_input_ids"] = torch.randint(3, 99, (3, 5))
        keep = torch.ones(3, 5, dtype=torch.bool)
    try:
        expected = told(theirs, inputs, keep)
    except Exception as error:
        pytest.skip(f"its own attention fails: {type(error).__name__}: {error}"[:120])
    try:
        found = told(ours, inputs, keep)
    except NotImplementedError as error:
        assert family not in SERVED and ("attn_implementation=" in str(error) or "backend" in str(error))
        return
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max()
    if kind == "causal":
        prompt = {"input_ids": ids[:2, :9], "attention_mask": mask[:2, :9], "max_new_tokens": 6, "do_sample": False}
        for cache in ("dynamic", "static"):
            same_tokens(family, theirs, ours, {**prompt, "cache_implementation": cache, "disable_compile": True})


def same_tokens(family, theirs, ours, keywords):
    for model in (theirs, ours):
        model.generation_config.eos_token_id = None
    try:
        expected = theirs.generate(**keywords)
    except Exception:  # such a cache is none of this model's
        return
    try:
        assert torch.equal(ours.generate(**keywords), expected)
    except NotImplementedError as error:
        assert family not in SERVED and "palm_kernels" in str(error)
