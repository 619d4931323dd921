"""Tag texts with a saved model: `python -m examples.ner.predict runs/ner/model "Ada Lovelace was born in London."`.

Any text does: a word of more sub-words than the model holds is judged by its beginning.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from palm_kernels.train import CheckpointError, Help

from . import report
from .batches import Encoder, tag
from .data import HAN, DataError, Sentence
from .train import load_model

MARKS = r"!-/:-@\[-`{-~\xa1\xab\xbb\xbf\u2010-\u2027\u2030-\u205e\u3001-\u3003\u3008-\u3011\uff01-\uff0f\uff1a-\uff20"
LETTERS = rf"[^\s{MARKS}{HAN}]"  # all else, combining marks and emoji too
WORD = re.compile(rf"(?:[A-Za-z]\.){{2,}}|'(?:s|re|ve|ll|d|m)\b|{LETTERS}+(?:[-.,:/]{LETTERS}+)*|[{MARKS}{HAN}]")


LINES = 64  # lines that are tagged together


def words_of(text: str) -> list[str]:
    """The text cut as corpora are: words, numbers, clitics, each punctuation mark and each Chinese character alone."""
    return WORD.findall(text)


def found_in(text: str, tags: list[str]) -> list[dict]:
    """The entities with their places in the text: [{"type", "start", "end", "text"}], characters from 0."""
    places = [m.span() for m in WORD.finditer(text)]
    spans = [(kind, places[first][0], places[end - 1][1]) for kind, first, end in report.entities(tags)]
    return [{"type": kind, "start": start, "end": end, "text": text[start:end]} for kind, start, end in spans]


def lines_of(args: argparse.Namespace) -> Iterator[str]:
    """The texts to tag: those given, else the lines of --file or of standard input; bytes that are no UTF-8 become U+FFFD."""
    if args.text:
        yield from args.text
        return
    with sys.stdin.buffer if args.file in (None, "-") else Path(args.file).open("rb") as source:
        for line in tqdm(source, "lines", unit="line", disable=args.file is None or not sys.stderr.isatty()):
            yield line.decode("utf-8", "replace").rstrip("\r\n")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.ner.predict", description=__doc__, formatter_class=Help)
    parser.add_argument("model", metavar="MODEL", help="folder of a saved token classifier, such as runs/ner/model")
    parser.add_argument("text", nargs="*", help="texts to tag; absent: the lines of --file")
    parser.add_argument("--file", metavar="F", help="a text file, a text on each line; absent or -: standard input")
    parser.add_argument("--json", action="store_true", help="a JSON line for each text: its entities with their places")
    args = parser.parse_args(argv)
    if args.text and args.file:
        parser.error("give texts or --file, not both")
    try:
        model, tokenizer = load_model(args.model)
        labels = [model.config.id2label[i] for i in range(model.config.num_labels)]
        types = sorted({label[2:] for label in labels if label != "O"})
        encoder = Encoder(tokenizer, labels, model.config.max_position_embeddings, shorten=True)
        lines = lines_of(args)
        while texts := list(islice(lines, LINES if args.file else 1)):
            words = [words_of(text) for text in texts]
            for text, ws, tags in zip(
                texts, words, tag(model, encoder, [Sentence(w, ["O"] * len(w)) for w in words]), strict=True
            ):
                if args.json:
                    print(json.dumps({"text": text, "entities": found_in(text, tags)}, ensure_ascii=False))
                else:
                    print(report.marked(ws, tags, types, report.in_colour()))
            sys.stdout.flush()
    except (DataError, CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
