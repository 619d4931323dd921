"""More sentences out of few: mentions that change places, and soft weak masking."""

import random

import torch
from torch import Tensor

from .batches import Batch
from .data import Sentence, entities


def mentions(sentences: list[Sentence]) -> dict[str, list[list[str]]]:
    """{type: its mentions as lists of words, as often as they occur}."""
    found: dict[str, list[list[str]]] = {}
    for sentence in sentences:
        for kind, first, end in entities(sentence.tags):
            found.setdefault(kind, []).append(sentence.words[first:end])
    return found


def swap_mentions(sentence: Sentence, pool: dict[str, list[list[str]]], rate: float, rng: random.Random) -> Sentence:
    """Each entity replaced, with probability `rate`, by a mention of its type from elsewhere (Dai & Adel 2020)."""
    words, tags, position = [], [], 0
    for kind, first, end in entities(sentence.tags):
        mention = rng.choice(pool[kind]) if rng.random() < rate else sentence.words[first:end]
        words += [*sentence.words[position:first], *mention]
        tags += [*sentence.tags[position:first], f"B-{kind}", *[f"I-{kind}"] * (len(mention) - 1)]
        position = end
    return Sentence([*words, *sentence.words[position:]], [*tags, *sentence.tags[position:]], sentence.where)


def weak_masking(batch: Batch, hard: float, soft: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(strength, source_ids) [B,T] of soft weak masking, drawn by whole words.

    A share `hard` of the words is masked: strength 1, source -1 is the mask token's row. A share `soft` is mixed at a strength
    uniform in [0,1] with a random token of the batch, which hides something at every strength (a constant row would not).
    """
    B, T = batch.ids.shape
    draw, amount = torch.rand(2, B, int(batch.words.max()) + 1, generator=generator)
    words = batch.words.clamp(min=0)
    draw, amount = draw.gather(1, words), amount.gather(1, words)
    strength = torch.where(draw < hard, 1.0, torch.where(draw < hard + soft, amount, 0.0)) * batch.mask
    other = batch.ids[batch.mask.bool()]
    other = other[torch.randint(len(other), (B, T), generator=generator)]
    return strength, torch.where(draw < hard, -1, other)
