"""The training loop: schedules, exact accumulation, bit-exact resumption after a kill, folders that are whole, bad input."""

import json
import os
import random
import signal
import subprocess
import sys
import textwrap

import pytest
import torch

from palm_kernels.models import PaLMConfig, PaLMForCausalLM, PaLMForMaskedLM, PaLMTokenizer
from palm_kernels.train import (
    CheckpointError,
    Language,
    MaskedLanguage,
    Settings,
    checkpoints,
    corrupt,
    fit,
    learning_rate,
    load_model,
    replace_folder,
)

RATES = {"lr": 1e-3, "final_lr": 1e-5, "epoch": 0.0}


def ids(n=3000, vocab=60, seed=0):
    """A text whose next token is mostly the last one plus one."""
    g = torch.Generator().manual_seed(seed)
    jumps = torch.where(torch.rand(n, generator=g) < 0.1, torch.randint(1, 9, (n,), generator=g), 1)
    return 4 + jumps.cumsum(0) % (vocab - 4)


def model(kind=PaLMForCausalLM, seed=0, **fields):
    torch.manual_seed(seed)
    return kind(PaLMConfig.preset("palm-tiny", vocab_size=60, num_hidden_layers=1, **fields))


def run(out, resume=False, objective=None, **settings):
    settings = {"epochs": 3, "lr": 1e-2, "final_lr": 1e-3, **settings}
    m = model(residual_dropout=0.1)
    history = fit(
        m, objective or Language(ids(), 20, 8), Settings(**settings), out, resume=resume, say=lambda line: None
    )
    return m, history


def test_learning_rates():
    rate = lambda kind, step, **k: learning_rate(kind, step, 100, **{**RATES, "warmup": 0.1, **k})  # noqa: E731
    assert [rate("constant", s) for s in (0, 4, 9, 10, 99)] == pytest.approx([1e-4, 5e-4, 1e-3, 1e-3, 1e-3])
    assert rate("cosine", 0, warmup=0.0) == pytest.approx(1e-3)
    assert rate("cosine", 50) == pytest.approx((1e-3 + 1e-5) / 2)
    assert rate("linear", 50) == pytest.approx((1e-3 + 1e-5) / 2)
    assert rate("inverse-sqrt", 39) == pytest.approx(1e-3 / 2)
    assert rate("inverse-sqrt", 9) == pytest.approx(1e-3)
    assert [rate("epoch-decay", 50, epoch=e) for e in (0, 0.5, 1)] == pytest.approx([1e-3, 1e-4, 1e-5])
    with pytest.raises(ValueError, match="'step' is none of cosine"):
        rate("step", 0)


def test_a_run_learns_and_keeps_its_best(tmp_path):
    tokenizer = PaLMTokenizer.train(["a b c"], 300)
    lines = []
    m = model()
    history = fit(
        m, Language(ids(), 20, 8), Settings(epochs=3, lr=1e-2), tmp_path, tokenizer=tokenizer, say=lines.append
    )
    assert [r["epoch"] for r in history] == [1, 2, 3] and len(lines) == 3
    assert history[-1]["loss"] < history[0]["loss"] - 0.5 and history[-1]["nll"] < 2.0
    best = min(history, key=lambda r: r["nll"])
    found = PaLMForCausalLM.from_pretrained(tmp_path / "best")
    assert Language(ids(), 20, 8).evaluate(found)["nll"] == pytest.approx(best["nll"], rel=1e-5)
    assert len(PaLMTokenizer.from_pretrained(tmp_path / "best")) == len(tokenizer)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r for r in records if "epoch" in r] == history
    assert (tmp_path / "learning_curve.png").stat().st_size > 5000


def test_accumulated_batches_are_one_batch(tmp_path):
    """Rows of different label counts too: the sum is divided by the labels of the whole step."""

    class Uneven(Language):
        def epoch(self, rng):
            return [self.train[i : i + self.batch] for i in range(0, 8, self.batch)]

        def inputs(self, batch, generator):
            labels = batch.clone()
            labels[batch % 5 == 0] = -100
            return {"input_ids": batch, "labels": labels}

    weights = []
    for batch, accumulate in ((8, 1), (2, 4)):
        m = model()
        fit(m, Uneven(ids(), 20, batch), Settings(epochs=1, accumulate=accumulate), tmp_path / str(batch), say=len)
        weights.append(torch.cat([p.flatten() for p in m.parameters()]))
    start = torch.cat([p.flatten() for p in model().parameters()])
    assert (weights[0] - start).abs().max() > 1e-6
    torch.testing.assert_close(weights[1] - start, weights[0] - start, rtol=1e-2, atol=1e-7)


@pytest.mark.parametrize("settings", [{}, {"save_every": 3}, {"optimizer": "adafactor", "accumulate": 3}], ids=str)
def test_resumed_is_uninterrupted_bit_for_bit(settings, tmp_path, monkeypatch):
    whole, history = run(tmp_path / "whole", **settings)

    class Stop(Exception):
        pass

    steps, original = [], torch.nn.utils.clip_grad_norm_

    def stopping(*args):
        steps.append(1)
        if len(steps) == 7 if settings.get("accumulate") else len(steps) == 23:
            raise Stop
        return original(*args)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", stopping)
    with pytest.raises(Stop):
        run(tmp_path / "cut", **settings)
    resumed, again = run(tmp_path / "cut", resume=True, **settings)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    drop = lambda h: [{k: v for k, v in r.items() if k != "seconds"} for r in h]  # noqa: E731
    assert drop(again) == drop(history)
    lines = [(tmp_path / n / "metrics.jsonl").read_text().splitlines() for n in ("whole", "cut")]
    assert drop(map(json.loads, lines[0])) == drop(map(json.loads, lines[1]))


def test_killed_while_saving(tmp_path):
    """kill -9 in the middle of a write: the run goes on from the state before it, to the same bits."""
    script = textwrap.dedent(f"""
        import os, signal, sys
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        import test_train
        from palm_kernels.train import checkpoints
        save, calls = checkpoints.save_weights, []
        def killed(*args):
            save(*args)
            calls.append(args)
            if len(calls) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
        checkpoints.save_weights = killed
        test_train.run({str(tmp_path / "cut")!r})
    """)
    done = subprocess.run([sys.executable, "-c", script], timeout=300)
    assert done.returncode == -signal.SIGKILL
    resumed, _ = run(tmp_path / "cut", resume=True)
    whole, _ = run(tmp_path / "whole")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    leftovers = {p.name for p in (tmp_path / "cut").iterdir() if p.name.startswith(".")}
    assert len(leftovers) == 2  # what `last` and `best` point at


def test_a_folder_is_the_old_one_or_the_new_one(tmp_path):
    folder = tmp_path / "model"
    for text in ("one", "two"):
        replace_folder(folder, lambda path, text=text: (path / "a").write_text(text))
        assert (folder / "a").read_text() == text

    def full(path):
        (path / "a").write_text("thr")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError):
        replace_folder(folder, full)
    assert (folder / "a").read_text() == "two"
    replace_folder(folder, lambda path: (path / "a").write_text("four"))
    assert (folder / "a").read_text() == "four" and sorted(p.name for p in tmp_path.iterdir()) == [".model.2", "model"]
    (tmp_path / "theirs").mkdir()
    with pytest.raises(CheckpointError, match="somebody else's is in the way"):
        replace_folder(tmp_path / "theirs", lambda path: None)


def test_early_stopping_and_limits(tmp_path):
    class Worse(Language):
        figure = 0.0

        def evaluate(self, m):
            self.figure += 1.0
            return {"nll": self.figure}

    _, history = run(tmp_path / "a", objective=Worse(ids(), 20, 8), epochs=9, patience=2)
    assert len(history) == 3
    _, history = run(tmp_path / "b", steps=5)
    assert history[-1]["step"] == 5
    assert run(tmp_path / "b", steps=5, resume=True)[1] == history  # nothing is left to do
    _, history = run(tmp_path / "c", minutes=1e-9)
    assert history[-1]["step"] == 1


def test_a_run_cut_inside_an_epoch_goes_on_there(tmp_path):
    """The rest of the epoch is not lost, and no step is taken twice."""
    _, history = run(tmp_path / "a", steps=5, schedule="constant", warmup=0.0)
    per_epoch = len(Language(ids(), 20, 8).epoch(random.Random(0)))
    assert history[-1]["epoch"] == round(5 / per_epoch, 2)
    resumed, _ = run(tmp_path / "a", steps=None, schedule="constant", warmup=0.0, resume=True)
    whole, _ = run(tmp_path / "b", schedule="constant", warmup=0.0)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_the_learning_rate_falls_with_the_time_that_is_left(tmp_path, monkeypatch):
    """60 minutes, of which each step takes 10: the last of 7 steps is at the schedule's end, though the epochs ask for more."""
    from palm_kernels.train import loop

    clock = [0.0]
    monkeypatch.setattr(loop.time, "perf_counter", lambda: clock[0])
    original = torch.nn.utils.clip_grad_norm_

    def slow(*args):
        clock[0] += 600.0
        return original(*args)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", slow)
    run(tmp_path, minutes=60, schedule="linear", warmup=0.0)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rates = [r["lr"] for r in records if "lr" in r]
    assert rates == pytest.approx([1e-2 - 9e-3 * i / 6 for i in range(6)] + [1e-3], rel=0.2)


def test_bf16_and_what_cannot_be(tmp_path):
    m, history = run(tmp_path, precision="bf16", epochs=1)
    assert history[0]["loss"] < 4.0 and next(m.parameters()).dtype == torch.float32
    with pytest.raises(FloatingPointError, match="the loss is nan at learning rate"):
        with torch.no_grad():
            m.model.norm.weight.fill_(torch.nan)
        fit(m, Language(ids(), 20, 8), Settings(), tmp_path / "n", say=len)
    for settings, message in (
        ({"epochs": 0}, "epochs is 0, need at least 1"),
        ({"schedule": "step"}, "schedule is 'step', need one of"),
        ({"lr": -1.0}, "must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            Settings(**settings)


def test_bad_folders(tmp_path):
    with pytest.raises(CheckpointError, match=r"no state.json in it: nothing to go on from"):
        run(tmp_path / "none", resume=True)
    run(tmp_path / "a", epochs=1)
    with pytest.raises(CheckpointError, match="was begun with another lr: 0.01"):
        run(tmp_path / "a", resume=True, lr=2e-2)
    weights = tmp_path / "a" / "last" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="not a run of this model"):
        run(tmp_path / "a", resume=True)
    with pytest.raises(CheckpointError, match="no saved model"):
        load_model(PaLMForCausalLM, PaLMTokenizer, tmp_path)
    small = PaLMTokenizer.train(["a b"], 280)
    checkpoints.save_model(tmp_path / "pair", model(), small)
    with pytest.raises(CheckpointError, match=r"the tokenizer has \d+ tokens, the model 60: not a pair"):
        load_model(PaLMForCausalLM, PaLMTokenizer, tmp_path / "pair")
    (tmp_path / "pair" / "model.safetensors").write_bytes(b"\0" * 40)
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_model(PaLMForCausalLM, PaLMTokenizer, tmp_path / "pair")


@pytest.mark.parametrize("preset, shares", [("hard", (0.15, 0.0)), ("weak", (0.08, 0.15))])
def test_presets_of_masked_prediction(preset, shares):
    tokens = torch.randint(4, 60, (200, 100))
    maskable = torch.rand(tokens.shape) < 0.8
    found = corrupt(tokens, maskable, preset, 60, torch.Generator().manual_seed(1))
    strength, source, labels = found["strength"], found["source_ids"], found["labels"]
    predicted = labels != -100
    assert not predicted[~maskable].any() and not strength[~maskable].any()
    assert torch.equal(labels[predicted], tokens[predicted])
    assert predicted[maskable].float().mean() == pytest.approx(shares[0], abs=0.01)
    mixed = (strength > 0) & ~predicted
    assert mixed[maskable].float().mean() == pytest.approx(shares[1], abs=0.01)
    assert ((strength[mixed] > 0) & (strength[mixed] < 1)).all() and (source[mixed] >= 4).all()
    if preset == "hard":
        whole, left = strength == 1, predicted & (strength == 0)
        assert left.sum() / predicted.sum() == pytest.approx(0.1, abs=0.02)
        assert (source[whole] >= 0).sum() / predicted.sum() == pytest.approx(0.1, abs=0.02)
    else:
        assert (strength[predicted] == 1).all() and (source[predicted] == -1).all()


@pytest.mark.parametrize("preset", ["hard", "weak"])
def test_masked_prediction_learns(preset, tmp_path):
    m = model(PaLMForMaskedLM, attention="bidirectional")
    objective = MaskedLanguage(ids(), 20, 8, 60, preset)
    history = fit(m, objective, Settings(epochs=16, lr=2e-2, final_lr=1e-3), tmp_path, say=print)
    assert history[-1]["masked_nll"] < history[0]["masked_nll"] - 0.5
    assert objective.evaluate(m) == objective.evaluate(m)


def test_what_text_must_be():
    with pytest.raises(ValueError, match="15 tokens make 1 rows of 10"):
        Language(ids(15), 10, 2)
    with pytest.raises(ValueError, match="preset is 'soft', need one of hard, weak"):
        MaskedLanguage(ids(), 10, 2, 60, "soft")
