"""The independent oracle: transformers' Cohere with one key/value head is a PaLM block."""

import math

import pytest
import torch
from transformers import CohereConfig, CohereForCausalLM

from palm_kernels.models import PaLMConfig, PaLMForCausalLM


def half_order(heads, dim):
    """Rows of an interleaved q or k projection in the order that a half-split rotation wants."""
    within = torch.cat((torch.arange(0, dim, 2), torch.arange(1, dim, 2)))
    return (torch.arange(heads)[:, None] * dim + within).flatten()


def pair(C=48, H=4, D=16, F=80, V=97, layers=3, rope_type="half", seed=0):
    torch.manual_seed(seed)
    theirs = CohereForCausalLM(
        CohereConfig(
            vocab_size=V,
            hidden_size=C,
            intermediate_size=F,
            num_hidden_layers=layers,
            num_attention_heads=H,
            num_key_value_heads=1,
            head_dim=D,
            max_position_embeddings=64,
            logit_scale=1 / math.sqrt(C),
            initializer_range=0.3,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    ours = PaLMForCausalLM(
        PaLMConfig(
            vocab_size=V,
            hidden_size=C,
            intermediate_size=F,
            num_hidden_layers=layers,
            num_attention_heads=H,
            head_dim=D,
            max_position_embeddings=64,
            norm="layer_norm",
            norm_eps=1e-5,
            norm_offset=0.0,
            rope_type=rope_type,
        )
    )
    with torch.no_grad():
        for norm in [layer.input_layernorm for layer in theirs.model.layers] + [theirs.model.norm]:
            norm.weight.uniform_(0.5, 1.5)
        for name, value in carry(theirs, rope_type).items():
            ours.get_parameter(name).copy_(value)
    return theirs, ours


def carry(theirs, rope_type, grad=False):
    """Their parameters (or gradients) under our names, rows permuted."""
    H, D = theirs.config.num_attention_heads, theirs.config.head_dim
    order = half_order if rope_type == "half" else lambda heads, dim: torch.arange(heads * dim)
    get = (lambda m: m.weight.grad) if grad else (lambda m: m.weight)
    out = {"model.embed_tokens.weight": get(theirs.model.embed_tokens), "model.norm.weight": get(theirs.model.norm)}
    for i, layer in enumerate(theirs.model.layers):
        attn, mlp = layer.self_attn, layer.mlp
        q, k = get(attn.q_proj)[order(H, D)], get(attn.k_proj)[order(1, D)]
        rows = (q, k, get(attn.v_proj), get(mlp.gate_proj), get(mlp.up_proj))
        out[f"model.layers.{i}.in_proj.weight"] = torch.cat(rows)
        out[f"model.layers.{i}.out_proj.weight"] = torch.cat((get(attn.o_proj), get(mlp.down_proj)), 1)
        out[f"model.layers.{i}.norm.weight"] = get(layer.input_layernorm)
    return out


def close(ours, theirs, what):
    error = (ours - theirs).abs().max().item() / theirs.abs().max().item()
    assert error < 1e-4, f"{what}: {error:.2e}"


@pytest.mark.parametrize("rope_type", ["half", "interleaved"])
@pytest.mark.parametrize("shape", [{}, {"C": 40, "H": 3, "D": 32, "F": 56, "layers": 1}], ids=str)
def test_logits_and_gradients_equal_cohere(rope_type, shape):
    theirs, ours = pair(rope_type=rope_type, **shape)
    ids = torch.randint(3, 97, (2, 23))  # their row 0 is padding: zeros, without a gradient
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.2, -100)
    expected = theirs(ids, labels=labels)
    close(ours.eval()(ids).logits, expected.logits, "logits")
    expected.loss.backward()
    loss = ours.train()(ids, labels=labels).loss
    close(loss, expected.loss, "loss")
    loss.backward()
    for name, grad in carry(theirs, rope_type, grad=True).items():
        close(ours.get_parameter(name).grad, grad, name)


def test_left_padding_equals_cohere():
    theirs, ours = pair()
    ids, mask = torch.randint(3, 97, (3, 12)), torch.ones(3, 12, dtype=torch.long)
    mask[0, :5] = mask[1, :1] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = theirs(ids, attention_mask=mask, position_ids=positions).logits
        logits = ours.eval()(ids, attention_mask=mask).logits
    close(logits[mask.bool()], expected[mask.bool()], "logits")


def test_generation_equals_cohere():
    theirs, ours = pair()
    ids, mask = torch.randint(3, 97, (2, 7)), torch.ones(2, 7, dtype=torch.long)
    mask[1, :3] = 0
    keywords = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(ours.eval().generate(ids, **keywords), theirs.eval().generate(ids, **keywords))
