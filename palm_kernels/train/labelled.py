"""Labelled examples of any head: what a row must be, batches of similar length, padding, and the objective that `fit` learns them by."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from .objectives import Inputs

Row = Mapping[str, int | float | Sequence]
SPAN = ("start_positions", "end_positions")


def by_length(rows: Sequence, size: int, rng: random.Random, length: Callable = len) -> list[list]:
    """Batches of similar length in random order: little padding, other batches every epoch."""
    order = sorted(rows, key=lambda row: length(row) + 8 * rng.random())
    batches = [order[i : i + size] for i in range(0, len(order), size)]
    rng.shuffle(batches)
    return batches


def tokens(row: Row) -> int:
    return len(row["input_ids"])  # type: ignore


def collate(rows: Sequence[Row], pad_id: int) -> Inputs:
    """Rows as the model's keywords: lists padded on the right to [B,T], numbers stacked to [B], attention_mask [B,T] added.

    input_ids are padded with pad_id, labels with -100, other lists with 0.
    """
    T = max(map(tokens, rows))
    fills = {"input_ids": pad_id, "labels": -100}
    inputs = {
        name: torch.tensor(
            [[*v, *[fills.get(name, 0)] * (T - len(v))] if isinstance(v := row[name], Sequence) else v for row in rows]
        )
        for name in rows[0]
    }
    return {**inputs, "attention_mask": torch.tensor([[1] * tokens(row) + [0] * (T - tokens(row)) for row in rows])}


def check(rows: Sequence[Row]) -> None:
    """ValueError for the first row that no batch can hold, or whose labels would silently count for nothing."""
    if not rows:
        raise ValueError("Labelled: there are no rows to learn from")
    for i, row in enumerate(rows):
        if row.keys() != rows[0].keys():
            raise ValueError(f"Labelled: row {i} has {', '.join(row)}, row 0 has {', '.join(rows[0])}: need the same")
        if not row.get("input_ids"):
            raise ValueError(f"Labelled: row {i} has no input_ids")
        for name, value in row.items():
            if isinstance(value, Sequence) and len(value) != tokens(row):
                raise ValueError(f"Labelled: row {i} has {tokens(row)} input_ids and {len(value)} {name}: need as many")
        span = [row[name] for name in SPAN if name in row]
        if span and not (span == [-100, -100] or (len(span) == 2 and 0 <= span[0] <= span[1] < tokens(row))):  # type: ignore
            raise ValueError(
                f"Labelled: row {i} has the span {span} in {tokens(row)} input_ids: need start <= end inside, or -100 twice"
            )


class Labelled:
    """Rows with labels, for every head: a row is a dict of the model's keywords, unpadded.

    input_ids, a list, and: labels, a list (token classification; causal LM, -100 on what is not to be learnt) or a number (sequence
    classification), or start_positions and end_positions (spans; -100 for both: left out of the loss). shift: 1 for a causal LM, whose
    first label is predicted from nothing and so does not count (`PaLMForCausalLM.shift`). evaluate(model) gives the held-out figures;
    `metric` among them chooses the best model, the largest or with larger=False the smallest. Without evaluate the last model is the
    best. ValueError names the first row that does not fit.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        batch: int,
        pad_id: int,
        *,
        evaluate: Callable[..., dict[str, float]] | None = None,
        metric: str = "score",
        larger: bool = True,
        shift: int = 0,
    ):
        check(rows)
        self.rows, self.batch, self.pad_id, self.shift = rows, batch, pad_id, shift
        self.metric, self.larger, self._evaluate = metric, larger, evaluate

    def epoch(self, rng):
        return by_length(self.rows, self.batch, rng, tokens)

    def inputs(self, batch, generator):
        return collate(batch, self.pad_id)

    def items(self, inputs):
        """Labelled tokens, rows or spans, as many as the model's loss sums over."""
        labels = inputs["labels"] if "labels" in inputs else inputs[SPAN[0]]
        if labels.is_floating_point():
            return labels.numel()
        return int(((labels[:, self.shift :] if labels.dim() == 2 else labels) != -100).sum())

    def evaluate(self, model):
        return self._evaluate(model) if self._evaluate else {}


def outputs(model, rows: Sequence[Row], size: int, pad_id: int) -> Iterator[tuple[list[int], object]]:
    """(which rows, what the model gives for them) by batches of similar length; the model is left in eval mode."""
    model.eval()
    order = sorted(range(len(rows)), key=lambda i: tokens(rows[i]))
    for start in range(0, len(order), size):
        which = order[start : start + size]
        inputs = collate([rows[i] for i in which], pad_id)
        with torch.inference_mode():
            found = model(**{name: value.to(model.device) for name, value in inputs.items()})
        yield which, found
