"""The pre-training example from end to end, and its trunk as the start of the named-entity example."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))  # examples/ is no part of the package

from examples.ner import train as ner
from examples.pretrain import pretrain

TINY = [
    "--vocab",
    "300",
    "--hidden",
    "32",
    "--layers",
    "1",
    "--heads",
    "1",
    "--length",
    "32",
    "--batch",
    "8",
    "--threads",
    "1",
]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_text(
        "".join(f"The {w} sat on the {v}.\n" for w in ("cat", "dog", "ox") for v in ("mat", "hat", "log")) * 40
    )
    return str(path)


@pytest.mark.parametrize("objective, figure", [("causal", "nll"), ("hard", "masked_nll"), ("weak", "masked_nll")])
def test_run_resume_and_fine_tune(objective, figure, text, tmp_path, capsys):
    args = [*TINY, text, "--objective", objective, "--schedule", "constant", "--out", str(tmp_path / "a")]
    assert pretrain.main([*args, "--epochs", "1"]) == 0
    assert pretrain.main([*args, "--epochs", "2", "--resume"]) == 0
    out = capsys.readouterr().out
    assert f"{figure} " in out and "best: epoch 2" in out and ("-->" in out) == (objective == "causal")
    lines = [json.loads(line) for line in (tmp_path / "a/metrics.jsonl").read_text().splitlines()]
    epochs = [line for line in lines if "epoch" in line]
    assert [e["epoch"] for e in epochs] == [1, 2] and epochs[1][figure] < epochs[0][figure]
    assert (
        ner.main(["--model", str(tmp_path / "a/best"), "--epochs", "1", "--out", str(tmp_path / "b"), "--threads", "1"])
        == 0
    )
    assert "model: " in capsys.readouterr().out


def test_what_cannot_be_read(text, tmp_path, capsys):
    with pytest.raises(SystemExit, match="nowhere"):
        pretrain.main([*TINY, str(tmp_path / "nowhere")])
    assert pretrain.main([*TINY, text, "--resume", "--out", str(tmp_path)]) == 1
    assert "no saved model" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="error: Settings: epochs is 0"):
        pretrain.main([*TINY, text, "--epochs", "0"])
    (tmp_path / "short").write_text("short")
    assert pretrain.main([*TINY, str(tmp_path / "short"), "--out", str(tmp_path)]) == 1
    assert "need at least 2: give more text" in capsys.readouterr().err


def test_the_built_in_text_is_prose():
    documents = pretrain.texts([])
    assert sum(map(len, documents)) > 300_000 and any("Python" in d for d in documents)
