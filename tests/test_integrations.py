"""attn_implementation="palm_kernels" in other people's models equals their own attention: logits, gradients, greedy tokens."""

import pytest
import torch
import transformers
from small_models import generate_compiled
from transformers import DynamicCache, StaticCache

from palm_kernels import integrations

SMALL = {
    "vocab_size": 99,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
GROUPED = {**SMALL, "num_key_value_heads": 2}
FAMILIES = {
    "Llama": GROUPED,
    "Cohere": {**SMALL, "num_key_value_heads": 1},
    "Mistral": {**GROUPED, "sliding_window": 5},
    "Gemma": {**SMALL, "num_key_value_heads": 1, "head_dim": 16},
    "Gemma3Text": {
        **GROUPED,
        "head_dim": 12,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "Qwen3": {**GROUPED, "head_dim": 12},
    "GPTNeoX": {**SMALL, "rotary_pct": 0.5},
}


@pytest.fixture(scope="module", autouse=True)
def registered():
    integrations.register()


def build(family, attention="palm_kernels", **fields):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**FAMILIES[family], initializer_range=0.3, **fields)
    name = f"{family}Model" if family == "Bert" else f"{family.removesuffix('Text')}ForCausalLM"
    if family == "Gemma3Text":
        name = "Gemma3ForCausalLM"
    model = getattr(transformers, name)._from_config(config, attn_implementation=attention)
    return model.eval()


def pair(family, **fields):
    ours, theirs = build(family, **fields), build(family, "sdpa", **fields)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def batch(side="left"):
    ids, mask = torch.randint(1, 99, (3, 14)), torch.ones(3, 14, dtype=torch.long)
    for row, n in ((1, 4), (2, 1)):
        mask[row, slice(0, n) if side == "left" else slice(14 - n, 14)] = 0
    return ids, mask


def close(found, expected, what):
    error = (found - expected).abs().max().item() / expected.abs().max().item()
    assert error < 1e-4, f"{what}: {error:.2e}"


@pytest.mark.parametrize("side", ["left", "right", None])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients(family, side):
    ours, theirs = pair(family)
    ids, mask = batch(side)
    mask = torch.ones_like(mask) if side is None else mask
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    keep = mask.bool()
    found, expected = (m(ids, attention_mask=mask, position_ids=positions).logits for m in (ours, theirs))
    close(found[keep], expected[keep], "logits")
    dout = torch.randn_like(expected) * keep[..., None]
    for logits in (found, expected):
        logits.backward(dout)
    for (name, p), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if other.grad is not None:
            close(p.grad, other.grad, name)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens(family, cache):
    ours, theirs = pair(family)
    ids, mask = batch("left")
    keywords = {"attention_mask": mask, "max_new_tokens": 9, "do_sample": False, "disable_compile": True}
    if cache == "static":
        keywords["cache_implementation"] = "static"
    assert torch.equal(ours.generate(ids, **keywords), theirs.generate(ids, **keywords))


@pytest.mark.parametrize("family, most", [("Llama", 1), ("Mistral", 2)])
def test_compiled_steps_of_generate(family, most):
    """As on a GPU: one graph serves all steps over a static cache, a sliding one has two kinds."""
    ours, theirs = pair(family)
    ids, mask = batch("left")
    keywords = {"attention_mask": mask, "max_new_tokens": 9, "do_sample": False}
    found, graphs = generate_compiled(ours, ids, **keywords)
    keywords |= {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(found, theirs.generate(ids, **keywords)) and 1 <= graphs <= most


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_several_new_tokens_over_a_cache(kind):
    ours, theirs = pair("Llama")
    ids = batch()[0]
    for cut in (5, 13):
        logits = []
        for model in (ours, theirs):
            room = {"max_cache_len": 20} if kind is StaticCache else {}
            cache = kind(config=model.config, **room)
            with torch.no_grad():
                model(ids[:, :cut], past_key_values=cache)
                logits.append(model(ids[:, cut:], past_key_values=cache).logits)
        close(*logits, f"{14 - cut} new tokens")


@pytest.mark.parametrize("family", ["Llama", "Mistral"])
def test_packed_rows(family):
    ours, theirs = pair(family)
    ids = batch()[0]
    lengths = [[9, 5], [14], [3, 4, 7]]
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    found, expected = (m(ids, position_ids=positions, use_cache=False).logits for m in (ours, theirs))
    close(found, expected, "logits")
    first = ours(ids[2:, 3:7], use_cache=False).logits
    close(found[2:, 3:7], first, "a sequence alone")


@pytest.mark.parametrize("padded", [False, True])
def test_an_encoder(padded):
    FAMILIES["Bert"] = {**SMALL, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    ours, theirs = pair("Bert")
    ids, mask = batch("right")
    mask = mask if padded else torch.ones_like(mask)
    found, expected = (m(ids, attention_mask=mask).last_hidden_state for m in (ours, theirs))
    close(found[mask.bool()], expected[mask.bool()], "hidden")


def test_what_cannot_be_served_says_what_to_do():
    ids = batch()[0]
    model = build("Llama", attention_dropout=0.1).train()
    with pytest.raises(NotImplementedError, match=r"attention dropout \(0.1\) .* use attention_dropout=0.0"):
        model(ids)
    model = build("Llama")
    with pytest.raises(NotImplementedError, match=r"a mask of shape \[3, 1, 14, 14\]"):
        model(ids, attention_mask=torch.zeros(3, 1, 14, 14))
    with pytest.raises(NotImplementedError, match="output_attentions"):
        integrations.forward(None, *torch.randn(3, 1, 2, 4, 8), None, output_attentions=True)
    with pytest.raises(NotImplementedError, match="softcap"):
        integrations.forward(None, *torch.randn(3, 1, 2, 4, 8), None, softcap=30.0)
    from transformers.masking_utils import chunked_causal_mask_function

    with pytest.raises(NotImplementedError, match="chunked_overlay"):
        integrations.mask(1, 4, 4, mask_function=chunked_causal_mask_function(2, torch.zeros(1)))
