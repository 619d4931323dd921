"""Relation extraction: `python -m examples.tasks.relations [--data FILE]`, lines {"text", "head": [a, b], "tail": [a, b], "label"}.

The two entities (characters a to b) are marked in the text, which is then classified as a whole (entity markers, Baldini Soares 2019).
Micro-F1 leaves out the label that means no relation (--none).
"""

import argparse
import sys

from palm_kernels.train import Settings

from ..command import run
from . import corpora, scores
from .classify import learn
from .common import DataError, Example, arguments, load, need, text_of

HEAD, TAIL = ("[[", "]]"), ("{{", "}}")


def check(example: Example) -> None:
    text_of(example, "text", "label")
    size = len(example["text"])
    for name in ("head", "tail"):
        span = example.get(name)
        whole = isinstance(span, list) and len(span) == 2 and all(type(i) is int for i in span)
        need(
            whole and 0 <= span[0] < span[1] <= size,
            f"{name!r} is {span!r}, need [start, end] within {size} characters",
        )
    (a, b), (c, d) = example["head"], example["tail"]
    need(b <= c or d <= a, f"'head' {[a, b]} and 'tail' {[c, d]} overlap: need two places")


def mark(text: str, head: list[int], tail: list[int]) -> str:
    """The text with `[[ head ]]` and `{{ tail }}`, blanks around each mark: text pieces, so that any tokenizer knows them."""
    for (start, end), (opens, closes) in sorted([(head, HEAD), (tail, TAIL)], reverse=True):
        around = text[:start].rstrip(), opens, text[start:end].strip(), closes, text[end:].lstrip()
        text = " ".join(filter(None, around))
    return text


def work(args: argparse.Namespace, settings: Settings) -> None:
    parts = load(args, check, "text", lambda: corpora.make(corpora.relation))
    for example in (e for part in parts.values() for e in part):
        example["marked"] = mark(example["text"], example["head"], example["tail"])
    if all(e["label"] == args.none for e in parts["train"]):
        raise DataError(f"every example of the training part is {args.none!r} (--none): need one with a relation")
    learn(
        args,
        settings,
        parts,
        "marked",
        lambda gold, found: scores.of_relations(gold, found, args.none),
        "micro_f1",
        whole=True,
        none=args.none,
    )


def main(argv: list[str] | None = None) -> int:
    parser = arguments("relations", __doc__ or "", epochs=4, hidden=128, layers=2)
    parser.add_argument("--none", metavar="LABEL", default=corpora.NONE, help="the label that means no relation")
    return run(parser.parse_args(argv), work)


if __name__ == "__main__":
    sys.exit(main())
