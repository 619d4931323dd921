"""What the four scripts share: options, a user's JSON lines, model and tokenizer, training, the last lines of a run."""

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path

import torch

import palm_kernels as pk
from palm_kernels.models import PaLMTokenizer
from palm_kernels.train import Help, Labelled, Settings, fit, load_model

from ..command import add_files, add_model, facts, new_config, share, write_json
from ..ner.data import DataError, decode
from .corpora import Parts

TOY_VOCAB, VOCAB = 600, 4000  # few sub-words make unseen names of known pieces
Example = dict
Score = dict[str, float]


def arguments(name: str, text: str, **defaults) -> argparse.ArgumentParser:
    """The options of every script; `defaults` replaces those of add_model and of Settings."""
    parser = argparse.ArgumentParser(prog=f"python -m examples.tasks.{name}", description=text, formatter_class=Help)
    group = parser.add_argument_group("data and files")
    group.add_argument("--data", metavar="FILE", help="JSON lines (README), cut 80 / 10 / 10; absent: a toy corpus")
    group.add_argument("--model", metavar="DIR", help="start from this saved model and its tokenizer; absent: anew")
    add_files(group, f"runs/{name}")
    own = {key: defaults.pop(key) for key in ("hidden", "layers", "batch") if key in defaults}
    group = parser.add_argument_group(
        "model (with --model, its own shape counts and --length is at most what it holds)"
    )
    add_model(group, vocab=None, absent=f"{TOY_VOCAB} for a toy corpus, {VOCAB} for --data", **own)
    group.add_argument(
        "--dropout", type=share, default=0.1, help="of embeddings and of a classifier's input (probability)"
    )
    Settings.add_to(parser.add_argument_group("optimisation"), **{"lr": 1e-3, "final_lr": 1e-5, **defaults})
    return parser


# Data


def need(ok: object, what: str) -> None:
    """In a check of an example: DataError(what) unless ok. `read` puts the place before it."""
    if not ok:
        raise DataError(what)


def text_of(example: Example, *names: str) -> None:
    """Each field is there and is a text that is not blank."""
    for name in names:
        value = example.get(name)
        need(name in example, f"no {name!r} in it, only {', '.join(map(repr, example)) or 'nothing'}")
        need(isinstance(value, str) and value.strip(), f"{name!r} is {value!r}, need a text that is not empty")


def read(path: str | Path, check: Callable[[Example], None]) -> list[Example]:
    """The examples of a file, one JSON object a line, each with its place as "where"; DataError with file and line."""
    path, found = Path(path), []
    for number, line in enumerate(decode(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            example = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: no JSON ({error.msg} at column {error.colno}): need one object a line") from None
        if not isinstance(example, dict):
            raise DataError(f"{where}: {line.strip()[:40]!r} is no object: need {{...}} on each line")
        try:
            check(example)
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        found.append({**example, "where": where})
    if not found:
        raise DataError(f"{path}: the file is empty: need one JSON object a line")
    return found


def cut(examples: list[Example], key: str) -> Parts:
    """80 / 10 / 10 of the texts under `key` in an order of their own: what shares a text stays together."""
    texts = list(dict.fromkeys(example[key] for example in examples))
    random.Random(0).shuffle(texts)
    a, b = len(texts) * 8 // 10, len(texts) * 9 // 10
    if not 0 < a < b:
        raise DataError(f"{examples[0]['where']}: {len(texts)} different texts ({key!r}) in all: need at least 3")
    part_of = {text: "train" if i < a else "dev" if i < b else "test" for i, text in enumerate(texts)}
    return {part: [e for e in examples if part_of[e[key]] == part] for part in ("train", "dev", "test")}


def load(args: argparse.Namespace, check: Callable, key: str, toy: Callable[[], Parts]) -> Parts:
    """The parts of --data, or the toy corpus."""
    parts = cut(read(args.data, check), key) if args.data else toy()
    print(f"data: {args.data or 'toy corpus'}; " + ", ".join(f"{len(parts[p])} {p}" for p in parts))
    return parts


def known_labels(parts: Parts) -> list[str]:
    """The labels of train in alphabetical order; one that is met later only cannot be learnt."""
    labels = sorted({example["label"] for example in parts["train"]})
    for example in (*parts["dev"], *parts["test"]):
        if example["label"] not in labels:
            raise DataError(
                f"{example.get('where', 'data')}: label {example['label']!r} is not in the training part, which has "
                f"{', '.join(labels)}: give more examples of it, or none"
            )
    if len(labels) < 2:
        raise DataError(f"the training part has the label {labels[0]!r} alone: need at least 2")
    return labels


# Model and training


def build(args: argparse.Namespace, kind, texts: list[str], **fields):
    """(model, tokenizer): those of --model or of the run to go on with, else new ones, the tokenizer learnt from the texts."""
    fields |= {"embedding_dropout": args.dropout, "classifier_dropout": args.dropout}
    if args.resume or args.model:
        folder = Path(args.out) / "last" if args.resume else args.model
        pair = load_model(kind, PaLMTokenizer, folder, weights=not args.resume, **fields)
    else:
        tokenizer = PaLMTokenizer.train(texts, args.vocab or (VOCAB if args.data else TOY_VOCAB))
        pair = kind(new_config(args, tokenizer, **fields)), tokenizer
    limit = pair[0].config.max_position_embeddings
    if args.length > limit:
        raise DataError(f"--length is {args.length}, the model holds {limit} tokens: set at most that")
    print(
        f"model: {sum(p.numel() for p in pair[0].parameters()) / 1e6:.2f} M parameters, {len(pair[1])} sub-words, "
        f"palm_kernels {pk.__version__}, {torch.get_num_threads()} threads"
    )
    return pair


def train(args: argparse.Namespace, settings: Settings, model, tokenizer, rows: list, score: Callable, metric: str):
    """The best model by score(model)[metric] on dev, loaded from its folder as a user would."""
    shift = getattr(model, "shift", 0)
    objective = Labelled(rows, args.batch, tokenizer.pad_token_id, evaluate=score, metric=metric, shift=shift)
    fit(model, objective, settings, args.out, tokenizer=tokenizer, resume=args.resume)
    return load_model(type(model), PaLMTokenizer, Path(args.out) / "best")[0].to(model.device)


def report(args: argparse.Namespace, count: int, found: Score, trivial: Score, how: str) -> None:
    """The scores on test beside those of a method that reads nothing, and where the model lies; kept in out/scores.json."""
    print(f"\n{count} test examples" + "".join(f"{name:>10}" for name in found))
    for who, scores in (("model", found), (how, trivial)):
        print(f"  {who:<{len(str(count)) + 12}}" + "".join(f"{value:10.3f}" for value in scores.values()))
    path = write_json(Path(args.out) / "scores.json", {"test": found, how: trivial, **facts(args)})
    print(f"\nwritten: {Path(args.out) / 'best'} (the model), {path.name}, metrics.jsonl, learning_curve.png")
