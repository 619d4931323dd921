"""What a run ends with: the entity-level table, coloured sentences, and pictures where matplotlib is installed."""

import os
import sys
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from .data import entities

COLOURS = (36, 33, 35, 32, 34, 31, 96, 93, 95, 92, 94, 91)  # ANSI foregrounds, one a type, in the order of the types


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


def marked(words: list[str], tags: list[str], types: list[str], colour: bool) -> str:
    """The sentence with its entities as `[Ada Lovelace PER]`, or in the type's colour."""
    parts, position = [], 0
    for kind, first, end in entities(tags):
        parts += map(shown, words[position:first])
        name = " ".join(map(shown, words[first:end]))
        code = COLOURS[types.index(kind) % len(COLOURS)]
        parts.append(f"\x1b[1;{code}m{name}\x1b[0;{code}m {kind}\x1b[0m" if colour else f"[{name} {kind}]")
        position = end
    return " ".join([*parts, *map(shown, words[position:])])


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


# Pictures


def confusion(gold: Iterable[list[str]], found: Iterable[list[str]], types: list[str]) -> list[list[int]]:
    """Words counted by (expected, found) type, O first."""
    names = {"": 0, **{kind: i for i, kind in enumerate(types, 1)}}
    counts = [[0] * len(names) for _ in names]
    for g, f in zip(gold, found, strict=True):
        for expected, tag in zip(g, f, strict=True):
            counts[names[expected[2:]]][names[tag[2:]]] += 1
    return counts


def replaced(path: Path, write: Callable[[Path], object]) -> Path:
    """path, written by write(file beside it) and renamed: a reader sees the old file or the new one."""
    beside = path.with_name(f"{path.stem}.partial{path.suffix}")
    write(beside)
    return beside.replace(path)


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
