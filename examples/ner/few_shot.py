"""Learn from k sentences a type, several times over: `python -m examples.ner.few_shot --data DIR --model DIR --shots 5 --draws 5`.

Each draw takes k sentences a type from train, as many from dev to choose the epoch by, and is judged on all of test.
"""

import argparse
import random
import statistics
import sys
from pathlib import Path

from palm_kernels.train import Settings

from ..command import facts, positive, run, write_json
from .data import Corpus, DataError, Sentence
from .train import corpus_of, learn, on_test, parser


def shots(sentences: list[Sentence], types: list[str], k: int, rng: random.Random, name: str) -> list[Sentence]:
    """Sentences in their order, drawn until each type is in at least k of them; one counts for every type that it holds."""
    kinds = [{tag[2:] for tag in s.tags} - {""} for s in sentences]
    chosen: set[int] = set()
    for kind in types:
        holders = [i for i, found in enumerate(kinds) if kind in found]
        if len(holders) < k:
            raise DataError(f"--shots {k}: only {len(holders)} sentences of {name} hold {kind}: ask for fewer")
        rng.shuffle(holders)
        missing = k - len(chosen & set(holders))
        chosen.update([i for i in holders if i not in chosen][: max(0, missing)])
    return [sentences[i] for i in sorted(chosen)]


def drawn(corpus: Corpus, k: int, seed: int, draw: int) -> Corpus:
    rng = random.Random(f"{seed} {draw}")
    parts = (shots(part, corpus.types, k, rng, name) for name, part in (("train", corpus.train), ("dev", corpus.dev)))
    return Corpus(*parts, corpus.test, corpus.types, corpus.notes)


def work(args: argparse.Namespace, settings: Settings) -> None:
    if args.resume:
        raise DataError("--resume goes on with one run, this makes several: use examples.ner.train on a draw")
    corpus, out, rows = corpus_of(args), Path(args.out), []
    for draw in range(args.draws):
        few = drawn(corpus, args.shots, settings.seed, draw)
        history = learn(args, settings, few, out / f"draw-{draw}", say=lambda line: None)
        scores, _, _ = on_test(args, corpus, out / f"draw-{draw}" / "model")
        best = max(row["dev_f1"] for row in history)
        rows.append({"draw": draw, "train": len(few.train), "dev": len(few.dev), "dev_f1": best, "test": scores})
        print(
            f"draw {draw}: {len(few.train)} sentences, dev F1 {best:.3f}, test F1 {scores['micro avg']['f1-score']:.3f}"
        )
    found = [row["test"]["micro avg"]["f1-score"] for row in rows]
    spread = statistics.stdev(found) if len(found) > 1 else 0.0
    told = {"shots": args.shots, "mean": statistics.mean(found), "standard_deviation": spread, "draws": rows}
    written = write_json(out / "few_shot.json", {**told, **facts(args)})
    print(
        f"\n{args.shots} sentences a type, {len(found)} draws: test micro-F1 {told['mean']:.3f} ± {spread:.3f} (standard deviation)"
    )
    print(f"written: {written}, and a run for each draw")


def main(argv: list[str] | None = None) -> int:
    options = parser("few_shot", "Fine-tune on k sentences a type, and give mean and spread over draws.")
    options.add_argument("--shots", type=positive, default=5, help="sentences that hold a type, for each type")
    options.add_argument("--draws", type=positive, default=5, help="times that they are drawn")
    options.set_defaults(out="runs/few_shot", epochs=60)
    return run(options.parse_args(argv), work)


if __name__ == "__main__":
    sys.exit(main())
