"""Questions answered by a span of a text: `python -m examples.tasks.answer [--data FILE]`, lines of SQuAD's fields.

{"question": ..., "context": ..., "answers": {"text": [...], "answer_start": [...]}} with characters counted from 0; both lists empty
where the context does not say. A row is `<s> question </s> window`, the windows of a long context overlap by half, and a window
without the answer points at <s>. Exact match and F1 as SQuAD defines them.
"""

import argparse
import re
import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from palm_kernels.models import PaLMForQuestionAnswering
from palm_kernels.train import Settings, outputs

from ..command import positive, run
from . import corpora, scores
from .common import DataError, Example, arguments, build, load, need, report, text_of, train


@dataclass
class Window:
    """ids of a row; characters [start, end) of the context for each of its sub-words, which begin at column `first`."""

    ids: list[int]
    places: list[tuple[int, int]]
    first: int
    example: int


def check(example: Example) -> None:
    text_of(example, "question", "context")
    answers = example.get("answers")
    need(isinstance(answers, dict), f"'answers' is {answers!r}, need {{'text': [...], 'answer_start': [...]}}")
    texts, starts = answers.get("text"), answers.get("answer_start")  # type: ignore
    lists = isinstance(texts, list) and isinstance(starts, list) and len(texts) == len(starts)
    need(lists, f"'answers' has text {texts!r} and answer_start {starts!r}, need two lists of one length")
    for text, start in zip(texts, starts, strict=True):  # type: ignore
        need(isinstance(text, str) and text.strip(), f"the answer {text!r} is no text")
        need(type(start) is int and start >= 0, f"answer_start is {start!r}, need a number from 0")
        there = example["context"][start : start + len(text)]
        need(
            there == text,
            f"the answer {text!r} does not stand at {start}, where the context has {there!r}: count characters",
        )


def windows(examples: list[Example], tokenizer, length: int) -> list[Window]:
    """The rows of each question, none longer than `length`; of a question more than half of that is cut off."""
    found = []
    for i, example in enumerate(examples):
        question = tokenizer(example["question"], add_special_tokens=False)["input_ids"]
        head = [tokenizer.bos_token_id, *question[: length // 2 - 2], tokenizer.eos_token_id]
        context = tokenizer(example["context"], add_special_tokens=False, return_offsets_mapping=True)
        ids, places, room = context["input_ids"], context["offset_mapping"], length - len(head)
        step = (room + 1) // 2
        for start in range(0, max(1, len(ids) - room + step), step):
            part = slice(start, start + room)
            found.append(Window([*head, *ids[part]], places[part], len(head), i))
    return found


def target(window: Window, answers: dict) -> tuple[int, int]:
    """Columns of the first and last sub-word of the first answer; (0, 0), where <s> stands, if the window does not hold it whole."""
    if answers["text"]:
        start = answers["answer_start"][0]
        end = start + len(answers["text"][0])
        inside = [k for k, (a, b) in enumerate(window.places) if a < end and b > start]
        if inside and window.places[inside[0]][0] <= start and window.places[inside[-1]][1] >= end:
            return window.first + inside[0], window.first + inside[-1]
    return 0, 0


def best_span(starts: Tensor, ends: Tensor, first: int, most: int) -> tuple[float, int, int]:
    """(score, start, end): the span of columns first <= start <= end < start + most with the largest sum, less that of column 0."""
    sums = starts[first:, None] + ends[None, first:]
    sums = sums.masked_fill(~torch.ones_like(sums, dtype=torch.bool).triu().tril(most - 1), -torch.inf)
    start, end = divmod(int(sums.argmax()), sums.shape[1])
    return float(sums[start, end] - starts[0] - ends[0]), first + start, first + end


def answers(
    model, tokenizer, examples: list[Example], length: int, most: int = 30, may_be_none: bool = False
) -> list[dict]:
    """{"text", "start", "end", "score"} for each question, characters of its context: the best span over its windows.

    may_be_none: "" (0 to 0) where no window prefers a span to <s>, that is where the score is below 0.
    """
    spans = windows(examples, tokenizer, length)
    found = [{"text": "", "start": 0, "end": 0, "score": 0.0 if may_be_none else -torch.inf} for _ in examples]
    for which, out in outputs(model, [{"input_ids": w.ids} for w in spans], 32, tokenizer.pad_token_id):
        for row, i in enumerate(which):
            window, size = spans[i], len(spans[i].ids)
            columns = (logits[row, :size].float().cpu() for logits in (out.start_logits, out.end_logits))  # type: ignore
            score, a, b = best_span(*columns, window.first, most)
            if score > found[window.example]["score"]:
                start, end = window.places[a - window.first][0], window.places[b - window.first][1]
                text = examples[window.example]["context"][start:end]
                start, end = start + len(text) - len(text.lstrip()), end - len(text) + len(text.rstrip())
                found[window.example] = {"text": text.strip(), "start": start, "end": end, "score": score}
    return found


def first_sentence(text: str) -> str:
    return re.split(r"(?<=[.!?])\s", text)[0]


def work(args: argparse.Namespace, settings: Settings) -> None:
    parts = load(args, check, "context", lambda: corpora.make(corpora.question))
    if args.length < 16:
        raise DataError(f"--length is {args.length}: a question and a window need at least 16")
    texts = [t for e in parts["train"] for t in (e["question"], e["context"])]
    model, tokenizer = build(args, PaLMForQuestionAnswering, texts, attention="bidirectional")
    rows = []
    for window in windows(parts["train"], tokenizer, args.length):
        start, end = target(window, parts["train"][window.example]["answers"])
        rows.append({"input_ids": window.ids, "start_positions": start, "end_positions": end})
    may_be_none = any(not e["answers"]["text"] for e in parts["train"])
    gold = {part: [e["answers"]["text"] or [""] for e in parts[part]] for part in parts}

    def scored(model, part="dev"):
        found = answers(model, tokenizer, parts[part], args.length, args.max_answer, may_be_none)
        return scores.of_answers(gold[part], [f["text"] for f in found])

    best = train(args, settings, model, tokenizer, rows, scored, "f1")
    trivial = scores.of_answers(gold["test"], [first_sentence(e["context"]) for e in parts["test"]])
    report(args, len(gold["test"]), scored(best, "test"), trivial, "first sentence")


def main(argv: list[str] | None = None) -> int:
    parser = arguments("answer", __doc__ or "", epochs=3, hidden=128, layers=3, lr=2e-3)
    parser.add_argument("--max-answer", type=positive, default=30, help="sub-words of the longest answer")
    return run(parser.parse_args(argv), work)


if __name__ == "__main__":
    sys.exit(main())
