"""Pre-train a small PaLM on text files: `python -m examples.pretrain.pretrain [TEXT...] [--objective causal | hard | weak]`.

Without files it takes English prose that every Python carries (the language reference, pydoc_data.topics). It learns a tokenizer, trains,
and ends with the held-out figure and, for causal, continuations of a held-out text.
"""

import argparse
import sys
from pathlib import Path

import torch

import palm_kernels as pk
from palm_kernels.models import PaLMForCausalLM, PaLMForMaskedLM, PaLMTokenizer
from palm_kernels.train import Help, Language, MaskedLanguage, Settings, fit, load_model

from ..command import add_files, add_model, new_config, run


def texts(paths: list[str]) -> list[str]:
    """Each file's text, or the built-in prose."""
    if not paths:
        from pydoc_data.topics import topics

        return [topics[name] for name in sorted(topics)]
    found = []
    for path in paths:
        try:
            found.append(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise SystemExit(f"error: {path}: {error}") from error
    return found


def encode(tokenizer: PaLMTokenizer, documents: list[str]) -> torch.Tensor:
    """All documents' ids in one row, the end-of-text token after each."""
    rows = tokenizer(documents, add_special_tokens=False)["input_ids"]
    return torch.tensor([i for row in rows for i in (*row, tokenizer.eos_token_id)])


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.pretrain.pretrain",
        description=__doc__,
        formatter_class=Help,
    )
    group = parser.add_argument_group("data and files")
    add = group.add_argument
    add("text", nargs="*", metavar="TEXT", help="UTF-8 text files; none: the prose that Python carries")
    add_files(group, "runs/pretrain")
    add(
        "--objective",
        choices=("causal", "hard", "weak"),
        default="causal",
        help="the next token, or masked tokens (README)",
    )
    add_model(parser.add_argument_group("model"))
    group = parser.add_argument_group("optimisation")
    Settings.add_to(group, lr=2e-3, final_lr=1e-4, epochs=8)
    return parser.parse_args(argv)


def build(args: argparse.Namespace, documents: list[str]):
    """(model, tokenizer): new ones, or those of the run to go on with."""
    kind = PaLMForCausalLM if args.objective == "causal" else PaLMForMaskedLM
    if args.resume:
        return load_model(kind, PaLMTokenizer, Path(args.out) / "last", weights=False)
    tokenizer = PaLMTokenizer.train(documents, args.vocab)
    attention = "causal" if args.objective == "causal" else "bidirectional"
    return kind(new_config(args, tokenizer, attention=attention)), tokenizer


@torch.no_grad()
def show_continuations(model, tokenizer, rows: torch.Tensor, count: int = 3) -> None:
    """The first half of some held-out rows and what the model makes of it."""
    model.eval()
    half = rows.shape[1] // 2
    for row in rows[:: max(1, len(rows) // count)][:count]:
        ids = row[None, :half]
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)[0, half:]
        print(f"\n  ... {tokenizer.decode(ids[0, -24:])!r}\n  --> {tokenizer.decode(out)!r}")


def work(args: argparse.Namespace, settings: Settings) -> None:
    documents = texts(args.text)
    model, tokenizer = build(args, documents)
    ids = encode(tokenizer, documents)
    if args.objective == "causal":
        objective = Language(ids, args.length, args.batch)
    else:
        objective = MaskedLanguage(ids, args.length, args.batch, len(tokenizer), args.objective)
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(
        f"{args.objective}: {len(ids):,} tokens in rows of {args.length}, {len(objective.dev)} rows held out; {size:.2f} M parameters, "
        f"{len(tokenizer)} sub-words, palm_kernels {pk.__version__}, {torch.get_num_threads()} threads"
    )
    history = fit(model, objective, settings, args.out, tokenizer=tokenizer, resume=args.resume)
    best = min(history, key=lambda record: record[objective.metric])
    print(f"best: epoch {best['epoch']}, " + ", ".join(f"{k} {best[k]:.4g}" for k in objective.evaluate(model)))
    if args.objective == "causal":
        show_continuations(model, tokenizer, objective.dev)
    print(f"\nwritten: {Path(args.out) / 'best'} (the model), metrics.jsonl, learning_curve.png")


def main(argv: list[str] | None = None) -> int:
    return run(arguments(argv), work)


if __name__ == "__main__":
    sys.exit(main())
