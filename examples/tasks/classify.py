"""Text classification: `python -m examples.tasks.classify [--data FILE]`, lines {"text": ..., "label": ...}.

Sub-words -> PaLMForSequenceClassification (bidirectional, the mean of a row's tokens) -> accuracy and macro-F1.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Callable

from palm_kernels.models import PaLMForSequenceClassification
from palm_kernels.train import Settings, outputs

from ..command import run
from . import corpora, scores
from .common import DataError, Example, Score, arguments, build, known_labels, load, report, text_of, train
from .corpora import Parts


def check(example: Example) -> None:
    text_of(example, "text", "label")


def rows_of(examples: list[Example], text: str, tokenizer, labels: list[str], length: int, whole: bool) -> list[dict]:
    """A row for each example's text, the class as its label; more than `length` sub-words are cut off, or with `whole` an error."""
    rows, longer = [], 0
    encoded = tokenizer([e[text] for e in examples], add_special_tokens=False)["input_ids"]
    for example, ids in zip(examples, encoded, strict=True):
        longer += len(ids) > length
        if whole and len(ids) > length:
            raise DataError(
                f"{example.get('where', 'text')}: {len(ids)} sub-words with the marks, a row holds {length}: raise --length, or give "
                "the sentence around the entities alone"
            )
        rows.append({"input_ids": ids[:length], "labels": labels.index(example["label"])})
    if longer:
        print(f"  {longer} of {len(rows)} texts have more than {length} sub-words and lose their end (--length)")
    return rows


def classes(model, rows: list[dict], labels: list[str], pad_id: int) -> list[str]:
    """The likeliest label of each row."""
    found = [""] * len(rows)
    for which, out in outputs(model, rows, 64, pad_id):
        for i, k in zip(which, out.logits.argmax(-1).tolist(), strict=True):  # type: ignore
            found[i] = labels[k]
    return found


def learn(
    args: argparse.Namespace,
    settings: Settings,
    parts: Parts,
    text: str,
    score: Callable[[list[str], list[str]], Score],
    metric: str,
    *,
    whole: bool = False,
    none: str | None = None,
) -> None:
    """Classifies what stands under `text`; score(gold, found)[metric] on dev chooses the model. Beside it: always the commonest label.

    whole: a text that a row does not hold is an error. none: a label that the comparison does not give.
    """
    labels = known_labels(parts)
    fields = {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {x: i for i, x in enumerate(labels)},
    }
    texts = [e[text] for e in parts["train"]]
    model, tokenizer = build(args, PaLMForSequenceClassification, texts, attention="bidirectional", **fields)
    rows = {part: rows_of(parts[part], text, tokenizer, labels, args.length, whole) for part in parts}
    gold = {part: [e["label"] for e in parts[part]] for part in parts}

    def scored(model, part="dev"):
        return score(gold[part], classes(model, rows[part], labels, tokenizer.pad_token_id))

    best = train(args, settings, model, tokenizer, rows["train"], scored, metric)
    most = Counter(label for label in gold["train"] if label != none).most_common(1)[0][0]
    report(
        args,
        len(gold["test"]),
        scored(best, "test"),
        score(gold["test"], [most] * len(gold["test"])),
        f"always {most!r}",
    )


def work(args: argparse.Namespace, settings: Settings) -> None:
    parts = load(args, check, "text", lambda: corpora.make(corpora.review))
    learn(args, settings, parts, "text", scores.of_classes, "macro_f1")


def main(argv: list[str] | None = None) -> int:
    return run(arguments("classify", __doc__ or "", epochs=4, hidden=128, layers=2, lr=2e-3).parse_args(argv), work)


if __name__ == "__main__":
    sys.exit(main())
