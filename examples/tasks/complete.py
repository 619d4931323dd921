"""Target-only fine-tuning of a causal language model: `python -m examples.tasks.complete [--corpus NAME | --data FILE]`.

Lines {"prompt": ..., "target": ...}. A row is the prompt, a blank, the target and </s>; the loss is that of the target and </s>
alone. Scored are greedy completions: the share that is right to the letter, and ROUGE-L.
"""

import argparse
import sys

import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.neighbors import NearestNeighbors

from palm_kernels.models import PaLMForCausalLM
from palm_kernels.train import Settings

from ..command import run
from . import corpora, scores
from .common import DataError, Example, arguments, build, load, report, text_of, train


def check(example: Example) -> None:
    text_of(example, "prompt", "target")


def prompt_ids(examples: list[Example], tokenizer) -> list[list[int]]:
    return tokenizer([e["prompt"].rstrip() for e in examples], add_special_tokens=False)["input_ids"]


def rows_of(examples: list[Example], tokenizer, length: int) -> list[dict]:
    """Prompt, target and </s> in at most `length` sub-words, labels on the last two; a prompt that is too long loses its beginning."""
    rows, longer = [], 0
    targets = tokenizer([f" {e['target'].strip()}" for e in examples], add_special_tokens=False)["input_ids"]
    for example, prompt, target in zip(examples, prompt_ids(examples, tokenizer), targets, strict=True):
        target = [*target, tokenizer.eos_token_id]
        room = length - len(target)
        if room < 1:
            raise DataError(
                f"{example.get('where', 'target')}: the target has {len(target) - 1} sub-words, a row holds {length} with </s> and "
                "a prompt: raise --length"
            )
        longer += len(prompt) > room
        prompt = prompt[-room:]
        rows.append({"input_ids": [*prompt, *target], "labels": [*[-100] * len(prompt), *target]})
    if longer:
        print(f"  {longer} of {len(rows)} prompts do not fit with their target and lose their beginning (--length)")
    return rows


def completions(model, tokenizer, examples: list[Example], length: int, most: int, size: int = 32) -> list[str]:
    """What the model writes after each prompt: greedy, `most` sub-words or up to </s>, in left-padded batches."""
    model.eval()
    prompts, found = [ids[-max(1, length - most) :] for ids in prompt_ids(examples, tokenizer)], [""] * len(examples)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), size):
        which = order[start : start + size]
        inputs = tokenizer.pad({"input_ids": [prompts[i] for i in which]}, padding_side="left", return_tensors="pt")
        with torch.inference_mode():
            out = model.generate(**inputs.to(model.device), max_new_tokens=most, do_sample=False)
        for i, ids in zip(which, out[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
            end = ids.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in ids else len(ids)
            found[i] = tokenizer.decode(ids[:end]).strip()
    return found


def nearest_targets(train: list[Example], test: list[Example]) -> list[str]:
    """The target of the training prompt that shares most (tf-idf, cosine) with each prompt of test: memory without understanding."""
    vectors = TfidfVectorizer(token_pattern=r"\S+").fit([e["prompt"] for e in train])
    near = NearestNeighbors(n_neighbors=1, metric="cosine").fit(vectors.transform([e["prompt"] for e in train]))
    which = near.kneighbors(vectors.transform([e["prompt"] for e in test]), return_distance=False)
    return [train[i]["target"] for i in which[:, 0]]


def work(args: argparse.Namespace, settings: Settings) -> None:
    parts = load(args, check, "prompt", lambda: corpora.make(corpora.COMPLETIONS[args.corpus]))
    texts = [f"{e['prompt'].rstrip()} {e['target'].strip()}" for e in parts["train"]]
    model, tokenizer = build(args, PaLMForCausalLM, texts)
    rows = rows_of(parts["train"], tokenizer, args.length)
    most = max(sum(label != -100 for label in row["labels"]) for row in rows)
    gold = {part: [e["target"] for e in parts[part]] for part in parts}

    def scored(model, part="dev"):
        return scores.of_completions(gold[part], completions(model, tokenizer, parts[part], args.length, most))

    best = train(args, settings, model, tokenizer, rows, scored, "rouge_l")
    trivial = scores.of_completions(gold["test"], nearest_targets(parts["train"], parts["test"]))
    report(args, len(gold["test"]), scored(best, "test"), trivial, "nearest in train")
    shown = parts["test"][:2]
    for example, text in zip(shown, completions(best, tokenizer, shown, args.length, most), strict=True):
        print(f"\n{example['prompt']}\n  --> {text}")


def main(argv: list[str] | None = None) -> int:
    parser = arguments("complete", __doc__ or "", epochs=3, hidden=128, layers=3, lr=2e-3)
    parser.add_argument(
        "--corpus", choices=sorted(corpora.COMPLETIONS), default="summarisation", help="which toy corpus"
    )
    return run(parser.parse_args(argv), work)


if __name__ == "__main__":
    sys.exit(main())
