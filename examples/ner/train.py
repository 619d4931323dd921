"""Fine-tune a PaLM token classifier on named entities: `python -m examples.ner.train [--data DIR]`.

Everything is here in one loop: data -> sub-words -> batches -> PaLMForTokenClassification (whose forward and backward are
palm_kernels) -> AdamW -> entity F1 on dev after each epoch -> the best model, saved -> the report on test.
"""

import argparse
import json
import math
import random
import shutil
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm
from transformers.utils import logging

import palm_kernels as pk
from palm_kernels.models import PaLMConfig, PaLMForTokenClassification, PaLMTokenizer

from . import report, synthetic
from .augment import mentions, swap_mentions, weak_masking
from .batches import Encoder, shuffled, tag
from .data import Corpus, DataError, load


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return int(text)


def share(text: str) -> float:
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return float(text)


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Help that shows each default, but not "None" where the text says what absence means."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.ner.train",
        description="Fine-tune a PaLM on named entities and report entity-level precision, recall and F1.",
        formatter_class=Help,
    )
    add = parser.add_argument_group("data and files").add_argument
    add("--data", metavar="DIR", help="folder of CoNLL-style files, or one file; absent: a synthetic corpus")
    add("--model", metavar="DIR", help="start from this saved model and its tokenizer; absent: from random weights")
    add("--out", metavar="DIR", default="runs/ner", help="where the model, metrics and pictures go")
    add = parser.add_argument_group("model (those marked * come from --model where it is given)").add_argument
    add("--vocab", type=positive, default=2000, help="* sub-words learnt from train; 260 are bytes and special tokens")
    add("--hidden", type=positive, default=192, help="* model dim")
    add("--intermediate", type=positive, default=384, help="* feed-forward dim")
    add("--layers", type=positive, default=3, help="* parallel blocks")
    add("--heads", type=positive, default=4, help="* query heads, over one key/value head")
    add("--head-dim", type=positive, default=48, help="* dim of a head")
    add("--embedding-std", type=float, default=0.5, help="* standard deviation of new embeddings")
    add("--attention", choices=("bidirectional", "causal"), default="bidirectional", help="which words a word sees")
    add("--window", type=positive, help="sub-words that a word sees on each side; absent: all, or as --model")
    add(
        "--max-length",
        type=positive,
        help="sub-words in a row, longer sentences are cut; absent: 256, or --model's limit",
    )
    add("--dropout", type=share, default=0.2, help="of embeddings and of the classifier's input (probability)")
    add = parser.add_argument_group("augmentation").add_argument
    add("--swap", type=share, default=0.5, help="entities replaced by another of their type (share)")
    add("--mask", type=share, default=0.15, help="words masked (share)")
    add("--soft", type=share, default=0.0, help="words mixed with a random token: soft weak masking (share)")
    add("--natural", type=share, default=0.3, help="sentences spaced as running text (share)")
    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=positive, default=20, help="passes over the training data")
    add("--batch", type=positive, default=16, help="sentences in a step")
    add("--lr", type=float, default=1e-3, help="peak learning rate of AdamW")
    add("--final-lr", type=float, default=1e-5, help="learning rate at the end")
    add("--schedule", choices=("cosine", "epoch-decay"), default="cosine", help="epoch-decay: geometric, by the epoch")
    add("--warmup", type=share, default=0.1, help="steps in which the learning rate rises (share)")
    add("--weight-decay", type=float, default=0.1, help="of AdamW, on matrices")
    add("--clip", type=float, default=1.0, help="largest norm of the gradient")
    add("--seed", type=int, default=0, help="of weights, order and augmentation")
    add("--threads", type=positive, help="CPU threads; absent: as many as torch chooses")
    return parser.parse_args(argv)


def learning_rate(args: argparse.Namespace, step: int, epoch: int, steps: int) -> float:
    """Linear warm-up, then half a cosine over the steps, or lr (final/lr)^(e/(E-1)) by the epoch e of E."""
    rise = min(1.0, (step + 1) / max(1, round(args.warmup * steps)))
    if args.schedule == "cosine":
        return rise * (args.final_lr + (args.lr - args.final_lr) * 0.5 * (1 + math.cos(math.pi * step / steps)))
    return rise * args.lr * (args.final_lr / args.lr) ** (epoch / max(1, args.epochs - 1))


def build(args: argparse.Namespace, corpus: Corpus) -> tuple[PaLMForTokenClassification, PaLMTokenizer]:
    """A new model and tokenizer, or those of --model with a classifier for this corpus's labels."""
    labels = {
        "num_labels": len(corpus.labels),
        "id2label": dict(enumerate(corpus.labels)),
        "label2id": {label: i for i, label in enumerate(corpus.labels)},
    }
    both = {
        "attention": args.attention,
        "embedding_dropout": args.dropout,
        "classifier_dropout": args.dropout,
        **labels,
    }
    if args.window:
        both["sliding_window"] = args.window
    if args.model:
        return load_model(args.model, **both)
    tokenizer = PaLMTokenizer.train([s.words for s in corpus.train], args.vocab)
    config = PaLMConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        head_dim=args.head_dim,
        max_position_embeddings=args.max_length or 256,
        embedding_std=args.embedding_std,
        **both,
    )
    return PaLMForTokenClassification(config), tokenizer


def load_model(folder: str | Path, **config) -> tuple[PaLMForTokenClassification, PaLMTokenizer]:
    """A saved model and its tokenizer, config fields replaced; a classifier of another size starts anew."""
    if not (Path(folder) / "config.json").is_file():
        raise DataError(f"{folder}: no saved model (no config.json in it)")
    model = PaLMForTokenClassification.from_pretrained(folder, ignore_mismatched_sizes=True, **config)
    tokenizer = PaLMTokenizer.from_pretrained(folder)
    if len(tokenizer) > model.config.vocab_size:
        raise DataError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, the model {model.config.vocab_size}: not a pair"
        )
    return model, tokenizer


def row_limit(args: argparse.Namespace, model: PaLMForTokenClassification) -> int:
    """Sub-words in a row: --max-length, which the model must be able to hold."""
    limit = model.config.max_position_embeddings
    if args.max_length and args.max_length > limit:
        raise DataError(f"--max-length is {args.max_length}, the model holds {limit} tokens: set at most that")
    return args.max_length or limit


def save(folder: Path, model: PaLMForTokenClassification, tokenizer: PaLMTokenizer) -> None:
    """Write the model beside `folder`, then rename: an interrupted run leaves the old model or the new one, whole."""
    partial, old = (folder.with_name(f"{folder.name}.{suffix}") for suffix in ("partial", "old"))
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def optimiser(args: argparse.Namespace, model) -> torch.optim.Optimizer:
    """AdamW, weight decay on matrices alone."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=args.lr)


def train(args: argparse.Namespace, corpus: Corpus, model, tokenizer) -> list[dict[str, float]]:
    """The loop; returns {"epoch", "loss", "dev_f1", "lr", "seconds"} of each epoch and leaves the best model in out/model."""
    rng, generator = random.Random(args.seed), torch.Generator().manual_seed(args.seed)
    encoder = Encoder(tokenizer, corpus.labels, row_limit(args, model))
    pool, gold = mentions(corpus.train), [s.tags for s in corpus.dev]
    optimizer, step, start, best = optimiser(args, model), 0, time.perf_counter(), -1.0
    history: list[dict[str, float]] = []
    for epoch in range(args.epochs):
        model.train()
        sentences = [swap_mentions(s, pool, args.swap, rng) for s in corpus.train]
        rows = [row for s in sentences for row in encoder.rows(s, natural=rng.random() < args.natural)]
        batches, losses = shuffled(rows, args.batch, tokenizer.pad_token_id, rng), []
        for batch in tqdm(batches, f"epoch {epoch + 1}", unit="batch", leave=False, disable=not sys.stderr.isatty()):
            strength, source_ids = weak_masking(batch, args.mask, args.soft, generator)
            masking = {"strength": strength, "source_ids": source_ids}
            loss = model(batch.ids, attention_mask=batch.mask, labels=batch.labels, **masking).loss
            losses.append(loss.item())
            lr = learning_rate(args, step, epoch, len(batches) * args.epochs)
            stop_if_broken(losses[-1], epoch, step, lr, args)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()
            step += 1
        dev = report.micro_f1(gold, tag(model, encoder, corpus.dev))
        mean, seconds = sum(losses) / len(losses), time.perf_counter() - start
        history.append({"epoch": epoch + 1, "loss": mean, "dev_f1": dev, "lr": lr, "seconds": seconds})
        if dev > best:
            save(Path(args.out) / "model", model, tokenizer)
        star, best = "*" if dev > best else " ", max(dev, best)
        print(f"epoch {epoch + 1:3}  loss {mean:.3f}  dev F1 {dev:.3f} {star} {seconds:5.0f} s", flush=True)
    return history


def stop_if_broken(loss: float, epoch: int, step: int, lr: float, args: argparse.Namespace) -> None:
    """End the run at the first loss that is not a number: nothing after it could be saved."""
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"epoch {epoch + 1}, step {step + 1}: the loss is {loss} at learning rate {lr:.2e}: lower --lr (now {args.lr:g}) or "
            f"--clip (now {args.clip:g}), or raise --warmup; the best model so far, if any, is in {Path(args.out) / 'model'}"
        )


def finish(args: argparse.Namespace, corpus: Corpus, history: list[dict[str, float]]) -> None:
    """Load the best model as a user would, and report on test."""
    out = Path(args.out)
    model, tokenizer = load_model(out / "model")
    encoder = Encoder(tokenizer, corpus.labels, row_limit(args, model))
    found, gold = tag(model, encoder, corpus.test), [s.tags for s in corpus.test]
    result = report.scores(gold, found)
    best = max(history, key=lambda row: row["dev_f1"])
    print(f"\ntest, model of epoch {best['epoch']} (best dev F1 {best['dev_f1']:.3f})\n\n{report.table(result)}\n")
    print(report.examples(corpus.test, found, corpus.types))
    counts = report.confusion(gold, found, corpus.types)
    metrics = {"test": result, "history": history, "types": corpus.types, "confusion": counts, "arguments": vars(args)}
    written = report.replaced(out / "metrics.json", lambda path: path.write_text(json.dumps(metrics, indent=1)))
    files = [out / "model", written, *report.pictures(out, history, counts, corpus.types)]
    print("\nwritten: " + ", ".join(map(str, files)))
    print(
        f'tag a text: python -m examples.ner.predict --model {out / "model"} "Ada Lovelace met Charles Babbage in London."'
    )


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    logging.disable_progress_bar()  # transformers' own, for each file saved
    torch.manual_seed(args.seed)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        corpus = load(args.data) if args.data else synthetic.make()
        Path(args.out).mkdir(parents=True, exist_ok=True)
        model, tokenizer = build(args, corpus)
        print(f"data: {args.data or 'synthetic'}; {'; '.join(corpus.notes)}")
        print(
            f"  {len(corpus.train)} train, {len(corpus.dev)} dev, {len(corpus.test)} test sentences; {', '.join(corpus.types)}"
        )
        print(
            f"model: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {len(tokenizer)} sub-words, "
            f"{args.attention} attention, palm_kernels {pk.__version__}, {torch.get_num_threads()} threads\n"
        )
        finish(args, corpus, train(args, corpus, model, tokenizer))
    except (DataError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"stopped; the best model so far, if any, is in {Path(args.out) / 'model'}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
