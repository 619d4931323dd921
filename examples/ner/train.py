"""Fine-tune a PaLM token classifier on named entities: `python -m examples.ner.train [--data DIR]`.

Data -> sub-words -> batches -> PaLMForTokenClassification (whose forward and backward are palm_kernels) -> palm_kernels.train's loop with
entity F1 on dev after each epoch -> the best model, saved -> the report on test.
"""

import argparse
import sys
from pathlib import Path

import torch

import palm_kernels as pk
from palm_kernels.models import PaLMConfig, PaLMForTokenClassification, PaLMTokenizer
from palm_kernels.train import Help, Settings, fit
from palm_kernels.train import load_model as load_pair

from ..command import add_files, facts, positive, replaced, run, share, write_json
from . import report, synthetic
from .augment import mentions, swap_mentions, weak_masking
from .batches import Encoder, best_tags, shuffled, tag, word_scores
from .data import Corpus, DataError, load
from .download import DATASETS, dataset


def parser(prog: str, description: str) -> argparse.ArgumentParser:
    """The options of a run."""
    parser = argparse.ArgumentParser(
        prog=f"python -m examples.ner.{prog}", description=description, formatter_class=Help
    )
    group = parser.add_argument_group("data and files")
    data, add = group.add_mutually_exclusive_group().add_argument, group.add_argument
    data("--data", metavar="DIR", help="folder of CoNLL-style files, or one file; absent: a synthetic corpus")
    data("--dataset", choices=tuple(DATASETS), help="a corpus to download, once")
    add("--model", metavar="DIR", help="start from this saved model and its tokenizer; absent: from random weights")
    add_files(group, "runs/ner")
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
    add(
        "--tune",
        choices=("all", "lora", "head"),
        default="all",
        help="every weight; adapters on the blocks' projections beside a frozen --model, and the classifier; the classifier alone",
    )
    add("--rank", type=positive, default=8, help="of lora's adapters")
    add = parser.add_argument_group("augmentation").add_argument
    add("--swap", type=share, default=0.5, help="entities replaced by another of their type (share)")
    add("--mask", type=share, default=0.15, help="words masked (share)")
    add("--soft", type=share, default=0.0, help="words mixed with a random token: soft weak masking (share)")
    add("--natural", type=share, default=0.3, help="sentences spaced as running text (share)")
    group = parser.add_argument_group("optimisation")
    group.add_argument("--batch", type=positive, default=16, help="sentences in a batch")
    Settings.add_to(group, epochs=20, lr=1e-3)
    return parser


def corpus_of(args: argparse.Namespace) -> Corpus:
    if args.dataset:
        return load(dataset(args.dataset))
    return load(args.data) if args.data else synthetic.make()


def build(args: argparse.Namespace, corpus: Corpus) -> tuple[PaLMForTokenClassification, PaLMTokenizer]:
    """A new model and tokenizer, or those of --model (or of the run to go on with) with a classifier for this corpus's labels."""
    if args.tune != "all" and not (args.model or args.resume):
        raise DataError(f"--tune {args.tune} leaves the trunk as it is: name a trained one with --model")
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
    if args.resume:
        return load_model(Path(args.out) / "last", weights=False, **both)
    if args.model:
        model, tokenizer = load_model(args.model, **both)
        saved = PaLMConfig.from_pretrained(args.model).id2label
        if list(saved.values()) != corpus.labels:  # as many, perhaps, but with other meanings
            model._init_weights(model.score)
        return model, tokenizer
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


def load_model(folder: str | Path, **keywords) -> tuple[PaLMForTokenClassification, PaLMTokenizer]:
    """A saved model and its tokenizer: palm_kernels.train.load_model."""
    return load_pair(PaLMForTokenClassification, PaLMTokenizer, folder, **keywords)


def tuned(args: argparse.Namespace, model: PaLMForTokenClassification):
    """The model with what --tune leaves alone frozen; "lora" wraps it by PEFT (Hu 2021)."""
    if args.tune == "all":
        return model
    if args.tune == "head":
        model.model.requires_grad_(False)
        return model
    from peft import LoraConfig, get_peft_model

    targets = ["in_proj", "out_proj"]
    return get_peft_model(
        model, LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules=targets, modules_to_save=["score"])
    )


def row_limit(args: argparse.Namespace, model: PaLMForTokenClassification) -> int:
    """Sub-words in a row: --max-length, which the model must be able to hold."""
    limit = model.config.max_position_embeddings
    if args.max_length and args.max_length > limit:
        raise DataError(f"--max-length is {args.max_length}, the model holds {limit} tokens: set at most that")
    return args.max_length or limit


class NamedEntities:
    """The objective: words labelled with entities, augmented anew in each epoch; entity F1 on dev chooses the best model."""

    metric, larger = "dev_f1", True

    def __init__(
        self, args: argparse.Namespace, corpus: Corpus, model: PaLMForTokenClassification, tokenizer: PaLMTokenizer
    ):
        self.args, self.corpus, self.pad_id = args, corpus, tokenizer.pad_token_id
        self.encoder = Encoder(tokenizer, corpus.labels, row_limit(args, model))
        self.pool, self.gold = mentions(corpus.train), [s.tags for s in corpus.dev]

    def epoch(self, rng):
        sentences = [swap_mentions(s, self.pool, self.args.swap, rng) for s in self.corpus.train]
        rows = [row for s in sentences for row in self.encoder.rows(s, natural=rng.random() < self.args.natural)]
        return shuffled(rows, self.args.batch, self.pad_id, rng)

    def inputs(self, batch, generator):
        strength, source_ids = weak_masking(batch, self.args.mask, self.args.soft, generator)
        masking = {"strength": strength, "source_ids": source_ids}
        return {"input_ids": batch.ids, "attention_mask": batch.mask, "labels": batch.labels, **masking}

    def items(self, inputs):
        return int((inputs["labels"] != -100).sum())

    def evaluate(self, model):
        return {self.metric: report.micro_f1(self.gold, tag(model, self.encoder, self.corpus.dev))}


def learn(args: argparse.Namespace, settings: Settings, corpus: Corpus, out: Path, say=print) -> list[dict[str, float]]:
    """Train as the options say; out/model is the best."""
    torch.manual_seed(settings.seed)
    model, tokenizer = build(args, corpus)
    objective = NamedEntities(args, corpus, model, tokenizer)
    model = tuned(args, model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    say(
        f"model: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {trained:.2f} M trained, {len(tokenizer)} sub-words, "
        f"{args.attention} attention, palm_kernels {pk.__version__}, {torch.get_num_threads()} threads\n"
    )
    return fit(model, objective, settings, out, tokenizer=tokenizer, best="model", resume=args.resume, say=say)


def on_test(args: argparse.Namespace, corpus: Corpus, folder: Path):
    """(scores of the table, tags, log-probabilities) of test by a saved model, loaded as a user would."""
    model, tokenizer = load_model(folder)
    encoder = Encoder(tokenizer, corpus.labels, row_limit(args, model))
    logs = word_scores(model, encoder, corpus.test)
    found = best_tags(logs, corpus.labels)
    return report.scores([s.tags for s in corpus.test], found), found, logs


def finish(args: argparse.Namespace, corpus: Corpus, history: list[dict[str, float]]) -> None:
    """The report on test."""
    out, gold = Path(args.out), [s.tags for s in corpus.test]
    result, found, logs = on_test(args, corpus, out / "model")
    best = max(history, key=lambda row: row["dev_f1"])
    print(f"\ntest, model of epoch {best['epoch']} (best dev F1 {best['dev_f1']:.3f})\n\n{report.table(result)}\n")
    print(report.examples(corpus.test, found, corpus.types))
    counts = report.confusion(gold, found, corpus.types)
    metrics = {"test": result, "history": history, "types": corpus.types, "confusion": counts, **facts(args)}
    written = write_json(out / "metrics.json", metrics)
    errors = report.worst(corpus.test, found, logs, corpus.labels)
    told = replaced(out / "errors.txt", lambda path: path.write_text(errors))
    files = [out / "model", written, told, *report.picture(out, counts, corpus.types), out / "learning_curve.png"]
    print(f"\n{errors.partition(chr(10))[0]}\n\nwritten: " + ", ".join(map(str, files)))
    print(f'tag a text: python -m examples.ner.predict {out / "model"} "Ada Lovelace met Charles Babbage in London."')


def work(args: argparse.Namespace, settings: Settings) -> None:
    corpus = corpus_of(args)
    print(f"data: {args.data or args.dataset or 'synthetic'}; {'; '.join(corpus.notes)}")
    sizes = f"{len(corpus.train)} train, {len(corpus.dev)} dev, {len(corpus.test)} test sentences"
    print(f"  {sizes}; {', '.join(corpus.types)}")
    finish(args, corpus, learn(args, settings, corpus, Path(args.out)))


def main(argv: list[str] | None = None) -> int:
    told = "Fine-tune a PaLM on named entities and report entity-level precision, recall and F1."
    return run(parser("train", told).parse_args(argv), work)


if __name__ == "__main__":
    sys.exit(main())
