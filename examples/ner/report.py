"""What a run ends with: the entity-level table, coloured sentences, and pictures where matplotlib is installed."""

import math
import os
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np

from ..command import replaced
from .data import HAN, entities

COLOURS = (36, 33, 35, 32, 34, 31, 96, 93, 95, 92, 94, 91)  # ANSI foregrounds, one a type, in the order of the types

ERRORS = ("right", "missed", "wrong bounds", "wrong type", "wrong type and bounds")


def scores(gold: list[list[str]], found: list[list[str]]) -> dict[str, dict[str, float]]:
    """{type or "micro avg": {"precision", "recall", "f1-score", "support"}} by seqeval, strict IOB2: the whole entity counts."""
    from seqeval.metrics import classification_report
    from seqeval.scheme import IOB2

    with warnings.catch_warnings():  # a type that is never found has precision 0, as the table shows
        warnings.simplefilter("ignore")
        report = classification_report(gold, found, mode="strict", scheme=IOB2, output_dict=True, zero_division=0)
    dropped = ("macro avg", "weighted avg")
    return {str(k): {m: float(x) for m, x in v.items()} for k, v in report.items() if k not in dropped}


def micro_f1(gold: list[list[str]], found: list[list[str]]) -> float:
    return scores(gold, found)["micro avg"]["f1-score"]


def table(result: dict[str, dict[str, float]]) -> str:
    """The scores as text, one type a line, micro average last."""
    width = max(map(len, result))
    lines = [f"{'':{width}}  precision  recall      F1  support"]
    for kind, row in result.items():
        lines.append(
            f"{kind:{width}}  {row['precision']:9.3f}  {row['recall']:6.3f}  {row['f1-score']:6.3f}  {row['support']:7.0f}"
        )
    return "\n".join([*lines[:-1], "-" * len(lines[0]), lines[-1]])


# Sentences


def in_colour(stream=None) -> bool:
    """Whether to colour: a terminal, and NO_COLOR (no-color.org) not set."""
    return (stream or sys.stdout).isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def shown(word: str) -> str:
    """A word that can be printed: control characters and the like as escapes, so that data cannot steer the terminal."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in word)
    return text if text.strip() else repr(word)


def running(words: Iterable[str]) -> str:
    """Words as a text: blanks between them, but not between Chinese characters."""
    return re.sub(rf"(?<=[{HAN}]) (?=[{HAN}])", "", " ".join(words))


def marked(words: list[str], tags: list[str], types: list[str], colour: bool) -> str:
    """The sentence with its entities as `[Ada Lovelace PER]`, or in the type's colour."""
    parts, position = [], 0
    for kind, first, end in entities(tags):
        parts += map(shown, words[position:first])
        name = running(map(shown, words[first:end]))
        code = COLOURS[types.index(kind) % len(COLOURS)]
        parts.append(f"\x1b[1;{code}m{name}\x1b[0;{code}m {kind}\x1b[0m" if colour else f"[{name} {kind}]")
        position = end
    return running([*parts, *map(shown, words[position:])])


def examples(sentences, found: list[list[str]], types: list[str], count: int = 5, colour: bool | None = None) -> str:
    """The first sentences of some length that hold entities, tagged; what was expected stands below where it differs."""
    colour = in_colour() if colour is None else colour
    lines: list[str] = []
    for sentence, tags in zip(sentences, found, strict=True):
        if count and 6 <= len(sentence.words) <= 30 and entities(sentence.tags):
            count -= 1
            lines.append("  " + marked(sentence.words, tags, types, colour))
            if tags != sentence.tags:
                lines.append("    expected: " + marked(sentence.words, sentence.tags, types, colour))
    return "\n".join(lines)


# Errors


def kinds_of_error(gold: list[str], found: list[str]) -> Counter[str]:
    """What became of the expected entities of a sentence, and "spurious": found entities that touch none that is expected."""
    expected, given = entities(gold), entities(found)
    counts: Counter[str] = Counter()
    for kind, first, end in expected:
        touching = [g for g in given if g[1] < end and first < g[2]]
        if (kind, first, end) in touching:
            counts["right"] += 1
        elif any(g[1:] == (first, end) for g in touching):
            counts["wrong type"] += 1
        elif any(g[0] == kind for g in touching):
            counts["wrong bounds"] += 1
        else:
            counts["wrong type and bounds" if touching else "missed"] += 1
    counts["spurious"] += sum(all(e[2] <= first or end <= e[1] for e in expected) for _, first, end in given)
    return counts


def worst(sentences, found: list[list[str]], scores: list[np.ndarray], labels: list[str], count: int = 50) -> str:
    """What kinds of error there are, and the sentences that surprised the model most.

    scores: log-probabilities [words,K] by sentence. A sentence's loss is the sum of -log p(expected tag) over its words.
    """
    kinds = sum((kinds_of_error(s.tags, tags) for s, tags in zip(sentences, found, strict=True)), Counter())
    lines = ["expected entities: " + ", ".join(f"{kinds[k]} {k}" for k in ERRORS) + f"; {kinds['spurious']} spurious"]
    lines += ["", f"worst sentences, by the loss of their tags (nats); all labels: {', '.join(labels)}"]
    class_of, types = {label: i for i, label in enumerate(labels)}, sorted({label[2:] for label in labels} - {""})
    losses = [-s[np.arange(len(s)), [class_of[t] for t in x.tags]] for x, s in zip(sentences, scores, strict=True)]
    wrong = [i for i, (s, tags) in enumerate(zip(sentences, found, strict=True)) if s.tags != tags]
    for place, i in enumerate(sorted(wrong, key=lambda i: -losses[i].sum())[:count], 1):
        s = sentences[i]
        lines += ["", f"{place}. loss {losses[i].sum():.2f}  {s.where}"]
        lines += [f"   found:    {marked(s.words, found[i], types, False)}"]
        lines += [f"   expected: {marked(s.words, s.tags, types, False)}"]
        told = [k for k in np.argsort(-losses[i]) if s.tags[k] != found[i][k]]
        words = (
            f"{shown(s.words[k])} {s.tags[k]} ({math.exp(-losses[i][k]):.2g}), found {found[i][k]}" for k in told[:8]
        )
        lines += ["   expected with probability: " + "; ".join(words)]
    return "\n".join(lines) + "\n"


# Pictures


def confusion(gold: Iterable[list[str]], found: Iterable[list[str]], types: list[str]) -> list[list[int]]:
    """Words counted by (expected, found) type, O first."""
    names = {"": 0, **{kind: i for i, kind in enumerate(types, 1)}}
    counts = [[0] * len(names) for _ in names]
    for g, f in zip(gold, found, strict=True):
        for expected, tag in zip(g, f, strict=True):
            counts[names[expected[2:]]][names[tag[2:]]] += 1
    return counts


def picture(folder: Path, counts: list[list[int]], types: list[str]) -> list[Path]:
    """confusion_matrix.png; an empty list where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return []
    names, size = ["O", *types], len(types) + 1
    figure = Figure(figsize=(1.8 + 0.7 * size, 1.4 + 0.7 * size), layout="constrained")
    axes = figure.subplots()
    share = [[n / max(sum(row), 1) for n in row] for row in counts]
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for i, row in enumerate(counts):
        for j, n in enumerate(row):
            axes.text(j, i, str(n), ha="center", va="center", color="white" if share[i][j] > 0.5 else "black")
    axes.set_xticks(range(size), names, rotation=45)
    axes.set_yticks(range(size), names)
    axes.set(xlabel="found", ylabel="expected", title="words by type (colour: share of the row)")
    return [replaced(folder / "confusion_matrix.png", partial(figure.savefig, dpi=120))]
