"""The heads beside the causal language model: what they predict from, their losses by hand, Trainer's and pipelines' conventions."""

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    pipeline,
)

from palm_kernels.models import (
    PaLMConfig,
    PaLMForMaskedLM,
    PaLMForQuestionAnswering,
    PaLMForSequenceClassification,
    PaLMForTokenClassification,
    PaLMTokenizer,
)

MODES = ("causal", "bidirectional")


def build(kind, **fields):
    torch.manual_seed(0)
    sizes = {"vocab_size": 120, "hidden_size": 48, "head_dim": 12, "initializer_factor": 1.5}
    return kind(PaLMConfig.preset("palm-tiny", **{**sizes, **fields})).eval()


def batch(B=4, T=11):
    ids, mask = torch.randint(4, 100, (B, T)), torch.ones(B, T, dtype=torch.long)
    mask[0, :4] = 0  # padding on the left, on the right, and both
    mask[1, 7:] = 0
    mask[2, :2] = mask[2, 9:] = 0
    return ids, mask


def same(a, b):
    torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_masked_loss_is_that_of_the_labelled_columns(tied, z_loss):
    model = build(PaLMForMaskedLM, attention="bidirectional", tie_word_embeddings=tied, z_loss=z_loss)
    ids, mask = batch()
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.7, -100)
    hidden = model.model(ids, attention_mask=mask).last_hidden_state
    logits = model.config.logit_scale * hidden @ model.lm_head.weight.T
    kept = labels != -100
    expected = F.cross_entropy(logits[kept], labels[kept]) + z_loss * logits[kept].logsumexp(-1).square().mean()
    out = model(ids, attention_mask=mask, labels=labels)
    same(out.loss, expected)
    same(out.logits, logits)
    light = model.train()(ids, attention_mask=mask, labels=labels)
    same(light.loss, expected)
    assert light.logits is None
    same(model(ids, attention_mask=mask, labels=labels, num_items_in_batch=7).loss, expected * kept.sum() / 7)
    with pytest.raises(ValueError, match=r"PaLMForMaskedLM: labels have shape \[4, 10\]"):
        model(ids, labels=labels[:, 1:])


@pytest.mark.parametrize("attention", MODES)
def test_a_row_is_judged_by_its_own_tokens(attention):
    """Pooled logits of a padded row are those of the row without its padding, and the padding's embeddings get no gradient."""
    model = build(PaLMForSequenceClassification, attention=attention, num_labels=5)
    ids, mask = batch()
    logits = model(ids, attention_mask=mask).logits
    for row in range(len(ids)):
        own = ids[row : row + 1, mask[row].bool()]
        hidden = model.model(own).last_hidden_state
        pooled = hidden.mean(1) if attention == "bidirectional" else hidden[:, -1]
        same(logits[row], F.linear(pooled, model.score.weight, model.score.bias)[0])
        same(logits[row], model(own).logits[0])
    assert model(ids, attention_mask=torch.zeros_like(mask)).logits.isfinite().all()


def test_losses_of_sequences():
    ids, mask = batch()
    model = build(PaLMForSequenceClassification, num_labels=3, class_weights=[1.0, 2.0, 0.5])
    labels = torch.tensor([0, 2, 1, 1])
    out = model(ids, attention_mask=mask, labels=labels)
    same(out.loss, F.cross_entropy(out.logits, labels, weight=torch.tensor([1.0, 2.0, 0.5])))
    model = build(PaLMForSequenceClassification, num_labels=1)
    numbers = torch.randn(4)
    out = model(ids, attention_mask=mask, labels=numbers)
    same(out.loss, F.mse_loss(out.logits[:, 0], numbers))
    same(model(ids, attention_mask=mask, labels=numbers, num_items_in_batch=8).loss, out.loss / 2)
    model = build(PaLMForSequenceClassification, num_labels=3, problem_type="multi_label_classification")
    several = torch.randint(0, 2, (4, 3))
    out = model(ids, attention_mask=mask, labels=several)
    same(out.loss, F.binary_cross_entropy_with_logits(out.logits, several.float()))
    with pytest.raises(ValueError, match=r"labels have shape \[4\], multi_label_classification needs \[4, 3\]"):
        model(ids, labels=several[:, 0])


def test_spans():
    model = build(PaLMForQuestionAnswering, attention="bidirectional")
    ids, mask = batch()
    start, end = torch.tensor([5, 0, 11, -1]), torch.tensor([6, 3, 12, -1])  # the last two lie outside the window
    out = model(ids, attention_mask=mask, start_positions=start, end_positions=end)
    starts, ends = (logits.masked_fill(mask == 0, -torch.inf)[:2] for logits in (out.start_logits, out.end_logits))
    expected = (F.cross_entropy(starts, start[:2]) + F.cross_entropy(ends, end[:2])) / 2
    same(out.loss, expected)
    padded = torch.tensor([5, 0, 10])  # of row 2 columns 0, 1, 9 and 10 are padding
    more = model(ids[:3], attention_mask=mask[:3], start_positions=padded, end_positions=torch.tensor([6, 3, 9]))
    same(more.loss, expected)
    halved = model(ids, attention_mask=mask, start_positions=start, end_positions=end, num_items_in_batch=4)
    same(halved.loss, expected / 2)
    assert model(ids).loss is None
    with pytest.raises(ValueError, match="start_positions and end_positions go together"):
        model(ids, start_positions=start)
    out.loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    "auto", [AutoModelForMaskedLM, AutoModelForQuestionAnswering, AutoModelForSequenceClassification]
)
def test_saved_and_loaded_by_the_auto_classes(auto, tmp_path):
    model = auto.from_config(PaLMConfig.preset("palm-tiny", num_labels=3)).eval()
    model.save_pretrained(tmp_path)
    again = auto.from_pretrained(tmp_path).eval()
    ids = torch.randint(4, 100, (2, 7))
    assert type(again) is type(model) and all(
        torch.equal(a, b) for a, b in zip(model(ids).to_tuple(), again(ids).to_tuple(), strict=True)
    )
    if auto is AutoModelForMaskedLM:
        assert again.lm_head.weight is again.model.embed_tokens.weight


def test_strength_reaches_every_head():
    ids, strength = batch()[0], torch.zeros(4, 11)
    strength[:, 3] = 1.0
    for kind in (PaLMForMaskedLM, PaLMForSequenceClassification, PaLMForQuestionAnswering, PaLMForTokenClassification):
        model = build(kind, attention="bidirectional")
        masked = ids.clone()
        masked[:, 3] = model.config.mask_token_id
        for a, b in zip(model(ids, strength=strength).to_tuple(), model(masked).to_tuple(), strict=True):
            same(a, b)


def test_text_classification_pipeline():
    tokenizer = PaLMTokenizer.train(["what a good day", "what a bad day"] * 20, 300)
    model = build(PaLMForSequenceClassification, vocab_size=len(tokenizer), num_labels=2)
    found = pipeline("text-classification", model=model, tokenizer=tokenizer)(["a good day", "bad"])
    assert [set(f) for f in found] == [{"label", "score"}] * 2
    ids = tokenizer("bad", return_tensors="pt")
    assert found[1]["score"] == pytest.approx(model(**ids).logits.softmax(-1).max().item(), abs=1e-5)


def test_fill_mask_pipeline():
    tokenizer = PaLMTokenizer.train(["what a good day", "what a bad day"] * 20, 300)
    model = build(PaLMForMaskedLM, vocab_size=len(tokenizer), attention="bidirectional")
    fill = pipeline("fill-mask", model=model, tokenizer=tokenizer)
    found = fill("what a<mask> day", top_k=3, tokenizer_kwargs={"split_special_tokens": False})
    before, after = tokenizer("what a")["input_ids"], tokenizer(" day")["input_ids"]
    ids = torch.tensor([[*before, tokenizer.mask_token_id, *after]])
    assert [f["token"] for f in found] == model(ids).logits[0, len(before)].topk(3).indices.tolist()


def test_dropout_of_what_a_block_adds():
    model = build(PaLMForTokenClassification, residual_dropout=0.5, attention="bidirectional")
    ids = batch()[0]
    assert set(model.kernels().values()) == {"parallel_block"}
    plain = model(ids).logits
    model.train()
    assert set(model.kernels().values()) == {"composition: dropout"}
    torch.manual_seed(3)
    one, other = model(ids).logits, model(ids).logits
    assert not torch.allclose(one, other)
    for block in model.model.layers:
        block.dropout = 0.0
    same(model(ids).logits, plain)
    block = model.model.layers[0]
    block.dropout = 0.5
    x = torch.randn(64, 5, 48)
    added = block(x, model.model.rotary.cos, model.model.rotary.sin) - x
    block.eval()
    whole = block(x, model.model.rotary.cos, model.model.rotary.sin) - x
    dropped = added.abs() < 1e-6
    assert dropped.float().mean() == pytest.approx(0.5, abs=0.03)
    torch.testing.assert_close(added[~dropped], 2 * whole[~dropped], rtol=1e-3, atol=1e-4)


def test_dropout_must_be_a_share():
    with pytest.raises(ValueError, match="residual_dropout is 1.0, need a share below 1"):
        PaLMConfig(residual_dropout=1.0)


@pytest.mark.parametrize(
    "key, field", [("num_hiden_layers", "num_hidden_layers"), ("rope_tipe", "rope_type"), ("heads_dim", "head_dim")]
)
def test_a_slip_of_the_pen_in_a_config(key, field):
    with pytest.raises(ValueError, match=f"no field '{key}', do you mean '{field}'"):
        PaLMConfig(**{key: 1})


def test_unknown_keys_are_kept():
    config = PaLMConfig(my_note="x")
    assert config.my_note == "x" and PaLMConfig.from_dict(config.to_dict()).my_note == "x"
