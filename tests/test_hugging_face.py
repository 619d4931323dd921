"""What users of transformers, accelerate and PEFT do with a model: generate, offload, adapt, resize, train, load what is broken."""

import pytest
import torch
from safetensors import safe_open
from small_models import batch, build, gradients, same
from transformers import pipeline

import palm_kernels as pk
from palm_kernels.models import (
    PaLMForCausalLM,
    PaLMForMaskedLM,
    PaLMForTokenClassification,
    PaLMTokenizer,
    modeling,
)

BEAMS, GREEDY = {"num_beams": 3, "do_sample": False}, {"do_sample": False}


def talkative(**fields):
    """A model that does not repeat itself."""
    return build(tie_word_embeddings=False, initializer_factor=3.0, **fields)


# generation


@pytest.mark.parametrize("way", [GREEDY, BEAMS], ids=["greedy", "beams"])
@pytest.mark.parametrize("fields", [{}, {"sliding_window": 4}, {"num_key_value_heads": 2}], ids=str)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_padded_rows_continue_as_single_rows_do(way, fields, cache):
    model, ids = talkative(**fields), batch(B=4, T=9)[0]
    mask = torch.ones_like(ids)
    for row, pad in enumerate((0, 3, 8, 1)):
        mask[row, :pad] = 0
    keywords = {"max_new_tokens": 7, "eos_token_id": None, "cache_implementation": cache, **way}
    together = model.generate(ids, attention_mask=mask, **keywords)[:, 9:]
    for row in range(4):
        own = ids[row : row + 1, mask[row].bool()]
        assert torch.equal(model.generate(own, **keywords)[0, own.shape[1] :], together[row])
    assert len(set(together.flatten().tolist())) > 5, "the test model says only one thing"


def test_sampling_with_a_cache_equals_without():
    model, (ids, mask, _) = talkative(), batch()
    mask[-1] = 1
    keywords = {"attention_mask": mask, "do_sample": True, "top_k": 20, "max_new_tokens": 12, "eos_token_id": None}

    def sample(seed, **more):
        torch.manual_seed(seed)
        return model.generate(ids, **keywords, **more)

    with_cache = sample(3)
    assert torch.equal(with_cache, sample(3, use_cache=False))
    assert torch.equal(with_cache, sample(3, cache_implementation="static"))
    assert not torch.equal(with_cache, sample(4))


def test_going_on_from_the_cache_of_a_generation():
    model, ids = talkative(), batch()[0]
    keywords = {"do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    first = model.generate(ids, max_new_tokens=4, **keywords)
    cached = {modeling._CACHE: first[modeling._CACHE]}
    both = model.generate(first.sequences, max_new_tokens=4, **cached, **keywords).sequences
    assert torch.equal(both, model.generate(ids, max_new_tokens=8, **keywords).sequences)


def test_drafts_do_not_change_what_is_said():
    model, ids = talkative(), batch()[0][:1]
    keywords = {"do_sample": False, "max_new_tokens": 10, "eos_token_id": None}
    plain = model.generate(ids, **keywords)
    assert torch.equal(model.generate(ids, assistant_model=build(seed=7), **keywords), plain)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3, **keywords), plain)


def test_text_generation_pipeline():
    tokenizer = PaLMTokenizer.train(["the cat sat on the mat"] * 10, 300, padding_side="left")
    model = talkative(vocab_size=len(tokenizer))
    speak = pipeline("text-generation", model=model, tokenizer=tokenizer)
    texts = ["the cat", "on", "the mat sat on the"]
    keywords = {"max_new_tokens": 6, "do_sample": False}
    found = [rows[0]["generated_text"] for rows in speak(texts, batch_size=3, **keywords)]
    for text, whole in zip(texts, found, strict=True):
        ids = tokenizer(text, return_tensors="pt")
        assert whole == tokenizer.decode(model.generate(**ids, **keywords)[0], skip_special_tokens=True)


# placed elsewhere


@pytest.mark.parametrize("where", ["cpu", "auto", "one block on disk", "disk"])
def test_device_map(where, tmp_path):
    pytest.importorskip("accelerate")
    model, (ids, mask, _) = talkative(), batch()
    model.save_pretrained(tmp_path / "model")
    split = dict.fromkeys(["lm_head", *(f"model.{n}" for n, _ in model.model.named_children() if n != "layers")], "cpu")
    device_map = {
        "one block on disk": {**split, "model.layers.0": "cpu", "model.layers.1": "disk"},
        "disk": {"": "disk"},
    }.get(where, where)
    placed = PaLMForCausalLM.from_pretrained(tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "off")
    paths = set(placed.kernels().values())
    assert all(p.startswith("composition") for p in paths) if "disk" in where else paths == {"parallel_block"}
    assert placed.model.layers[1].in_proj.weight.is_meta == ("disk" in where)
    with torch.no_grad():
        same(placed(ids, attention_mask=mask).logits, model(ids, attention_mask=mask).logits)
    keywords = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(placed.generate(ids, **keywords), model.generate(ids, **keywords))


def test_cpu_offload():
    accelerate = pytest.importorskip("accelerate")
    model, ids = build(), batch()[0]
    expected = model(ids).logits
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.model.embed_tokens.weight.is_meta
    with torch.no_grad():
        same(model(ids).logits, expected)


# adapters


def lora(model, targets=("in_proj", "out_proj"), **fields):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=list(targets), init_lora_weights=False, **fields)
    return peft.get_peft_model(model, config)


def test_lora():
    model, (ids, mask, labels) = build(tie_word_embeddings=False), batch()
    before = model(ids, mask).logits
    wrapped = lora(model, ["in_proj", "out_proj", "lm_head"])
    assert all("peft" in path for path in model.kernels().values())
    wrapped.train()
    loss = wrapped(ids, attention_mask=mask, labels=labels).loss
    loss.backward()
    ours = {n: p.grad for n, p in wrapped.named_parameters() if "lora" in n}
    assert len(ours) == 10 and all(g.abs().sum() > 0 for g in ours.values())
    with pk.backend("reference"):
        wrapped.zero_grad()
        again = wrapped(ids, attention_mask=mask, labels=labels).loss
        again.backward()
    same(again, loss)
    for name, p in wrapped.named_parameters():
        if "lora" in name:
            same(p.grad, ours[name], 1e-4)
    after = wrapped.eval()(ids, attention_mask=mask).logits
    assert (after - before).abs().max() > 1e-2
    merged = wrapped.merge_and_unload()
    assert set(merged.kernels().values()) == {"parallel_block"}
    same(merged(ids, mask).logits, after)


def test_lora_saved_loaded_and_merged(tmp_path):
    peft = pytest.importorskip("peft")
    (ids, mask, _), task = batch(), {"task_type": "TOKEN_CLS"}
    wrapped = lora(build(PaLMForTokenClassification, num_labels=3), **task)
    trained = {n for n, p in wrapped.named_parameters() if p.requires_grad and "lora" not in n}
    assert len(trained) == 2 and all(".score." in n for n in trained)  # the new head is trained whole
    with torch.no_grad():
        for p in wrapped.parameters():
            if p.requires_grad:
                p.add_(0.01)
    expected = wrapped.eval()(input_ids=ids, attention_mask=mask).logits
    wrapped.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(build(PaLMForTokenClassification, num_labels=3), tmp_path).eval()
    same(loaded(input_ids=ids, attention_mask=mask).logits, expected)
    merged = loaded.merge_and_unload()
    assert set(merged.kernels().values()) == {"parallel_block"}
    same(merged(ids, mask).logits, expected)


def test_lora_under_gradient_checkpointing():
    (ids, mask, labels), found = batch(), []
    for checkpointing in (False, True):
        model = build()
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        wrapped = lora(model).train()
        wrapped(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        found.append([p.grad for n, p in wrapped.named_parameters() if "lora" in n])
    assert len(found[0]) == 8
    for a, b in zip(*found, strict=True):
        same(a, b)


def test_hooks_see_their_inputs():
    model, ids = build(), batch()[0]
    expected, shapes = model(ids).logits, []
    model.model.layers[1].out_proj.register_forward_hook(lambda _, args, out: shapes.append((args[0].shape, out.shape)))
    same(model(ids).logits, expected)
    assert shapes == [((3, 13, 4 * 12 + 4 * 48), (3, 13, 48))]
    assert list(model.kernels().values()) == ["parallel_block", "composition: out_proj has hooks"]


# vocabularies and tied weights


@pytest.mark.parametrize("kind", [PaLMForCausalLM, PaLMForMaskedLM])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("size", [130, 110])
def test_resized_vocabulary(kind, tied, size, tmp_path):
    model, ids = build(kind, tie_word_embeddings=tied), batch()[0]
    kept = min(size, 120)
    with torch.no_grad():  # a graph that is held would want the old shape's gradient
        before = model(ids).logits
    model.resize_token_embeddings(size)
    head, table = model.lm_head.weight, model.model.embed_tokens.weight
    assert (head is table) == tied and head.shape[0] == table.shape[0] == model.config.vocab_size == size
    same(model(ids).logits[..., :kept], before[..., :kept])
    gradients(model.train(), input_ids=ids, labels=ids)
    model.eval().save_pretrained(tmp_path)
    assert torch.equal(kind.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_are_one_after_loading(tied, tmp_path):
    model, ids = build(tie_word_embeddings=tied), batch()[0]
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert ("lm_head.weight" in file.keys()) != tied  # noqa: SIM118 (not a dict)
    loaded = PaLMForCausalLM.from_pretrained(tmp_path).train()
    head, table = loaded.lm_head.weight, loaded.model.embed_tokens.weight
    assert (head.data_ptr() == table.data_ptr()) == tied
    gradients(loaded, input_ids=ids, labels=ids)
    torch.optim.SGD(loaded.parameters(), lr=0.1).step()
    assert torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight) == tied


# precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_and_half_weights(dtype):
    model, (ids, mask, labels) = build().train(), batch()
    expected, reference = gradients(model, input_ids=ids, attention_mask=mask, labels=labels)
    with torch.autocast("cpu", dtype=dtype):
        loss, grads = gradients(model, input_ids=ids, attention_mask=mask, labels=labels)
    half, halves = gradients(model.to(dtype), input_ids=ids, attention_mask=mask, labels=labels)
    assert loss.dtype == half.dtype == torch.float32 and abs(loss - expected) < 0.05 and abs(half - expected) < 0.05
    assert {g.dtype for g in grads} == {torch.float32} and {g.dtype for g in halves} == {dtype}
    for exact, *others in zip(reference, grads, halves, strict=True):
        for other in others:
            assert torch.cosine_similarity(exact.flatten(), other.float().flatten(), 0) > 0.98
