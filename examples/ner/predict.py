"""Tag a text with a saved model: `python -m examples.ner.predict --model runs/ner/model "Ada Lovelace was born in London."`."""

import argparse
import re
import sys

from transformers.utils import logging

from palm_kernels.train import CheckpointError

from . import report
from .batches import Encoder, tag
from .data import DataError, Sentence
from .train import load_model

MARKS = r"!-/:-@\[-`{-~\xa1\xab\xbb\xbf\u2010-\u2027\u2030-\u205e\u3001-\u3003\u3008-\u3011\uff01-\uff0f\uff1a-\uff20"
LETTERS = rf"[^\s{MARKS}]"  # all else, combining marks and emoji too
WORD = re.compile(rf"(?:[A-Za-z]\.){{2,}}|'(?:s|re|ve|ll|d|m)\b|{LETTERS}+(?:[-.,:/]{LETTERS}+)*|[{MARKS}]")


def words_of(text: str) -> list[str]:
    """The text cut as newspaper corpora are: words, numbers, clitics and each punctuation mark alone."""
    return WORD.findall(text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m examples.ner.predict", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("text", nargs="*", help="texts to tag; lines of standard input if absent")
    parser.add_argument("--model", metavar="DIR", default="runs/ner/model", help="folder of a saved token classifier")
    args = parser.parse_args(argv)
    logging.disable_progress_bar()
    texts = args.text or (line.rstrip("\n") for line in sys.stdin)
    try:
        model, tokenizer = load_model(args.model)
        labels = [model.config.id2label[i] for i in range(model.config.num_labels)]
        types = sorted({label[2:] for label in labels if label != "O"})
        encoder = Encoder(tokenizer, labels, model.config.max_position_embeddings)
        for text in texts:
            words = words_of(text)
            (tags,) = tag(model, encoder, [Sentence(words, ["O"] * len(words))])
            print(report.marked(words, tags, types, report.in_colour()))
    except (DataError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
