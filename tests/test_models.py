"""The models: kernels against the reference backend, Hugging Face's conventions, and every mask through the trunk."""

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from small_models import batch, build, generate_compiled, gradients, same, tiny
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    DynamicCache,
    StaticCache,
)

import palm_kernels as pk
from palm_kernels.models import (
    PaLMConfig,
    PaLMForCausalLM,
    PaLMForMaskedLM,
    PaLMForTokenClassification,
    PaLMModel,
    SharedPrefix,
    decoding,
    generation,
    heads,
    modeling,
)

SHAPES = {
    "default": {},
    "layer_norm, grouped, interleaved": {
        "norm": "layer_norm",
        "norm_offset": 0.0,
        "num_key_value_heads": 2,
        "rope_type": "interleaved",
        "partial_rotary_factor": 0.5,
    },
    "bidirectional": {"attention": "bidirectional"},
    "bidirectional, window": {"attention": "bidirectional", "sliding_window": 3},
    "window": {"sliding_window": 4},
    "prefix": {"attention": "prefix"},
    "odd": {"hidden_size": 50, "num_attention_heads": 3, "head_dim": 20, "intermediate_size": 70, "vocab_size": 101},
    "untied": {"tie_word_embeddings": False, "z_loss": 1e-3},
}


def extras(model):
    if model.config.attention == "prefix":
        return {"prefix_lengths": torch.tensor([6, 0, 3], dtype=torch.int32)}
    return {}


def cache_of(out):
    """The output's cache, under the name that this version of transformers gives it."""
    return out["cache"] if "cache" in out else out.get("past_key_values")


# kernels against the reference


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", [PaLMForCausalLM, PaLMForMaskedLM, PaLMForTokenClassification])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_kernels_equal_the_reference(kind, shape, dtype):
    fields = {"num_labels": 100, "initializer_factor": 1.5, **SHAPES[shape]}
    model = build(kind, **fields).to(dtype).train()
    ids, mask, labels = batch()
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels, **extras(model)}
    seen = mask.bool()
    assert set(model.kernels().values()) == {"parallel_block"}

    def everything(m):
        loss, grads = gradients(m, **inputs)
        with torch.no_grad():
            logits = m.eval()(**{**inputs, "labels": None}).logits[seen]
        m.train()
        return [loss, logits, *grads]

    ours = everything(model)
    with pk.backend("reference"):
        yardstick = everything(model)
        truth = everything(model.double())
    names = ["loss", "logits", *(n for n, _ in model.named_parameters())]
    for name, *three in zip(names, ours, yardstick, truth, strict=True):
        assert_close(*three, dtype, dout_rms=0.0, what=name)


def loss_curve(steps=20):
    model = build(initializer_factor=1.0).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(steps):
        ids = batch(4, 16, seed=step % 4)[0]
        loss, _ = gradients(model, input_ids=ids, labels=ids)
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_the_loss_curve_is_the_references():
    ours = loss_curve()
    with pk.backend("reference"):
        theirs = loss_curve()
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert ours[-1] < ours[0] - 0.5


def test_causal_means_causal():
    model, (ids, _, _) = build(), batch()
    other = ids.clone()
    other[:, 7:] = 5
    same(model(ids).logits[:, :7], model(other).logits[:, :7])
    model = build(attention="bidirectional")
    assert not torch.allclose(model(ids).logits[:, 0], model(other).logits[:, 0], atol=1e-3)


def test_torch_compile():
    model, (ids, mask, labels) = build().train(), batch()
    expected = gradients(model, input_ids=ids, attention_mask=mask, labels=labels)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    model.zero_grad()
    loss = compiled(input_ids=ids, attention_mask=mask, labels=labels).loss
    loss.backward()
    same(loss, expected[0])
    for p, grad in zip(model.parameters(), expected[1], strict=True):
        same(p.grad, grad)
    same(torch.compile(model.model, backend="aot_eager", fullgraph=True)(ids).last_hidden_state, model.model(ids)[0])


# sizes, initialisation, files


@pytest.mark.parametrize(
    "name, total, per_block",
    [
        ("palm-8b", 8.6320e9, 236_982_272),
        ("palm-62b", 62.4957e9, 943_726_592),
        ("palm-540b", 540.3565e9, 4_539_303_936),
    ],
)
def test_parameter_counts_of_the_paper(name, total, per_block):
    with torch.device("meta"):
        model = PaLMForCausalLM(PaLMConfig.preset(name))
    assert model.num_parameters() == pytest.approx(total, rel=1e-5)
    assert sum(p.numel() for p in model.model.layers[0].parameters()) == per_block
    assert not [n for n, _ in model.named_parameters() if "bias" in n]


@pytest.mark.parametrize("norm_offset", [0.0, 1.0])
def test_initialisation(norm_offset):
    model = build(hidden_size=200, intermediate_size=800, vocab_size=1000, norm_offset=norm_offset)
    assert model.model.embed_tokens.weight.std().item() == pytest.approx(1.0, rel=0.02)
    for layer in model.model.layers:
        for linear in (layer.in_proj, layer.out_proj):
            assert linear.weight.std().item() == pytest.approx(linear.in_features**-0.5, rel=0.02)
        assert torch.equal(layer.norm.weight, torch.full_like(layer.norm.weight, 1 - norm_offset))
    assert model.config.logit_scale == pytest.approx(1 / math.sqrt(200))
    logits = model(batch()[0]).logits
    assert 0.5 < logits.std().item() < 3


def files(model, path, **keywords):
    model.save_pretrained(path)
    assert (path / "model.safetensors").exists()
    return type(model).from_pretrained(path, **keywords)


@pytest.mark.parametrize("kind", [PaLMModel, PaLMForCausalLM, PaLMForTokenClassification])
@pytest.mark.parametrize("tie", [True, False])
def test_save_and_load(kind, tie, tmp_path):
    model = build(kind, tie_word_embeddings=tie, logit_scale=0.3, num_labels=5, attention="bidirectional")
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)  # so that a fresh initialisation cannot pass for the file's
    loaded = files(model, tmp_path)
    assert loaded.config.logit_scale == 0.3 and loaded.config.attention == "bidirectional"
    assert loaded.config.to_diff_dict().keys() == model.config.to_diff_dict().keys()
    for (name, a), b in zip(loaded.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b), name
    rotary = (model if kind is PaLMModel else model.model).rotary
    assert torch.equal((loaded if kind is PaLMModel else loaded.model).rotary.cos, rotary.cos)
    ids, mask, _ = batch()
    assert torch.equal(loaded.eval()(ids, mask)[0], model(ids, mask)[0])
    if kind is PaLMForCausalLM:
        assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tie


def test_load_in_bfloat16(tmp_path):
    model = build(max_position_embeddings=300)
    loaded = files(model, tmp_path, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16 and loaded.model.rotary.cos.dtype == torch.float32
    assert torch.equal(loaded.model.rotary.cos, model.model.rotary.cos)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    ids = batch()[0]
    same(loaded(ids).logits.float(), model.bfloat16()(ids).logits.float())


def test_a_trunk_under_another_head(tmp_path):
    trunk = build(PaLMForCausalLM, seed=3)
    trunk.save_pretrained(tmp_path)
    tagger = PaLMForTokenClassification.from_pretrained(tmp_path, num_labels=7, attention="bidirectional")
    assert torch.equal(tagger.model.layers[1].in_proj.weight, trunk.model.layers[1].in_proj.weight)
    assert tagger.score.weight.shape == (7, 48) and tagger.score.weight.std().item() == pytest.approx(48**-0.5, rel=0.2)
    assert not tagger.score.bias.any() and tagger.config.attention == "bidirectional"


def test_auto_classes(tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is PaLMConfig
    assert type(AutoModel.from_pretrained(tmp_path)) is PaLMModel
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is PaLMForCausalLM
    assert type(AutoModelForTokenClassification.from_pretrained(tmp_path)) is PaLMForTokenClassification


def test_import_is_light():
    code = "import sys, palm_kernels; sys.exit(bool({'transformers', 'triton'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# losses


def test_language_model_loss():
    model, (ids, mask, labels) = build(z_loss=1e-2), batch()
    out = model(ids, mask, labels=labels)
    z, y = out.logits[:, :-1].flatten(0, 1).double(), labels[:, 1:].flatten()
    kept = y != -100
    nll = F.cross_entropy(z[kept], y[kept], reduction="sum") + 1e-2 * torch.logsumexp(z[kept], -1).square().sum()
    same(out.loss.double(), nll / kept.sum())
    trained = model.train()(ids, mask, labels=labels)
    assert trained.logits is None
    same(trained.loss, out.loss)
    both = model(ids, mask, labels=labels, return_logits=True)
    same(both.logits, out.logits)
    same(both.loss, out.loss)
    same(model(ids, mask, labels=labels, num_items_in_batch=torch.tensor(1000)).loss.double(), nll / 1000)
    same(model.eval()(ids, mask, labels=labels, num_items_in_batch=1000).loss.double(), nll / 1000)
    assert model(ids, mask, labels=labels, return_logits=False).logits is None
    shifted = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    for training in (False, True):  # labels that are shifted already, as context parallelism gives them
        same(model.train(training)(ids, mask, labels=ids, shift_labels=shifted).loss, out.loss)


def test_logits_to_keep():
    model, (ids, mask, labels) = build(), batch()
    whole = model(ids, mask, labels=labels)
    part = model(ids, mask, labels=labels, logits_to_keep=2)
    same(part.logits, whole.logits[:, -2:])
    same(part.loss, whole.loss)
    same(model(ids, mask, logits_to_keep=torch.tensor([0, 5])).logits, whole.logits[:, [0, 5]])


def test_token_classification_loss():
    weights = [1.0, 2.0, 0.5]
    model, (ids, mask, labels) = build(PaLMForTokenClassification, num_labels=3, class_weights=weights), batch(V=100)
    labels = torch.where(labels >= 0, labels % 3, labels)
    out = model(ids, mask, labels=labels)
    assert out.logits.shape == (3, 13, 3) and out.logits.dtype == torch.float32
    flat = out.logits.flatten(0, 1), labels.flatten(), torch.tensor(weights)
    same(out.loss, F.cross_entropy(*flat))
    same(model(ids, mask, labels=labels, num_items_in_batch=50).loss, F.cross_entropy(*flat, reduction="sum") / 50)
    same(model.train()(ids, mask, labels=labels).loss, out.loss)
    none = model(ids, mask, labels=torch.full_like(labels, -100)).loss
    none.backward()
    assert none.item() == 0
    with pytest.raises(ValueError, match="2 class_weights for 3 labels"):
        build(PaLMForTokenClassification, num_labels=3, class_weights=[1.0, 2.0])


def test_tuple_and_hidden_states():
    model, ids = build(), batch()[0]
    out = model(ids, output_hidden_states=True)
    assert len(out.hidden_states) == 3 and model(ids, return_dict=False)[0].equal(out.logits)
    same(F.linear(out.hidden_states[-1], model.lm_head.weight) * model.config.logit_scale, out.logits)
    same(out.hidden_states[0], model.model.embed_tokens(ids))
    same(model(inputs_embeds=model.model.embed_tokens(ids)).logits, out.logits)


# masks


def test_padding_changes_nothing():
    for fields in SHAPES.values():
        model = build(**fields)
        ids, mask, _ = batch()
        keywords = {"prefix_lengths": torch.zeros(3, dtype=torch.int32)} if extras(model) else {}
        alone = {"prefix_lengths": torch.zeros(1, dtype=torch.int32)} if keywords else {}
        logits = model(ids, attention_mask=mask, **keywords).logits
        for b in range(3):
            same(logits[b][mask[b] == 1], model(ids[b][mask[b] == 1][None], **alone).logits[0])
        assert torch.equal(model(ids, attention_mask=mask.bool(), **keywords).logits, logits)


def test_prefix_sees_itself():
    model, ids = build(attention="prefix"), batch()[0]
    other = ids.clone()
    other[:, 5] = 7
    lengths = torch.tensor([6, 5, 0])
    changed = (
        (model(ids, prefix_lengths=lengths).logits - model(other, prefix_lengths=lengths).logits)[:, 0].abs().amax(-1)
    )
    assert changed[0] > 1e-3 and changed[1] < 1e-5 and changed[2] < 1e-5
    same(model(ids).logits, build(attention="causal")(ids).logits)


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_packed_rows_are_separate_sequences(attention):
    model, ids = build(attention=attention).train(), batch(2, 12)[0]
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 0], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]])
    hidden = model.model(ids, position_ids=positions)[0]
    for row, start, end in ((0, 0, 4), (0, 4, 11), (0, 11, 12), (1, 0, 12)):
        same(hidden[row, start:end], model.model(ids[row : row + 1, start:end])[0][0])
    hidden.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.model.parameters())


# caches


@pytest.mark.parametrize("shape", ["default", "layer_norm, grouped, interleaved", "window", "prefix", "untied"])
@pytest.mark.parametrize("pad", [0, 3])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_generation_with_cache_equals_without(shape, pad, kind):
    model = build(**{**SHAPES[shape], "tie_word_embeddings": False, "initializer_factor": 3.0})
    ids, mask = batch()[0], torch.ones(3, 13, dtype=torch.long)
    mask[1, :pad] = 0
    keywords = {"attention_mask": mask, "max_new_tokens": 14, "do_sample": False, "eos_token_id": None, **extras(model)}
    with_cache = model.generate(ids, cache_implementation=kind, **keywords)
    assert torch.equal(with_cache, model.generate(ids, use_cache=False, **keywords))
    assert len(set(with_cache[:, 13:].flatten().tolist())) > 5, "the test model says only one thing"


@pytest.mark.parametrize("shape", ["default", "layer_norm, grouped, interleaved", "window", "prefix"])
@pytest.mark.parametrize("chunks", [[13], [1] * 13, [5, 1, 1, 4, 2]], ids=str)
@pytest.mark.parametrize("room", [None, 13, 20])
def test_chunks_through_a_cache(shape, chunks, room):
    model, (ids, mask, _) = build(**SHAPES[shape]), batch()
    keywords = {"prefix_lengths": torch.tensor([4, 5, 2])} if shape == "prefix" else {}
    if keywords and chunks[0] < 4:
        keywords["prefix_lengths"] = torch.tensor([1, 0, 1])
    whole = model(ids, attention_mask=mask, **keywords).logits
    for grad in (torch.no_grad(), torch.enable_grad()):
        static = room and StaticCache(config=model.config, max_cache_len=room)
        cache, parts, done = static or DynamicCache(config=model.config), [], 0
        with grad:
            for n in chunks:
                done += n
                out = model(
                    ids[:, done - n : done], attention_mask=mask[:, :done], cache=cache, use_cache=True, **keywords
                )
                parts.append(out.logits)
        same(torch.cat(parts, 1)[mask.bool()], whole[mask.bool()])
        assert cache_of(out) is cache


def test_past_key_values_is_the_same_cache():
    model, ids = build(), batch()[0]
    out = model(ids[:, :8], use_cache=True)
    cache = cache_of(out)
    same(model(ids[:, 8:], past_key_values=cache).logits, model(ids).logits[:, 8:])


def test_when_a_forward_makes_a_cache():
    model, (ids, mask, labels) = build(), batch()
    packed = torch.arange(13).remainder(5)[None]
    assert cache_of(model(ids)) is None, "grad is on"
    with torch.no_grad():
        for made, keywords in (
            (True, {}),
            (True, {"attention_mask": mask, "position_ids": torch.arange(13)[None]}),
            (False, {"position_ids": packed}),
            (False, {"labels": labels}),
            (False, {"use_cache": False}),
            (True, {"use_cache": True, "labels": labels}),
        ):
            assert (cache_of(model(ids, **keywords)) is not None) == made, keywords
        assert cache_of(build(use_cache=False)(ids)) is None and cache_of(build().train()(ids)) is None
        same(model(ids[:, 8:], cache=cache_of(model(ids[:, :8])), use_cache=False).logits, model(ids).logits[:, 8:])


@pytest.mark.parametrize("grad", [False, True])
def test_static_cache_is_read_where_it_is(monkeypatch, grad):
    """No copy of it reaches the kernels, and what lies beyond the tokens is never read."""
    model, ids = build(), batch()[0]
    cache = StaticCache(config=model.config, max_cache_len=40)
    steps, whole = (calls_of(monkeypatch, decoding, n) for n in ("decode_blocks", "attention"))
    with torch.set_grad_enabled(grad):
        first = model(ids[:, :8], cache=cache).logits
        for layer in cache.layers:
            layer.keys[:, :, 8:], layer.values[:, :, 8:] = torch.nan, torch.nan
        whole.clear()
        logits = torch.cat(
            (first, model(ids[:, 8:10], cache=cache).logits, model(ids[:, 10:11], cache=cache).logits), 1
        )
    same(logits, model(ids[:, :11]).logits)
    seen = (
        [(k, v) for _, k, v in whole] if grad else [kv for call in steps for kv in zip(call[4], call[5], strict=True)]
    )
    for (k, v), layer in zip(seen, 2 * cache.layers, strict=True):
        assert k.data_ptr() == layer.keys.data_ptr() and v.data_ptr() == layer.values.data_ptr()
    assert [int(layer.cumulative_length) for layer in cache.layers] == [11] * len(cache.layers)


# a few tokens: all blocks in one call


def calls_of(monkeypatch, module, name):
    """A list that grows with each call of module.<name>."""
    calls, original = [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda *a, **k: calls.append(a) or original(*a, **k))
    return calls


def decode(model, ids, mask, tokens, **keywords):
    """Logits of the last `tokens` of ids, after a cached start."""
    cache, start = DynamicCache(config=model.config), ids.shape[1] - tokens
    with torch.no_grad():
        model(ids[:, :start], attention_mask=mask[:, :start], cache=cache, **keywords)
        return model(ids[:, start:], attention_mask=mask, cache=cache, **keywords).logits


@pytest.mark.parametrize("shape", ["default", "layer_norm, grouped, interleaved", "window", "odd", "untied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 5, 6])
def test_decode_step_equals_the_reference(shape, dtype, tokens, monkeypatch):
    model, (ids, mask, _) = build(**SHAPES[shape]).to(dtype), batch()
    mask[-1] = 1
    steps = calls_of(monkeypatch, decoding, "decode_blocks")
    products = calls_of(monkeypatch, heads, "decode_linear")
    ours = decode(model, ids, mask, tokens)
    assert len(steps) == len(products) == (3 * tokens <= 16)
    with pk.backend("reference"):
        yardstick = decode(model, ids, mask, tokens)
        truth = decode(model.double(), ids, mask, tokens)
    assert_close(ours, yardstick, truth, dtype, dout_rms=0.0, what="logits")


def test_hooked_modules_are_called_in_a_decode_step(monkeypatch):
    model, (ids, mask, _) = build(), batch()
    plain = decode(model, ids, mask, 1)
    steps = calls_of(monkeypatch, decoding, "decode_blocks")
    block = model.model.layers[1]
    for hooked in (block, block.norm, block.out_proj, model.model.norm, model.lm_head):
        called = []
        hook = hooked.register_forward_hook(lambda module, args, out, called=called: called.append(module))
        same(decode(model, ids, mask, 1), plain)
        assert called == [hooked, hooked] and len(steps) == (hooked is model.lm_head)
        hook.remove()
    called = []
    hook = nn.modules.module.register_module_forward_hook(lambda module, args, out: called.append(module))
    same(decode(model, ids, mask, 1), plain)
    hook.remove()
    assert called.count(block.norm) == 2
    del model.lm_head.weight  # as a sharded or quantised layer has none
    model.lm_head.weight = model.model.embed_tokens.weight.detach().clone()
    same(decode(model, ids, mask, 1), plain)


def test_no_short_cut_with_grad_or_autocast(monkeypatch):
    model, (ids, mask, _) = build(), batch()
    steps = calls_of(monkeypatch, decoding, "decode_blocks")
    products = calls_of(monkeypatch, heads, "decode_linear")
    cache = cache_of(model(ids[:, :12], use_cache=True))
    model(ids[:, 12:], cache=cache).logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert decode(model, ids, mask, 1).dtype == torch.bfloat16
    assert steps == products == []


def test_decode_step_says_what_does_not_fit():
    model, ids = build(), batch()[0]
    with torch.no_grad(), pytest.raises(RuntimeError, match="x has 47 columns, in_proj is"):
        model.model(inputs_embeds=torch.zeros(1, 1, 47), use_cache=True)
    with torch.no_grad(), pytest.raises(ValueError, match="positions"):
        model.model(input_ids=ids[:, :1], position_ids=torch.tensor([[4000]]), use_cache=True)


def test_decode_step_on_strided_inputs_and_weights(monkeypatch):
    model, ids = build(), batch()[0]
    embeds = model.model.embed_tokens(ids).detach()
    with torch.no_grad():
        expected = model(inputs_embeds=embeds).logits[:, -1:]
        for block in model.model.layers:
            for linear in (block.in_proj, block.out_proj):
                linear.weight = nn.Parameter(linear.weight.t().contiguous().t())
        steps = calls_of(monkeypatch, decoding, "decode_blocks")
        cache = cache_of(model(inputs_embeds=embeds[:, :-1], use_cache=True))
        strided = embeds[:, -1:].transpose(0, 2).contiguous().transpose(0, 2)
        assert strided.stride(-1) != 1
        same(model(inputs_embeds=strided, cache=cache).logits, expected)
    assert len(steps) == 1


def test_a_full_static_cache_says_so():
    model, ids = build(), batch()[0]
    cache = StaticCache(config=model.config, max_cache_len=9)
    with torch.no_grad():
        model(ids[:, :9], cache=cache)
        with pytest.raises(ValueError, match="10 tokens, the static cache has room for 9"):
            model(ids[:, 9:10], cache=cache)


@pytest.mark.parametrize("kind", ["bare", "dynamic", "static"])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("padded", [False, True])
def test_one_token_after_another(kind, window, padded, monkeypatch):
    """Every cache, filled by decode steps alone, equals the whole sequence at once."""
    model, (ids, mask, _) = build(sliding_window=window), batch()
    mask = mask if padded else torch.ones_like(mask)
    config, longest = model.config, ids.shape[1] + 3
    cache = {
        "bare": DynamicCache,
        "dynamic": lambda: DynamicCache(config=config),
        "static": lambda: StaticCache(config=config, max_cache_len=longest),
    }[kind]()
    steps = calls_of(monkeypatch, decoding, "decode_blocks")
    with torch.no_grad():
        found = [
            model(ids[:, t : t + 1], attention_mask=mask[:, : t + 1], cache=cache).logits for t in range(ids.shape[1])
        ]
        whole = model(ids, attention_mask=mask).logits
    same(torch.cat(found, 1)[mask.bool()], whole[mask.bool()])
    rolls = kind == "static" and window  # such a cache copies its rows in every step
    assert len(steps) == (0 if rolls else ids.shape[1])


def test_decode_step_under_compile():
    model = build()
    block = model.model.layers[0]
    x = torch.randn(1, 2, model.config.hidden_size)
    cos, sin = model.model.rotary.cos, model.model.rotary.sin

    def step(x):
        return block(x, cos, sin, attend=lambda q, k, v: pk.attention(q, k, v, causal=True))

    with torch.no_grad():
        same(torch.compile(step, fullgraph=True, backend="aot_eager")(x), step(x))
        same(step(x), block(x, cos, sin))


@pytest.mark.parametrize("shape", ["default", "layer_norm, grouped, interleaved"])
@pytest.mark.parametrize("given", ["mask and positions", "mask", "nothing"])
def test_a_compiled_step_over_a_static_cache(shape, given):
    """One graph serves every step, and none of them looks at the cache's length."""
    model, (ids, mask, _) = build(**SHAPES[shape]), batch()
    mask = mask if given != "nothing" else torch.ones_like(mask)
    mask[-1] = 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = StaticCache(config=model.config, max_cache_len=20)
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        model(ids[:, :9], attention_mask=mask[:, :9], cache=cache)
        for t in range(9, 13):
            keywords = {} if given == "nothing" else {"attention_mask": F.pad(mask[:, : t + 1], (0, 19 - t), value=1)}
            if given == "mask and positions":
                keywords["position_ids"] = positions[:, t : t + 1]
            same(compiled(ids[:, t : t + 1], cache=cache, **keywords).logits[:, 0], expected[:, t])
    assert graphs.frame_count == 1


def test_generate_compiles_over_a_static_cache():
    """As it does by itself on a GPU; a sliding window's cache has two kinds of step, before and after it is full."""
    ids, mask = batch()[0], torch.ones(3, 13, dtype=torch.long)
    mask[1, :3] = 0
    for window, most in ((None, 1), (17, 4)):
        model = build(tie_word_embeddings=False, initializer_factor=3.0, sliding_window=window)
        keywords = {"attention_mask": mask, "max_new_tokens": 9, "do_sample": False, "eos_token_id": None}
        found, graphs = generate_compiled(model, ids, **keywords)
        assert torch.equal(found, model.generate(ids, **keywords)) and 1 <= graphs <= most


def test_a_static_cache_and_its_mask():
    model, (ids, mask, _) = build(), batch()
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        cache = StaticCache(config=model.config, max_cache_len=20)
        longer = F.pad(mask, (0, 7), value=1)
        same(model(ids, attention_mask=longer, cache=cache).logits[mask.bool()], expected[mask.bool()])
        for length in (12, 14, 21):
            with pytest.raises(ValueError, match=r"need \[B,S\] = \[3, 13\]"):
                cache = StaticCache(config=model.config, max_cache_len=20)
                model(ids, attention_mask=torch.ones(3, length), cache=cache)


def test_one_token_behind_a_prefix_is_a_plain_step(monkeypatch):
    model, (ids, mask, _) = build(**SHAPES["prefix"]), batch()
    lengths = torch.tensor([13, 5, 0])
    expected = model(ids, attention_mask=mask, prefix_lengths=lengths.clamp(max=12)).logits[:, -1]
    steps = calls_of(monkeypatch, decoding, "decode_blocks")
    same(decode(model, ids, mask, 1, prefix_lengths=lengths.clamp(max=12))[:, -1][:2], expected[:2])
    assert len(steps) == 1


def test_beams_through_a_cache():
    model, (ids, mask, _) = build(tie_word_embeddings=False, initializer_factor=3.0), batch()
    mask[-1] = 1
    keywords = {"attention_mask": mask, "num_beams": 3, "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(ids, **keywords), model.generate(ids, use_cache=False, **keywords))


@pytest.mark.parametrize("shape", ["default", "layer_norm, grouped, interleaved"])
@pytest.mark.parametrize(
    "keywords", [{"do_sample": False}, {"do_sample": False, "num_beams": 3}], ids=["greedy", "beams"]
)
def test_a_shared_prefix_gives_the_same_tokens(shape, keywords, monkeypatch):
    model, (ids, mask, _) = build(initializer_factor=3.0, **SHAPES[shape]), batch()
    ids[:, :6], mask[:] = ids[:1, :6], 1
    mask[1, 6:9] = 0  # padding stands behind the prompt
    keywords = {**keywords, "attention_mask": mask, "max_new_tokens": 7}
    plain = model.generate(ids, **keywords)
    prefix = SharedPrefix.of(model, ids[0, :6])
    seen = calls_of(monkeypatch, generation, "attention")
    for _ in range(2):
        assert torch.equal(model.generate(ids, **{modeling._CACHE: prefix.fresh()}, **keywords), plain)
    whole = [call for call in seen if call[0].shape[0] == 1]  # the prompt is met by all rows at once
    assert whole and all(call[1].shape[:2] == (1, 6) for call in whole)
    with torch.no_grad():
        logits = model(ids[:, 6:], attention_mask=mask, past_key_values=prefix.fresh()).logits
        same(logits[mask[:, 6:].bool()], model(ids, attention_mask=mask).logits[:, 6:][mask[:, 6:].bool()])


def test_what_a_shared_prefix_needs():
    with pytest.raises(ValueError, match="needs causal attention without a window"):
        SharedPrefix.of(build(sliding_window=4), torch.ones(3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"the prompt has shape \[2, 3\]"):
        SharedPrefix.of(build(), torch.ones(2, 3, dtype=torch.long))


def test_a_long_prompt_in_chunks():
    model, (ids, mask, _) = build(initializer_factor=3.0), batch()
    mask[-1] = 1
    keywords = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(ids, prefill_chunk_size=4, **keywords), model.generate(ids, **keywords))


# soft weak masking


def test_hard_strength_is_the_mask_token():
    model, ids = build(), batch()[0]
    hidden = torch.rand(ids.shape) < 0.3
    masked = ids.masked_fill(hidden, model.config.mask_token_id)
    assert torch.equal(model(ids, strength=hidden.float()).logits, model(masked).logits)
    assert torch.equal(model(ids, strength=torch.zeros(ids.shape)).logits, model(ids).logits)
    sources = torch.where(hidden, torch.randint(4, 100, ids.shape), -1)
    swapped = torch.where(hidden, sources, ids)
    assert torch.equal(model(ids, strength=hidden.float(), source_ids=sources).logits, model(swapped).logits)


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_soft_strength_and_kappa(attention):
    model, (ids, mask, labels) = build(attention=attention).train(), batch()
    strength, kappa = torch.rand(ids.shape).masked_fill(torch.rand(ids.shape) < 0.4, 0.0), 0.7
    table = model.model.embed_tokens.weight
    sources = torch.randint(4, 100, ids.shape)
    mixed = (1 - strength[..., None]) * table[ids] + strength[..., None] * table[sources]
    keywords = {"attention_mask": mask, "labels": labels}
    soft = {"strength": strength, "source_ids": sources}
    loss, grads = gradients(model, input_ids=ids, **soft, **keywords)
    expected, theirs = gradients(model, inputs_embeds=mixed, **keywords)
    same(loss, expected)
    for a, b in zip(grads, theirs, strict=True):
        same(a, b, 1e-4)
    strength.requires_grad_()
    weaker = model(ids, kappa=kappa, **soft, **keywords).loss
    assert abs(weaker.item() - loss.item()) > 1e-5
    weaker.backward()
    assert strength.grad.isfinite().all() and strength.grad.abs().sum() > 0
    bias = torch.log(1 - torch.clamp(kappa * strength, max=1 - 2**-10)).masked_fill(mask == 0, -torch.inf)
    block, rotary = model.model.layers[0], model.model.rotary
    with torch.no_grad():
        seen = []
        handle = block.register_forward_pre_hook(lambda _, args, kw: seen.append(kw["key_bias"]), with_kwargs=True)
        model(ids, kappa=kappa, **soft, attention_mask=mask)
        handle.remove()
    same(seen[0], bias.detach())
    assert rotary.cos.dtype == torch.float32
    model(ids, strength=torch.ones(ids.shape), kappa=1.0, labels=ids).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_soft_masking_of_a_wrapped_table():
    model, ids = build(), batch()[0]
    strength, sources = torch.rand(ids.shape), torch.randint(-1, 100, ids.shape)
    expected = model(ids, strength=strength, source_ids=sources).logits
    model.model.embed_tokens.register_forward_hook(lambda *_: None)
    same(model(ids, strength=strength, source_ids=sources).logits, expected)


# errors


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"norm": "batch_norm"}, "norm is 'batch_norm', need one of rms_norm, layer_norm"),
        ({"attention": "diagonal"}, "attention is 'diagonal'"),
        ({"rope_type": "xpos"}, "rope_type is 'xpos'"),
        ({"num_key_value_heads": 3}, "need a multiple of num_key_value_heads = 3"),
        ({"head_dim": 300}, "head_dim is 300, need 1 to 256"),
        ({"sliding_window": 0}, "sliding_window is 0"),
    ],
)
def test_config_errors(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny(**fields)
    with pytest.raises(ValueError, match="'palm-9b' is none of palm-tiny"):
        PaLMConfig.preset("palm-9b")


def test_input_errors():
    model, (ids, mask, labels) = build(max_position_embeddings=16), batch()
    for message, keywords in {
        "need \\[B,S\\] of 0/1 or bool": {"attention_mask": mask[:, None, None]},
        "attention_mask has shape \\[3, 12\\], need \\[B,S\\] = \\[3, 13\\]": {"attention_mask": mask[:, 1:]},
        "prefix_lengths needs config.attention": {"prefix_lengths": torch.tensor([1, 1, 1])},
        "source_ids without strength": {"source_ids": ids},
        "labels have shape": {"labels": labels[:, 1:]},
        "output_attentions is not available": {"output_attentions": True},
    }.items():
        with pytest.raises(ValueError, match=message):
            model(ids, **keywords)
    with pytest.raises(ValueError, match="17 tokens, max_position_embeddings is 16"):
        model(torch.ones(1, 17, dtype=torch.long))
    with pytest.raises(ValueError, match="17 tokens, max_position_embeddings is 16"):
        model(torch.ones(1, 17, dtype=torch.long), torch.ones(1, 17))
    assert model(torch.ones(1, 17, dtype=torch.long), torch.tensor([[0] + [1] * 16])).logits.shape == (1, 17, 120)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="attention 'causal' or 'prefix'"):
        build(attention="bidirectional")(ids, use_cache=True)
    with pytest.raises(ValueError, match="strength needs source_ids"):
        build(mask_token_id=None)(ids, strength=torch.zeros(ids.shape))
    with pytest.raises(ValueError, match="kappa > 0 needs all keys"):
        cache = cache_of(model(ids, use_cache=True))
        model(ids[:, :1], cache=cache, strength=torch.ones(3, 1), kappa=0.5)
    with pytest.raises(ValueError, match="ids from 5 to 120, vocab_size is 120: the tokenizer has another vocabulary"):
        model(torch.tensor([[5, 120, 7]]))
    with pytest.raises(ValueError, match="two names of one thing"):
        model(ids, cache=cache, past_key_values=cache)


def test_unused_head_layers_stay_out_of_the_trunk():
    names = {n.split(".")[0] for n, _ in build(PaLMForTokenClassification).named_parameters()}
    assert names == {"model", "score"} and isinstance(build().get_output_embeddings(), nn.Linear)
