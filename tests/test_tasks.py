"""examples/tasks: labelled rows of every head on the one loop, toy corpora, files and their errors, windows, scores, saved models."""

import json
import random
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import pipeline
from transformers.modeling_outputs import QuestionAnsweringModelOutput

sys.path.insert(0, str(Path(__file__).parents[1]))  # examples/ is no part of the package

from examples.tasks import answer, classify, complete, corpora, relations, scores
from palm_kernels.models import (
    PaLMConfig,
    PaLMForCausalLM,
    PaLMForMaskedLM,
    PaLMForQuestionAnswering,
    PaLMForSequenceClassification,
    PaLMForTokenClassification,
    PaLMTokenizer,
)
from palm_kernels.train import Labelled, Settings, by_length, fit, outputs

TINY = ["--hidden", "32", "--layers", "1", "--heads", "1", "--vocab", "300", "--length", "64", "--threads", "1"]
TINY += ["--epochs", "1", "--batch", "32"]


def rows_for(kind, n=8, seed=0):
    """Rows of very different lengths and label counts."""
    rng = random.Random(seed)
    rows = []
    for i in range(n):
        ids = [rng.randrange(4, 50) for _ in range(3 + 3 * i)]
        labels = [-100 if rng.random() < 0.4 else j % 3 for j in ids]
        if kind is PaLMForSequenceClassification:
            rows.append({"input_ids": ids, "labels": i % 3})
        elif kind is PaLMForQuestionAnswering:
            span = (-100, -100) if i == 2 else (i, i + 2)
            rows.append({"input_ids": ids, "start_positions": span[0], "end_positions": span[1]})
        else:
            rows.append(
                {"input_ids": ids, "labels": labels if kind is PaLMForTokenClassification else [*ids[:-1], -100]}
            )
    return rows


def model_of(kind):
    torch.manual_seed(0)
    attention = "causal" if kind is PaLMForCausalLM else "bidirectional"
    shape = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 16}
    return kind(PaLMConfig(**shape, num_labels=3, attention=attention))


HEADS = [
    PaLMForTokenClassification,
    PaLMForSequenceClassification,
    PaLMForQuestionAnswering,
    PaLMForCausalLM,
    PaLMForMaskedLM,
]


@pytest.mark.parametrize("kind", HEADS)
def test_accumulated_uneven_rows_are_one_batch(kind, tmp_path, monkeypatch):
    """The gradients themselves: Adam's first step would hide a factor, and enlarge the rounding of a gradient that is zero."""
    rows, gradients, losses = rows_for(kind), [], []

    def keep(parameters, limit):
        gradients.append(torch.cat([p.grad.flatten() for p in parameters]))

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", keep)
    for batch, accumulate in ((8, 1), (2, 4)):
        objective = Labelled(rows, batch, 0, shift=getattr(kind, "shift", 0))
        settings = Settings(epochs=1, accumulate=accumulate)
        history = fit(model_of(kind), objective, settings, tmp_path / str(batch), say=len)
        losses.append(history[0]["loss"])
    assert len(gradients) == 2 and gradients[0].abs().max() > 1e-3
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-6)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("kind", HEADS)
def test_items_are_what_the_mean_loss_divides_by(kind):
    """So the step's loss is the mean that the model itself takes over one batch of all rows."""
    objective, model = Labelled(rows_for(kind), 8, 0, shift=getattr(kind, "shift", 0)), model_of(kind)
    (batch,) = objective.epoch(random.Random(0))
    inputs = objective.inputs(batch, torch.Generator())
    mean = model(**inputs).loss
    torch.testing.assert_close(model(**inputs, num_items_in_batch=objective.items(inputs)).loss, mean)


def test_padding_changes_nothing_and_order_is_kept():
    model, rows = model_of(PaLMForSequenceClassification), rows_for(PaLMForSequenceClassification)
    rows = rows[::-1]
    found = torch.zeros(len(rows), 3)
    for which, out in outputs(model, rows, 3, 0):
        found[which] = out.logits
    alone = torch.cat([model(torch.tensor([row["input_ids"]])).logits for row in rows])
    torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)


def test_batches_of_similar_length():
    rows = [[0] * n for n in range(1, 201)]
    batches = by_length(rows, 8, random.Random(0))
    assert sorted(len(row) for batch in batches for row in batch) == list(range(1, 201))
    assert sum(8 * max(map(len, b)) - sum(map(len, b)) for b in batches) < 0.15 * sum(map(len, rows))
    assert [max(map(len, b)) for b in batches] != sorted(max(map(len, b)) for b in batches)
    assert by_length(rows, 8, random.Random(1)) != batches


@pytest.mark.parametrize(
    "rows, message",
    [
        ([], "no rows"),
        ([{"input_ids": [4], "labels": 0}, {"input_ids": [4]}], "row 1 has input_ids, row 0 has input_ids, labels"),
        ([{"input_ids": [], "labels": 0}], "row 0 has no input_ids"),
        ([{"input_ids": [4, 5], "labels": [1]}], "row 0 has 2 input_ids and 1 labels"),
        ([{"input_ids": [4, 5], "start_positions": 1, "end_positions": 2}], r"span \[1, 2\] in 2 input_ids"),
        ([{"input_ids": [4, 5], "start_positions": 1, "end_positions": 0}], "need start <= end"),
        ([{"input_ids": [4, 5], "start_positions": 0}], r"span \[0\]"),
    ],
    ids=str,
)
def test_rows_that_do_not_fit(rows, message):
    with pytest.raises(ValueError, match=message):
        Labelled(rows, 2, 0)


# Corpora

WRITERS = [corpora.review, corpora.relation, corpora.question, *corpora.COMPLETIONS.values()]
SMALL = {"train": 300, "dev": 20, "test": 60}


@pytest.mark.parametrize("write", WRITERS)
def test_corpora_are_the_same_again_and_test_is_unseen(write):
    parts = corpora.make(write, 3, SMALL)
    assert parts == corpora.make(write, 3, SMALL) != corpora.make(write, 4, SMALL)
    assert {part: len(parts[part]) for part in parts} == SMALL
    known = {json.dumps(e) for e in parts["train"]}
    assert not any(json.dumps(e) in known for part in ("dev", "test") for e in parts[part])


def test_corpora_keep_their_own_rules():
    for example in corpora.make(corpora.question, 0, SMALL)["test"]:
        answer.check(example)
    for example in corpora.make(corpora.relation, 0, SMALL)["test"]:
        relations.check(example)
        names = [example["text"][slice(*example[key])] for key in ("head", "tail")]
        assert all(name.isalpha() and name[0].isupper() for name in names)
    pairs = {part: set() for part in SMALL}
    for part, examples in corpora.make(corpora.summary, 0, SMALL).items():
        for example in examples:
            winner, _, loser = example["target"].split()[:3]
            pairs[part].add(frozenset((winner, loser)))
    assert pairs["train"] & pairs["dev"] and not pairs["train"] & pairs["test"]


# Scores


def test_scores_are_the_definitions():
    assert scores.f1_of_words("the Eiffel Tower", "Eiffel tower, Paris.") == pytest.approx(0.8)
    assert scores.of_answers([["The cat", "a dog"], [""]], ["dog!", ""]) == {"exact": 1.0, "f1": 1.0}
    assert scores.of_answers([["cat"]], [""]) == {"exact": 0.0, "f1": 0.0}
    assert scores.rouge_l("police killed the gunman", "police kill the gunman") == pytest.approx(0.75)  # Lin 2004, 3.1
    assert scores.rouge_l("police killed the gunman", "the gunman kill police") == pytest.approx(0.5)
    gold, found = ["a", "a", "none", "none", "b"], ["a", "none", "a", "none", "a"]
    assert scores.of_relations(gold, found, "none")["micro_f1"] == pytest.approx(2 * 1 / (3 + 3))
    assert scores.of_relations(["none"], ["none"], "none")["micro_f1"] == 0.0
    assert scores.of_classes(["a", "a", "b"], ["a", "a", "a"]) == pytest.approx({"accuracy": 2 / 3, "macro_f1": 0.4})


# Rows


def test_marks_stand_around_the_entities():
    text = "Ada, of Rome, met Ben."
    assert relations.mark(text, [0, 3], [8, 12]) == "[[ Ada ]] , of {{ Rome }} , met Ben."
    assert relations.mark(text, [18, 21], [0, 3]) == "{{ Ada }} , of Rome, met [[ Ben ]] ."


@pytest.fixture(scope="module")
def tokenizer():
    return PaLMTokenizer.train(["Ada lives in Rome and Ben in Oslo. Where does Ada live?"] * 4, 320)


@pytest.mark.parametrize("length", [20, 24, 33, 200])
def test_windows_hold_every_answer(tokenizer, length):
    context = " ".join(f"Ben lives in Oslo {i}." for i in range(30)) + " Ada lives in Rome. Ben lives in Oslo."
    example = {
        "question": "Where does Ada live?",
        "context": context,
        "answers": {"text": ["Rome"], "answer_start": [context.index("Rome")]},
    }
    found = answer.windows([example], tokenizer, length)
    assert all(len(w.ids) <= length and w.ids[0] == tokenizer.bos_token_id for w in found)
    seen = [False] * len(context)
    for w in found:
        assert len(w.ids) == w.first + len(w.places)
        for start, end in w.places:
            seen[start:end] = [True] * (end - start)
    assert all(seen) and (len(found) == 1) == (length == 200 and len(found[0].ids) < 200)
    targets = [answer.target(w, example["answers"]) for w in found]
    assert any(t != (0, 0) for t in targets)
    for w, (start, end) in zip(found, targets, strict=True):
        if start:
            assert context[w.places[start - w.first][0] : w.places[end - w.first][1]].strip() == "Rome"
        else:
            assert not any(a <= context.index("Rome") and context.index("Rome") + 4 <= b for a, b in w.places)


def test_a_context_that_just_fits_is_one_window(tokenizer):
    example = {"question": "Where?", "context": "Ada lives in Rome and Ben in Oslo.", "answers": {}}
    (whole,) = answer.windows([example], tokenizer, 200)
    assert len(answer.windows([example], tokenizer, len(whole.ids))) == 1
    assert len(answer.windows([example], tokenizer, len(whole.ids) - 1)) == 2


def test_best_span_is_the_best_of_all_spans():
    starts, ends = torch.randn(2, 12)
    first, most = 4, 3
    spans = [(i, j) for i in range(first, 12) for j in range(i, min(12, i + most))]
    i, j = max(spans, key=lambda s: starts[s[0]] + ends[s[1]])
    score, *span = answer.best_span(starts, ends, first, most)
    assert span == [i, j] and score == pytest.approx(float(starts[i] + ends[j] - starts[0] - ends[0]))


class Pointer(torch.nn.Module):
    """Points at the sub-words of " Rome" wherever they are, else at <s>."""

    device = torch.device("cpu")

    def __init__(self, piece):
        super().__init__()
        self.piece = piece

    def forward(self, input_ids, attention_mask):
        logits = torch.zeros(2, *input_ids.shape)
        logits[:, :, 0] = 1.0
        for b, row in enumerate(input_ids.tolist()):
            for k in range(len(row) - len(self.piece) + 1):
                if row[k : k + len(self.piece)] == self.piece:
                    logits[0, b, k] = logits[1, b, k + len(self.piece) - 1] = 5.0
        return QuestionAnsweringModelOutput(start_logits=logits[0], end_logits=logits[1])


def test_answers_are_characters_of_the_context(tokenizer):
    context = " ".join(f"Ben lives in Oslo {i}." for i in range(30)) + " Ada lives in Rome. Ben lives in Oslo."
    examples = [{"question": "Where?", "context": c} for c in (context, "Ben lives in Oslo.")]
    model = Pointer(tokenizer(" Rome", add_special_tokens=False)["input_ids"])
    for length in (24, 400):
        found, none = answer.answers(model, tokenizer, examples, length, may_be_none=True)
        assert found["text"] == "Rome" == context[found["start"] : found["end"]] and found["score"] == 8.0
        assert none["text"] == "" and none["score"] == 0.0
        assert answer.answers(model, tokenizer, examples, length)[1]["text"] != ""


def test_completions_learn_the_target_alone(tokenizer):
    examples = [{"prompt": "Ada lives in", "target": "Rome"}]
    (row,) = complete.rows_of(examples, tokenizer, 64)
    assert tokenizer.decode(row["input_ids"]) == "Ada lives in Rome</s>"
    learnt = [i for i in row["labels"] if i != -100]
    assert tokenizer.decode(learnt) == " Rome</s>" and row["labels"][-len(learnt) :] == learnt
    cut = complete.rows_of(examples, tokenizer, len(learnt) + 2)[0]
    assert cut["input_ids"] == row["input_ids"][-len(learnt) - 2 :] and cut["labels"][:2] == [-100, -100]
    with pytest.raises(ValueError, match="the target has .* raise --length"):
        complete.rows_of(examples, tokenizer, len(learnt))


def test_completions_of_a_left_padded_batch_are_those_alone(tokenizer):
    torch.manual_seed(0)
    model = PaLMForCausalLM(PaLMConfig.preset("palm-tiny", vocab_size=len(tokenizer)))
    examples = [{"prompt": p} for p in ("Where does Ada live?", "Ada", "Ben lives in Oslo and")]
    together = complete.completions(model, tokenizer, examples, 64, 8)
    assert together == [complete.completions(model, tokenizer, [e], 64, 8)[0] for e in examples]


# Files

BAD = [
    (classify, "{", r":1: no JSON \(.* at column"),
    (classify, "[1]", r":1: '\[1\]' is no object"),
    (classify, "", "the file is empty"),
    (classify, '{"text": "a", "label": "x"}\n{"text": "b"}', r":2: no 'label' in it, only 'text'"),
    (classify, '{"text": " ", "label": "x"}', r":1: 'text' is ' ', need a text"),
    (classify, '{"text": "a", "label": 1}', r":1: 'label' is 1, need a text"),
    (classify, '{"text": "a", "label": "x"}\n' * 9, "1 different texts .* need at least 3"),
    (
        relations,
        '{"text": "ab c", "head": [0, 9], "tail": [3, 4], "label": "x"}',
        r"'head' is \[0, 9\], need .* within 4",
    ),
    (relations, '{"text": "ab c", "head": [0, 2], "tail": [1, 3], "label": "x"}', "overlap"),
    (relations, '{"text": "ab c", "head": [0, 2], "label": "x"}', "'tail' is None"),
    (answer, '{"question": "q", "context": "ab"}', "'answers' is None"),
    (
        answer,
        '{"question": "q", "context": "ab", "answers": {"text": ["a"], "answer_start": []}}',
        "two lists of one length",
    ),
    (
        answer,
        '{"question": "q", "context": "ab", "answers": {"text": ["a"], "answer_start": [1]}}',
        "not stand at 1, .* 'b'",
    ),
    (complete, '{"prompt": "a", "target": ""}', "'target' is '', need a text"),
]


@pytest.mark.parametrize("script, text, message", BAD, ids=range(len(BAD)))
def test_bad_files_end_with_one_line(script, text, message, tmp_path, capsys):
    path = tmp_path / "data.jsonl"
    path.write_text(text)
    assert script.main([*TINY, "--data", str(path), "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}") and error.count("\n") == 1
    assert re.search(message, error), error


def test_python_in_development_mode_shows_where_an_error_is_from(tmp_path, monkeypatch):
    flags = {name: getattr(sys.flags, name) for name in dir(sys.flags) if name[0] != "_"}
    monkeypatch.setattr(sys, "flags", SimpleNamespace(**flags | {"dev_mode": True}))
    with pytest.raises(ValueError, match="nowhere"):
        classify.main([*TINY, "--data", "nowhere.jsonl", "--out", str(tmp_path / "out")])


def test_bad_labels_rows_and_folders(tmp_path, capsys):
    def fails(script, lines, *more):
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert script.main([*TINY, "--data", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "out"), *more]) == 1
        return capsys.readouterr().err

    assert "has the label 'x' alone" in fails(classify, [{"text": str(i), "label": "x"} for i in range(20)])
    assert "is not in the training part" in fails(classify, [{"text": str(i), "label": str(i)} for i in range(20)])
    marked = [{"text": f"a b {i}", "head": [0, 1], "tail": [2, 3], "label": "xy"[i % 2]} for i in range(20)]
    assert "a row holds 4" in fails(relations, marked, "--length", "4")
    assert "is 'x' (--none)" in fails(relations, [{**e, "label": "x"} for e in marked], "--none", "x")
    assert "no saved model" in fails(classify, marked, "--model", str(tmp_path))
    assert "no saved model" in fails(classify, marked, "--resume")
    assert classify.main([*TINY, "--data", str(tmp_path / "none"), "--out", str(tmp_path)]) == 1
    assert "no such file" in capsys.readouterr().err


# Whole runs on a small scale


def write(path, examples):
    path.write_text("".join(json.dumps(e) + "\n" for e in examples))
    return ["--data", str(path)]


@pytest.fixture
def run(tmp_path, capsys):
    def run(script, writer, *more, n=120):
        data = write(tmp_path / "data.jsonl", corpora.make(writer, 0, {"train": n})["train"])
        assert script.main([*TINY, *data, "--out", str(tmp_path / "out"), *more]) == 0
        return tmp_path / "out", capsys.readouterr().out

    return run


def test_classify_learns_resumes_and_is_a_pipeline(run):
    out, said = run(classify, corpora.review, "--epochs", "1", "--schedule", "constant")
    out, said = run(classify, corpora.review, "--epochs", "4", "--schedule", "constant", "--resume")
    assert "epoch   4" in said and "epoch   1" not in said and "always '" in said
    kept = json.loads((out / "scores.json").read_text())
    assert kept["test"]["accuracy"] > kept["always 'negative'"]["accuracy"], (
        said
    )  # facts are told from verdicts at once
    found = pipeline("text-classification", model=str(out / "best"))(["The room was good."])
    assert found[0]["label"] in ("positive", "negative", "neutral")
    out, said = run(classify, corpora.review, "--model", str(out / "best"), "--out", str(out / "again"))
    assert "model: " in said


def test_relations_run(run):
    out, said = run(relations, corpora.relation, "--length", "128")
    assert "micro_f1" in said and set(json.loads((out / "scores.json").read_text())["test"]) == {"micro_f1", "accuracy"}


def test_answer_runs_in_windows(run):
    _, said = run(answer, corpora.question, "--length", "40", n=60)
    assert "first sentence" in said and "exact" in said


@pytest.mark.parametrize("name", corpora.COMPLETIONS)
def test_complete_runs_and_is_a_pipeline(name, run):
    out, said = run(complete, corpora.COMPLETIONS[name], "--length", "200", n=60)
    assert "rouge_l" in said and "nearest in train" in said and "-->" in said
    model = PaLMForCausalLM.from_pretrained(out / "best")
    tokenizer = PaLMTokenizer.from_pretrained(out / "best")
    example = corpora.make(corpora.COMPLETIONS[name], 0, {"train": 1})["train"][0]
    ours = complete.completions(model, tokenizer, [example], 200, 8)[0]
    writer = pipeline("text-generation", model=str(out / "best"))
    (theirs,) = writer(example["prompt"], max_new_tokens=8, do_sample=False, return_full_text=False)
    assert theirs["generated_text"].strip() == ours


def test_toy_corpora_are_the_default(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(corpora.make, "__defaults__", (0, SMALL))
    assert classify.main([*TINY, "--out", str(tmp_path)]) == 0
    assert "data: toy corpus; 300 train, 20 dev, 60 test" in capsys.readouterr().out
