"""The loop: epochs of steps of micro-batches, a held-out figure, the best and the last model, and a way to go on.

A run is a function of its data, its Settings and nothing else: the order of an epoch's batches comes from (seed, epoch), what a step
draws (dropout, masks) from (seed, step). So a run that was killed and resumed ends with the same bits as one that was not; but with
Settings.minutes the clock ends the run and moves the learning rate.
"""

import dataclasses
import hashlib
import math
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from .checkpoints import CheckpointError, load_run, replace_folder, save_model, save_run
from .objectives import Objective
from .records import Records, learning_curve
from .schedules import learning_rate
from .settings import Settings


def _seed(*parts) -> int:
    """A number that each tuple of parts has for itself."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1


def make_optimizer(settings: Settings, model) -> torch.optim.Optimizer:
    """AdamW or Adafactor (relative steps off: the schedule says the rate), weight decay on matrices alone."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    kind = torch.optim.AdamW if settings.optimizer == "adamw" else torch.optim.Adafactor
    return kind([g for g in groups if g["params"]], lr=settings.lr)


class Run:
    """One call of `fit`: where it stands, and the parts it works with."""

    def __init__(
        self, model, objective: Objective, settings: Settings, out: Path, tokenizer, resume: bool, best: str, say
    ):
        self.model, self.objective, self.settings, self.out = model, objective, settings, Path(out)
        self.tokenizer, self.best, self.say = tokenizer, Path(out) / best, say
        self.optimizer = make_optimizer(settings, model)
        self.state = {
            "step": 0,
            "epoch": 0,
            "in_epoch": 0,
            "losses": 0.0,
            "items": 0,
            "best": None,
            "since": 0,
            "records": 0,
        }
        self.state |= {"seconds": 0.0, "tokens": 0, "settings": dataclasses.asdict(settings), "history": []}
        if resume:
            found = load_run(self.out / "last", model, self.optimizer)
            ended = ("epochs", "steps", "minutes", "patience", "save_every")  # these may be told anew
            other = [k for k, v in found["settings"].items() if k not in ended and v != self.state["settings"].get(k)]
            if other:
                raise CheckpointError(
                    f"{self.out / 'last'}: was begun with another {other[0]}: {found['settings'][other[0]]!r}"
                )
            self.state |= {**found, "settings": self.state["settings"]}
        self.records = Records(self.out, self.state["records"])
        self.began, self.before = time.perf_counter(), self.state["seconds"]

    def seconds(self) -> float:
        return self.before + time.perf_counter() - self.began

    def save(self) -> None:
        self.state |= {"records": self.records.count, "seconds": self.seconds()}
        save_run(self.out / "last", self.model, self.tokenizer, self.optimizer, self.state)

    def step(self, batches: Sequence, steps: int, epoch_share: float) -> float:
        """One step of the optimiser; the mean loss of its labels."""
        s, state, model = self.settings, self.state, self.model
        torch.manual_seed(_seed(s.seed, "step", state["step"]))
        generator = torch.Generator().manual_seed(_seed(s.seed, "draw", state["step"]))
        device = next(model.parameters()).device
        inputs = [{k: v.to(device) for k, v in self.objective.inputs(b, generator).items()} for b in batches]
        items, total = sum(self.objective.items(i) for i in inputs), 0.0
        for given in inputs:
            with torch.autocast(device.type, torch.bfloat16, enabled=s.precision == "bf16"):
                loss = model(**given, num_items_in_batch=max(1, items)).loss
            loss.backward()
            total += float(loss.detach())
            state["tokens"] += given["input_ids"].numel()
        lr = learning_rate(
            s.schedule,
            self.schedule_step(steps),
            steps,
            lr=s.lr,
            final_lr=s.final_lr,
            warmup=s.warmup,
            epoch=epoch_share,
        )
        if not math.isfinite(total):
            raise FloatingPointError(
                f"epoch {state['epoch'] + 1}, step {state['step'] + 1}: the loss is {total} at learning rate {lr:.2e}: lower --lr "
                f"(now {s.lr:g}) or --clip (now {s.clip:g}), or raise --warmup; the best model so far, if any, is in {self.best}"
            )
        torch.nn.utils.clip_grad_norm_(model.parameters(), s.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        state["step"] += 1
        state["losses"] += total * items
        state["items"] += items
        self.records.add({"step": state["step"], "step_loss": total, "lr": lr})
        return total

    def schedule_step(self, steps: int) -> int:
        """The step whose learning rate is due: under a time limit the share of time that is gone, where that is more."""
        limit, step = self.settings.minutes, self.state["step"]
        if limit is None:
            return step
        return min(steps - 1, max(step, int(steps * self.seconds() / (60 * limit))))

    def evaluate(self, done: float) -> None:
        """Held-out figures after `done` epochs, the best model, a line of history."""
        state, objective = self.state, self.objective
        figures = objective.evaluate(self.model)
        mean = state["losses"] / max(1, state["items"])
        record = {"epoch": done, "step": state["step"], "loss": mean, **figures}
        record |= {"tokens": state["tokens"], "seconds": round(self.seconds(), 1)}
        value = figures.get(objective.metric)
        sign = 1 if objective.larger else -1
        better = value is None or state["best"] is None or sign * value > sign * state["best"]
        if better:
            state["best"], state["since"] = value, 0
            replace_folder(self.best, lambda path: save_model(path, self.model, self.tokenizer))
        else:
            state["since"] += 1
        state["history"].append(record)
        self.records.add(record)
        told = "".join(f"  {name} {number:.4g}" for name, number in figures.items())
        self.say(f"epoch {done:3}  loss {mean:.4g}{told} {'*' if better else ' '} {self.seconds():6.0f} s")

    def used_up(self) -> bool:
        """Whether the steps or the minutes are."""
        done, steps, minutes = self.state["step"], self.settings.steps, self.settings.minutes
        late = minutes is not None and done > 0 and self.seconds() > 60 * minutes
        return late or (steps is not None and done >= steps)

    def goes_on(self) -> bool:
        s, state = self.settings, self.state
        patient = s.patience is None or state["since"] < s.patience
        return state["epoch"] < s.epochs and patient and not self.used_up()

    def epochs(self) -> None:
        s, state = self.settings, self.state
        while self.goes_on():
            batches = self.objective.epoch(random.Random(_seed(s.seed, "epoch", state["epoch"])))
            groups = [batches[i : i + s.accumulate] for i in range(0, len(batches), s.accumulate)]
            steps = s.steps or len(groups) * s.epochs
            share = state["epoch"] / max(1, s.epochs - 1)
            self.model.train()
            bar = tqdm(
                groups[state["in_epoch"] :],
                f"epoch {state['epoch'] + 1}",
                initial=state["in_epoch"],
                total=len(groups),
                unit="step",
                leave=False,
                disable=not sys.stderr.isatty(),
            )
            for group in bar:
                loss = self.step(group, steps, share)
                state["in_epoch"] += 1
                bar.set_postfix_str(f"loss {loss:.3f}, {state['tokens'] / max(1e-9, self.seconds()):.0f} tokens/s")
                if self.used_up():
                    break
                if s.save_every and state["step"] % s.save_every == 0:
                    self.save()
            whole = state["in_epoch"] == len(groups)
            self.evaluate(state["epoch"] + (1 if whole else round(state["in_epoch"] / len(groups), 2)))
            if whole:
                state |= {"epoch": state["epoch"] + 1, "in_epoch": 0, "losses": 0.0, "items": 0}
            self.save()


def fit(
    model, objective: Objective, settings: Settings, out, *, tokenizer=None, resume=False, best="best", say=print
) -> list[dict]:
    """Trains the model; returns a record an epoch: {"epoch", "step", "loss", the held-out figures, "tokens", "seconds"}.

    "epoch" counts those that are done, with a fraction where steps or minutes ended the run inside one; it goes on from there.

    out/best (another name: `best`): the model (and tokenizer) of the best epoch, for `from_pretrained`. out/last: the state to resume
    from, written after each epoch and every save_every steps. out/metrics.jsonl, out/tensorboard, out/learning_curve.png: what
    happened. Each folder is replaced whole. Raises CheckpointError (nothing to resume, or another model's), FloatingPointError (a
    loss that is no number).
    """
    Path(out).mkdir(parents=True, exist_ok=True)
    run = Run(model, objective, settings, Path(out), tokenizer, resume, best, say)
    try:
        run.epochs()
    finally:
        run.records.close()
    history = run.state["history"]
    if history:
        learning_curve(history, objective.metric, Path(out) / "learning_curve.png")
    return history
