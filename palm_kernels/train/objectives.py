"""What a run learns: batches, their corruption, the held-out figure. Language from plain text is here; examples bring their own."""

import math
import random
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

Inputs = dict[str, Tensor]
PRESETS = {  # of masked prediction: shares of tokens predicted, and softly mixed beside them (PALM.md 4.3, `hard` and `weak`)
    "hard": {"predicted": 0.15, "kept": 0.1, "random": 0.1, "mixed": 0.0},
    "weak": {"predicted": 0.08, "kept": 0.0, "random": 0.0, "mixed": 0.15},
}


class Objective(Protocol):
    """metric: the held-out figure that chooses the best model; larger: whether more of it is better."""

    metric: str
    larger: bool

    def epoch(self, rng: random.Random) -> Sequence:
        """The batches of one pass over the data, in the order that rng gives."""
        ...

    def inputs(self, batch, generator: torch.Generator) -> Inputs:
        """A batch as the model's keywords, labels among them; what is drawn is drawn from the generator."""
        ...

    def items(self, inputs: Inputs) -> int:
        """How many labels a batch has: losses are summed and divided by them, over all batches of a step."""
        ...

    def evaluate(self, model) -> dict[str, float]:
        """Held-out figures, `metric` among them; empty where there is no held-out data."""
        ...


def corrupt(ids: Tensor, maskable: Tensor, preset: str, vocab: int, generator: torch.Generator) -> Inputs:
    """strength, source_ids and labels for ids [B,T] under PRESETS; tokens that are not `maskable` [B,T] bool stay as they are.

    hard (BERT): 15 % are predicted, of which 80 % are masked, 10 % replaced by a random token, 10 % left. weak: 8 % are masked and
    predicted, 15 % mixed with a random token's embedding at a strength from U(0,1), not predicted.
    """
    rates = PRESETS[preset]
    draw, kind = (torch.rand(ids.shape, generator=generator) for _ in range(2))
    others = torch.randint(4, max(5, vocab), ids.shape, generator=generator)
    mix = torch.rand(ids.shape, generator=generator)
    predicted = maskable & (draw < rates["predicted"])
    mixed = maskable & ~predicted & (draw < rates["predicted"] + rates["mixed"])
    replaced = predicted & (kind >= rates["kept"])
    strength = torch.where(replaced, 1.0, torch.where(mixed, mix, 0.0))
    random_source = mixed | (predicted & (kind >= rates["kept"]) & (kind < rates["kept"] + rates["random"]))
    return {
        "strength": strength,
        "source_ids": torch.where(random_source, others, -1),
        "labels": ids.masked_fill(~predicted, -100),
    }


class Language:
    """The next token of running text: ids of a text cut into rows of `length`, the last `held_out` share of rows for evaluation."""

    metric, larger = "nll", False

    def __init__(self, ids: Tensor, length: int, batch: int, held_out: float = 0.05):
        rows = len(ids) // length
        if rows < 2:
            raise ValueError(
                f"Language: {len(ids)} tokens make {rows} rows of {length}, need at least 2: give more text or shorter rows"
            )
        kept = max(1, rows - max(1, round(rows * held_out)))
        self.rows = ids[: rows * length].view(rows, length)
        self.train, self.dev, self.batch = self.rows[:kept], self.rows[kept:], batch

    def epoch(self, rng):
        order = list(range(len(self.train)))
        rng.shuffle(order)
        return [self.train[order[i : i + self.batch]] for i in range(0, len(order), self.batch)]

    def inputs(self, batch, generator):
        return {"input_ids": batch, "labels": batch}

    def items(self, inputs):
        return int((inputs["labels"][:, 1:] != -100).sum())

    @torch.no_grad()
    def evaluate(self, model):
        model.eval()
        generator, total, items = torch.Generator().manual_seed(0), 0.0, 0
        for i in range(0, len(self.dev), self.batch):
            inputs = {k: v.to(model.device) for k, v in self.inputs(self.dev[i : i + self.batch], generator).items()}
            count = self.items(inputs)
            total += float(model(**inputs, num_items_in_batch=1, return_logits=False).loss)
            items += count
        nll = total / max(1, items)
        return {"nll": nll, "perplexity": math.exp(min(nll, 700.0))}


class MaskedLanguage(Language):
    """Tokens that were masked, by a preset of `corrupt`; the held-out rows are always masked by `hard`, with the same draws."""

    metric = "masked_nll"

    def __init__(self, ids: Tensor, length: int, batch: int, vocab: int, preset: str = "weak", held_out: float = 0.05):
        if preset not in PRESETS:
            raise ValueError(f"MaskedLanguage: preset is {preset!r}, need one of {', '.join(PRESETS)}")
        super().__init__(ids, length, batch, held_out)
        self.preset, self.vocab = preset, vocab

    def _inputs(self, batch, preset, generator):
        return {"input_ids": batch, **corrupt(batch, batch >= 4, preset, self.vocab, generator)}

    def inputs(self, batch, generator):
        return self._inputs(batch, self.preset, generator)

    def items(self, inputs):
        return int((inputs["labels"] != -100).sum())

    @torch.no_grad()
    def evaluate(self, model):
        training, self.preset = self.preset, "hard"
        try:
            return {self.metric: super().evaluate(model)["nll"]}
        finally:
            self.preset = training
