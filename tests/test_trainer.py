"""transformers' Trainer and gradient checkpointing on ours, and checkpoints that are not what they should be."""

import pytest
import torch
from small_models import batch, build, gradients, same
from transformers import (
    DataCollatorForTokenClassification,
    DynamicCache,
    Trainer,
    TrainingArguments,
    default_data_collator,
    pipeline,
)
from transformers.utils import logging

from palm_kernels.models import (
    PaLMForCausalLM,
    PaLMForMaskedLM,
    PaLMForSequenceClassification,
    PaLMForTokenClassification,
    PaLMTokenizer,
)


def arguments(folder, **fields):
    quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
    return TrainingArguments(str(folder), **quiet, **fields)


@pytest.mark.parametrize("kind", [PaLMForCausalLM, PaLMForMaskedLM, PaLMForTokenClassification])
def test_accumulated_batches_are_one_batch(kind, tmp_path):
    """Rows with few and with many labels, in one batch of four or in four of one: the same loss and the same step."""
    pytest.importorskip("accelerate")
    ids, mask, labels = batch(B=4)
    labels[0, 4:] = -100
    labels[2, 2:] = -100
    if kind is PaLMForTokenClassification:
        labels = torch.where(labels >= 0, labels % 3, labels)
    rows = [{"input_ids": i, "attention_mask": m, "labels": y} for i, m, y in zip(ids, mask, labels, strict=True)]
    found = []
    for size in (4, 1):
        model = build(kind, num_labels=3)
        steps = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size, "max_steps": 1}
        plain = {"optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
        trainer = Trainer(
            model, arguments(tmp_path, **steps, **plain), data_collator=default_data_collator, train_dataset=rows
        )
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        found.append((losses, [p.detach().clone() for p in model.parameters()]))
    (one, whole), (four, cut) = found
    expected = build(kind, num_labels=3)(ids, mask, labels=labels).loss.item()
    assert one == pytest.approx([expected], abs=2e-4) and four == pytest.approx([expected], abs=2e-4)
    for a, b, start in zip(whole, cut, build(kind, num_labels=3).parameters(), strict=True):
        same(a, b)
        assert not torch.equal(a, start)


def test_trainer_and_pipeline(tmp_path):
    pytest.importorskip("accelerate")
    words = ["Ada", "met", "Bob", "in", "Rome"]
    tokenizer = PaLMTokenizer.train([words] * 5, 300)
    model = build(
        PaLMForTokenClassification,
        attention="bidirectional",
        vocab_size=len(tokenizer),
        num_labels=2,
        id2label={0: "O", 1: "B-PER"},
        label2id={"O": 0, "B-PER": 1},
    )
    encoded = tokenizer(words, is_split_into_words=True)
    firsts = [w != p for w, p in zip(encoded.word_ids(), [None, *encoded.word_ids()], strict=False)]
    tags = [1, 0, 1, 0, 0]
    labels = [tags[w] if first else -100 for w, first in zip(encoded.word_ids(), firsts, strict=True)]
    rows = [{"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"], "labels": labels}] * 8
    steps = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 12, "learning_rate": 3e-3}
    collator = DataCollatorForTokenClassification(tokenizer)
    trainer = Trainer(model, arguments(tmp_path, **steps), data_collator=collator, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.2 * losses[0] and 0.2 < losses[0] < 3
    tagger = pipeline("token-classification", model=model.eval(), tokenizer=tokenizer, device="cpu")
    assert {e["entity"] for e in tagger(" Ada met Bob in Rome")} == {"B-PER"}


# gradient checkpointing


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(attention, reentrant):
    model, (ids, mask, labels) = build(attention=attention).train(), batch()
    expected = gradients(model, input_ids=ids, attention_mask=mask, labels=labels)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    again = gradients(model, input_ids=ids, attention_mask=mask, labels=labels)
    assert model.model.layers[0].gradient_checkpointing
    same(again[0], expected[0])
    for a, b in zip(again[1], expected[1], strict=True):
        same(a, b)


def test_no_cache_under_gradient_checkpointing(monkeypatch):
    """use_cache=True is turned off with a warning, as in transformers; a cache that is given would be read by nobody."""
    model, ids = build().train(), batch()[0]
    model.gradient_checkpointing_enable()
    said = []
    monkeypatch.setattr(logging.get_logger("palm_kernels.models.modeling"), "warning_once", said.append, raising=False)
    out = model(ids, use_cache=True)
    assert "no cache is made" in said[0] and out.get("cache", out.get("past_key_values")) is None
    with pytest.raises(ValueError, match="exclude each other: give no cache"):
        model(ids, cache=DynamicCache(config=model.config))


# checkpoints that are not what they should be


@pytest.fixture
def saved(tmp_path):
    build(PaLMForTokenClassification, num_labels=5).save_pretrained(tmp_path)
    return tmp_path


def test_sizes_of_another_model(saved):
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        PaLMForTokenClassification.from_pretrained(saved, hidden_size=32)
    with pytest.raises(ValueError, match="num_attention_heads is 4, need a multiple of num_key_value_heads = 3"):
        PaLMForTokenClassification.from_pretrained(saved, num_key_value_heads=3)
    with pytest.raises(ValueError, match="attention is 'bidirectionel', need one of causal, bidirectional, prefix"):
        PaLMForTokenClassification.from_pretrained(saved, attention="bidirectionel")


def test_another_label_set(saved):
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        PaLMForTokenClassification.from_pretrained(saved, num_labels=7)
    model = PaLMForTokenClassification.from_pretrained(saved, num_labels=7, ignore_mismatched_sizes=True)
    assert model.score.weight.shape == (7, 48) and not model.score.bias.any()
    ids = batch()[0]
    with pytest.raises(ValueError, match=r"target\[0, 0\] is 7, need 0 <= target < V = 7"):
        model(ids, labels=torch.full_like(ids, 7))
    with pytest.raises(ValueError, match="2 class_weights for 5 labels"):
        PaLMForTokenClassification.from_pretrained(saved, class_weights=[1.0, 2.0])


@pytest.mark.parametrize("kept", [0, 4, 200, -100])
def test_weights_that_are_cut_off(saved, kept):
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(OSError, match=rf"the weights in '{saved}' are cut off or corrupt"):
        PaLMForTokenClassification.from_pretrained(saved)


def test_other_files_that_are_cut_off(saved):
    PaLMTokenizer.train(["a b"] * 10, 300).save_pretrained(saved)
    for name, kind in (("tokenizer.json", PaLMTokenizer), ("config.json", PaLMForTokenClassification)):
        text = (saved / name).read_text()
        (saved / name).write_text(text[: len(text) // 2])
        with pytest.raises(OSError, match="cut off or corrupt|not a valid JSON"):
            kind.from_pretrained(saved)
        (saved / name).write_text(text)
    (saved / "model.safetensors").unlink()
    with pytest.raises(OSError, match="no file named model.safetensors"):
        PaLMForTokenClassification.from_pretrained(saved)


def test_a_tokenizer_of_another_vocabulary():
    tokenizer = PaLMTokenizer.train(["the cat sat"] * 10, 300)
    encoded = tokenizer("the cat", return_tensors="pt")
    largest = int(encoded["input_ids"].max())
    for kind in (PaLMForCausalLM, PaLMForSequenceClassification):
        model = build(kind)
        with pytest.raises(ValueError, match=rf"to {largest}, vocab_size is 120: the tokenizer has another vocabulary"):
            model(**encoded)
        with pytest.raises(ValueError, match=r"need 0 <= id < 120"):
            model(**encoded, strength=torch.zeros(encoded["input_ids"].shape))
