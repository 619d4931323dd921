"""The independent oracle: transformers' Cohere with one key/value head is a PaLM block."""

import copy
import math

import pytest
import torch
from transformers import CohereConfig, CohereForCausalLM

from palm_kernels.models import PaLMForCausalLM, convert


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
    with torch.no_grad():
        for norm in [layer.input_layernorm for layer in theirs.model.layers] + [theirs.model.norm]:
            norm.weight.uniform_(0.5, 1.5)
    config, state = convert.from_cohere(theirs.state_dict(), theirs.config, rope_type=rope_type)
    ours = PaLMForCausalLM(config)
    ours.load_state_dict(state)
    return theirs, ours


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
    grads = {name: p.grad for name, p in theirs.named_parameters()}
    for name, grad in convert.from_cohere(grads, theirs.config, rope_type=rope_type)[1].items():
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


def test_what_cohere_has_and_a_palm_has_not():
    theirs, _ = pair(layers=1)
    state = theirs.state_dict()
    for field, value, message in (
        ("use_qk_norm", True, "use_qk_norm or attention_bias"),
        ("hidden_act", "gelu", "hidden_act is 'gelu'"),
        ("rope_parameters", {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}, "rope_type is 'linear'"),
    ):
        config = copy.deepcopy(theirs.config)
        setattr(config, field, value)
        with pytest.raises(ValueError, match=message):
            convert.from_cohere(state, config)
    with pytest.raises(ValueError, match="'model.layers.0.self_attn.q_norm.weight' has no place"):
        convert.from_cohere({**state, "model.layers.0.self_attn.q_norm.weight": torch.ones(1)}, theirs.config)
    del state["model.layers.0.mlp.up_proj.weight"]
    with pytest.raises(ValueError, match=r"has no 'model.layers.0.mlp.up_proj.weight' \(1 names are missing\)"):
        convert.from_cohere(state, theirs.config)
