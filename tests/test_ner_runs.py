"""examples/ner from end to end on a small scale: train, resume, adapters, few-shot, corpora by name, predict."""

import hashlib
import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from examples.ner import data, download, few_shot, predict, synthetic, train  # noqa: E402
from palm_kernels.models import PaLMForTokenClassification  # noqa: E402

SIZES = {
    "hidden": 32,
    "intermediate": 64,
    "layers": 1,
    "heads": 2,
    "head-dim": 16,
    "vocab": 400,
    "batch": 8,
    "threads": 1,
}
TINY = [f"--{name}={value}" for name, value in SIZES.items()]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder with a small synthetic data set in IOB1."""
    folder = tmp_path_factory.mktemp("small")
    corpus = synthetic.make(sizes={"train": 160, "dev": 30, "test": 30})
    for split in ("train", "dev", "test"):
        text = "".join(
            "".join(
                f"{w} {'I' + t[1:] if t[0] == 'B' and b[1:] != t[1:] else t}\n"
                for w, t, b in zip(s.words, s.tags, ["O", *s.tags], strict=False)
            )
            + "\n"
            for s in getattr(corpus, split)
        )
        (folder / f"{split}.txt").write_text(text)
    return folder


def run(folder, out, *more):
    return train.main([*TINY, "--data", str(folder), "--out", str(out), "--epochs", "2", *more])


def test_run_predict_and_continue(small, tmp_path, capsys):
    assert run(small, tmp_path / "a") == 0
    text = capsys.readouterr().out
    assert "IOB1, converted to IOB2" in text and "micro avg" in text and "expected: " in text and "\x1b" not in text
    metrics = json.loads((tmp_path / "a/metrics.json").read_text())
    assert len(metrics["history"]) == 2 and metrics["test"]["micro avg"]["support"] > 30
    names = {p.name for p in (tmp_path / "a").iterdir() if not p.name.startswith(".")}
    assert {"last", "metrics.json", "metrics.jsonl", "model", "learning_curve.png", "confusion_matrix.png"} <= names
    assert run(small, tmp_path / "b") == 0  # the same seed gives the same run
    again = json.loads((tmp_path / "b/metrics.json").read_text())
    assert [row["loss"] for row in again["history"]] == [row["loss"] for row in metrics["history"]]
    capsys.readouterr()

    model = PaLMForTokenClassification.from_pretrained(tmp_path / "a/model")
    assert model.config.id2label[1] == "B-LOC" and model.config.attention == "bidirectional"
    assert predict.main([str(tmp_path / "a/model"), "Ada met Bo (in Rome).", ""]) == 0
    first, second, *_ = capsys.readouterr().out.split("\n")
    assert "".join(c for c in first if c not in "[] ").startswith("Ada") and second == ""
    assert predict.main([str(tmp_path / "nowhere"), "Ada"]) == 1
    assert "no saved model" in capsys.readouterr().err
    assert predict.main([str(tmp_path / "a/model"), "--file", str(tmp_path / "nowhere")]) == 1
    assert "nowhere" in capsys.readouterr().err
    hostile = [
        "x" * 3000,
        " " * 50,
        "a\0b",
        "\u202eEda in Rome",
        "\U0001f468\u200d\U0001f469\u200d\U0001f467 e\u0301",
        "",
        "Bo " * 2000,
    ]
    (tmp_path / "lines").write_bytes("\n".join(hostile).encode() + b"\n\xff\xfe in Rome\r\n")
    assert predict.main([str(tmp_path / "a/model"), "--file", str(tmp_path / "lines"), "--json"]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [a["text"] for a in answers] == [*hostile, "\ufffd\ufffd in Rome"]
    for answer in answers:
        for e in answer["entities"]:
            assert answer["text"][e["start"] : e["end"]] == e["text"] and e["type"] in ("LOC", "MISC", "ORG", "PER")

    assert run(small, tmp_path / "c", "--model", str(tmp_path / "a/model"), "--attention", "causal") == 0
    continued = json.loads((tmp_path / "c/metrics.json").read_text())
    assert continued["history"][0]["loss"] < metrics["history"][0]["loss"]
    assert run(small, tmp_path / "c", "--model", str(tmp_path / "a/model"), "--max-length", "9999") == 1
    assert "the model holds 256 tokens" in capsys.readouterr().err


def test_other_labels_get_a_new_classifier(small, tmp_path):
    """As many labels of other names: the saved classifier's rows mean something else."""
    assert run(small, tmp_path / "a") == 0
    saved = PaLMForTokenClassification.from_pretrained(tmp_path / "a/model")
    args = train.parser("train", "").parse_args(["--model", str(tmp_path / "a/model")])
    corpus = train.load(small)
    assert torch.equal(train.build(args, corpus)[0].score.weight, saved.score.weight)
    corpus.types = [kind.lower() for kind in corpus.types]
    model, _ = train.build(args, corpus)
    assert not torch.equal(model.score.weight, saved.score.weight) and model.config.id2label[1] == "B-loc"
    assert torch.equal(model.model.norm.weight, saved.model.norm.weight)


def test_resumed_run_is_the_whole_run(small, tmp_path, capsys):
    args = ("--schedule", "constant", "--warmup", "0")
    assert run(small, tmp_path / "a", *args, "--epochs", "2") == run(small, tmp_path / "b", *args, "--epochs", "1") == 0
    assert run(small, tmp_path / "b", *args, "--epochs", "2", "--resume") == 0
    a, b = (json.loads((tmp_path / n / "metrics.json").read_text()) for n in "ab")
    assert [{**row, "seconds": 0} for row in a["history"]] == [{**row, "seconds": 0} for row in b["history"]]
    assert a["test"] == b["test"]
    capsys.readouterr()
    assert run(small, tmp_path / "none", "--resume") == 1
    assert "no saved model (no config.json in it)" in capsys.readouterr().err


def test_pipeline(small, tmp_path):
    from transformers import pipeline

    assert run(small, tmp_path, "--schedule", "epoch-decay", "--epochs", "3", "--max-length", "40") == 0
    tagger = pipeline("ner", model=str(tmp_path / "model"), aggregation_strategy="first")
    text = "Captain and crew were rescued near Port Halden."
    for entity in tagger(text):
        assert entity["entity_group"] in ("LOC", "MISC", "ORG", "PER")
        assert text[entity["start"] : entity["end"]].strip() == entity["word"].strip()


def test_stops_at_the_first_bad_loss(small, tmp_path, capsys):
    assert run(small, tmp_path, "--lr", "1e34", "--warmup", "0") == 1
    message = capsys.readouterr().err
    assert "epoch 1, step" in message and "the loss is nan at learning rate" in message and "lower --lr" in message


def test_adapters_and_a_frozen_trunk(small, tmp_path, capsys):
    """--tune lora and head leave the trunk's weights; what is saved is an ordinary model, adapters merged."""
    assert run(small, tmp_path / "base") == 0
    base = PaLMForTokenClassification.from_pretrained(tmp_path / "base/model")
    for tune in ("lora", "head"):
        args = ("--model", str(tmp_path / "base/model"), "--tune", tune, "--lr", "1e-2")
        assert run(small, tmp_path / tune, *args) == 0
        saved, info = PaLMForTokenClassification.from_pretrained(tmp_path / tune / "model", output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        same = {n: torch.equal(p, dict(base.named_parameters())[n]) for n, p in saved.named_parameters()}
        assert not same["score.weight"] and same["model.embed_tokens.weight"] and same["model.norm.weight"]
        assert same["model.layers.0.in_proj.weight"] == (tune == "head")
    capsys.readouterr()
    assert run(small, tmp_path / "x", "--tune", "lora") == 1
    assert "--tune lora leaves the trunk as it is: name a trained one with --model" in capsys.readouterr().err


def test_adapters_resume(small, tmp_path):
    assert run(small, tmp_path / "base", "--epochs", "1") == 0
    args = ("--model", str(tmp_path / "base/model"), "--tune", "lora", "--schedule", "constant", "--warmup", "0")
    assert run(small, tmp_path / "a", *args) == run(small, tmp_path / "b", *args, "--epochs", "1") == 0
    assert run(small, tmp_path / "b", *args, "--resume") == 0
    a, b = (json.loads((tmp_path / n / "metrics.json").read_text()) for n in "ab")
    assert [{**row, "seconds": 0} for row in a["history"]] == [{**row, "seconds": 0} for row in b["history"]]
    assert a["test"] == b["test"]


def test_few_shot(small, tmp_path, capsys):
    args = [*TINY, "--data", str(small), "--out", str(tmp_path), "--epochs", "2", "--shots", "2", "--draws", "2"]
    assert few_shot.main(args) == 0
    told = json.loads((tmp_path / "few_shot.json").read_text())
    found = [d["test"]["micro avg"]["f1-score"] for d in told["draws"]]
    assert told["mean"] == pytest.approx(sum(found) / 2) and len(found) == 2
    assert "2 sentences a type, 2 draws: test micro-F1" in capsys.readouterr().out
    assert few_shot.main([*args, "--shots", "999"]) == 1
    assert "only" in (message := capsys.readouterr().err) and "sentences of train hold LOC: ask for fewer" in message


def test_shots_hold_every_type():
    corpus = synthetic.make(sizes={"train": 200, "dev": 60, "test": 5})
    draws = [few_shot.drawn(corpus, 3, 0, draw) for draw in (0, 1)]
    for few in draws:
        for part, whole in ((few.train, corpus.train), (few.dev, corpus.dev)):
            holding = [sum(any(t[2:] == kind for t in s.tags) for s in part) for kind in corpus.types]
            assert min(holding) >= 3 and len(part) <= 3 * len(corpus.types)
            assert all(any(s is w for w in whole) for s in part)
    assert [s.where for s in draws[0].train] != [s.where for s in draws[1].train]
    assert few_shot.drawn(corpus, 3, 0, 0).train == draws[0].train


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A corpus by name whose place is a folder on this disk, and an empty cache."""
    text = b"Ada B-PER\nmet O\n\nRome B-LOC\n\n" * 10
    (tmp_path / "net").mkdir()
    (tmp_path / "net/a.txt").write_bytes(text)
    files = (("all.conll", "a.txt", hashlib.sha256(text).hexdigest()),)
    monkeypatch.setitem(
        download.DATASETS, "wikigold", download.Dataset("free", f"{(tmp_path / 'net').as_uri()}/", files)
    )
    monkeypatch.setenv("PALM_KERNELS_DATA", str(tmp_path / "cache"))
    return tmp_path


def test_a_corpus_by_name(elsewhere, capsys):
    path = download.dataset("wikigold")
    assert len(data.load(path).train) == 16 and "a.txt (free)" in capsys.readouterr().err
    (elsewhere / "net/a.txt").unlink()
    assert download.dataset("wikigold") == path and not capsys.readouterr().err  # from the cache
    path.write_bytes(b"other")
    with pytest.raises(data.DataError, match=r"a\.txt.*put all.conll into .*wikigold yourself.*--data"):
        download.dataset("wikigold")


def test_what_is_downloaded_is_checked(elsewhere, capsys):
    (elsewhere / "net/a.txt").write_bytes(b"Ada B-PER\n")
    assert train.main(["--dataset", "wikigold", "--out", str(elsewhere / "out")]) == 1
    assert "invalid hash value" in capsys.readouterr().err
    assert not list((elsewhere / "cache/wikigold").iterdir())  # neither the file nor a part of it


def test_corpora_are_pinned():
    for name, (licence, place, files) in download.DATASETS.items():
        assert licence and place.startswith("https://") and place.endswith("/"), name
        assert all(len(digest) == 64 for _, _, digest in files)
