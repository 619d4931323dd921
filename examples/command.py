"""What the examples' command lines share: options of a small model, and how a run begins and ends."""

import argparse
import json
import platform
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

import palm_kernels as pk
from palm_kernels.models import PaLMConfig
from palm_kernels.train import Settings


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return int(text)


def share(text: str) -> float:
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return float(text)


def add_files(group, out: str) -> None:
    group.add_argument("--out", metavar="DIR", default=out, help="where the model, metrics and pictures go")
    group.add_argument("--resume", action="store_true", help="go on from --out's last state")
    group.add_argument("--threads", type=positive, help="CPU threads; absent: as many as torch chooses")


def add_model(
    group,
    *,
    vocab: int | None = 2000,
    hidden: int = 192,
    layers: int = 4,
    length: int = 128,
    batch: int = 16,
    absent="",
) -> None:
    """absent: what holds where vocab is None and the option is not given."""
    text = "sub-words; 260 are bytes and special tokens"
    group.add_argument("--vocab", type=positive, default=vocab, help=f"{text}; absent: {absent}" if absent else text)
    group.add_argument("--hidden", type=positive, default=hidden, help="model dim")
    group.add_argument("--layers", type=positive, default=layers, help="parallel blocks")
    group.add_argument("--heads", type=positive, default=4, help="query heads of 48, over one key/value head")
    group.add_argument("--length", type=positive, default=length, help="tokens in a row")
    group.add_argument("--batch", type=positive, default=batch, help="rows in a batch")


def new_config(args: argparse.Namespace, tokenizer, **fields) -> PaLMConfig:
    """The model that the options of add_model say, for this tokenizer."""
    shape = {
        "hidden_size": args.hidden,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.heads,
        "head_dim": 48,
        "max_position_embeddings": 2 * args.length,
        "embedding_std": 0.5,
    }
    return PaLMConfig(vocab_size=len(tokenizer), **{**shape, **fields})


def facts(args: argparse.Namespace) -> dict:
    """What a results file says of the run that made it."""
    versions = {m.__name__: m.__version__ for m in (pk, torch, transformers)} | {"python": platform.python_version()}
    return {"command": shlex.join(sys.argv), "arguments": vars(args), "versions": versions}


def replaced(path: Path, write: Callable[[Path], object]) -> Path:
    """path, written by write(file beside it) and renamed: a reader sees the old file or the new one."""
    beside = path.with_name(f"{path.stem}.partial{path.suffix}")
    write(beside)
    return beside.replace(path)


def write_json(path: Path, values: dict) -> Path:
    return replaced(path, lambda beside: beside.write_text(json.dumps(values, indent=1)))


def run(args: argparse.Namespace, work: Callable[[argparse.Namespace, Settings], object]) -> int:
    """The exit status of a command line: work(args, settings) on --threads, its errors as one line; `python -X dev` shows where from."""
    settings = Settings.of(args)
    torch.manual_seed(args.seed)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        work(args, settings)
    except (OSError, ValueError, FloatingPointError) as error:  # CheckpointError and DataError are ValueErrors
        if sys.flags.dev_mode:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"stopped; the best model so far, if any, is in {args.out}; --resume goes on", file=sys.stderr)
        return 130
    return 0
