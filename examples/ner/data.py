"""CoNLL-style files as they are found in the wild, read into sentences with strict IOB2 tags.

One word a line with its tag in the last column (or the first, in two columns), a blank line between sentences. Two to four columns,
separated by tabs or by blanks; `-DOCSTART-` lines, comments, CRLF, a byte order mark and runs of blank lines are understood. Tags
may be IOB1, IOB2 or BIOES under any of its names (BILOU, BMES, BMEWO); what comes out is always IOB2.
"""

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

TAG = re.compile(r"O|[BIOESLUMW]-\S+")
HAN = r"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003fffd"  # Chinese corpora have a character a line
CANONICAL = {"L": "E", "U": "S", "W": "S", "M": "I"}  # other names of the BIOES letters
ROLES = {  # eng.testa is CoNLL-2003's dev set and eng.testb its test set, so dev is looked for before test
    "train": re.compile(r"train"),
    "dev": re.compile(r"testa|dev|valid|(?<![a-z])val(?![a-z])"),
    "test": re.compile(r"test"),
}
SUFFIXES = {
    "",
    ".conll",
    ".conll03",
    ".txt",
    ".tsv",
    ".iob",
    ".iob2",
    ".bio",
    ".data",
    ".train",
    ".dev",
    ".valid",
    ".test",
}
SUFFIXES |= {".testa", ".testb", ".annotated", ".bioes", ".bmes", ".char", ".ner", ".utf8"}


class DataError(ValueError):
    """What is wrong with a data file, where, and the way out."""


@dataclass
class Sentence:
    """Words and their tags; `where` is file:line of the first word, lines[i] the line of word i."""

    words: list[str]
    tags: list[str]
    where: str = ""
    lines: list[int] = field(default_factory=list)


@dataclass
class Corpus:
    """Three splits in IOB2, the entity types of train in alphabetical order, and what a reader should be told."""

    train: list[Sentence]
    dev: list[Sentence]
    test: list[Sentence]
    types: list[str]
    notes: list[str]

    @property
    def labels(self) -> list[str]:
        """O, B-x, I-x for each type: index = class of the model."""
        return ["O", *(f"{letter}-{kind}" for kind in self.types for letter in "BI")]


# Reading one file


def decode(path: Path) -> str:
    """The text of a UTF-8 file, without its byte order mark."""
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    raw = path.read_bytes()
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in raw[:1000]:
        raise DataError(f"{path}: looks like UTF-16, need UTF-8: convert it with `iconv -f UTF-16 -t UTF-8`")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}:{line}: byte {raw[error.start]:#04x} is not UTF-8: find the file's encoding and convert it, "
            "for example with `iconv -f ISO-8859-1 -t UTF-8`"
        ) from None


def split_rows(text: str) -> list[list[str]]:
    """One list of cells a line, [] for a blank one.

    Lines end at LF, CRLF or CR and at nothing else: str.splitlines and str.split would also break words that hold a no-break
    space, U+2028 or U+0085. Where most lines hold a tab, only tabs separate, so that a word may look empty.
    """
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    filled = [line for line in lines if line.strip(" \t")]
    tabbed = 2 * sum("\t" in line for line in filled) > len(filled)
    separator = re.compile(r"\t" if tabbed else r"[ \t]+")
    return [separator.split(line.rstrip(" \t")) if line.strip(" \t") else [] for line in lines]


def is_mark(cells: list[str], starts: bool) -> bool:
    """A document boundary, or a comment: `# id 17` in front of a sentence, but not the word `#` with its tag."""
    return cells[0] == "-DOCSTART-" or (starts and cells[0].startswith("#") and not TAG.fullmatch(cells[-1].strip()))


def columns(path: Path, rows: list[tuple[int, list[str]]]) -> tuple[int, int, int]:
    """(how many columns, the word's, the tag's) of a file, judged by most of its lines."""
    count = Counter(len(cells) for _, cells in rows).most_common(1)[0][0]
    number, cells = next((n, c) for n, c in rows if len(c) == count)
    if count == 1:
        raise DataError(f"{path}:{number}: {cells[0]!r} has no tag: need 2 to 4 columns, word first, tag last")
    if count > 4:
        raise DataError(
            f"{path}:{number}: {count} columns, need 2 to 4, word first, tag last: choose them, for example with "
            f"`cut -f1,{count}`"
        )

    def share(column):
        return sum(len(c) == count and TAG.fullmatch(c[column].strip()) is not None for _, c in rows) / len(rows)

    if share(-1) >= 0.5:
        return count, 0, count - 1
    if count == 2 and share(0) >= 0.5:
        return count, 1, 0
    raise DataError(
        f"{path}:{number}: unknown column layout: {cells[-1]!r} in the last column is no tag (O, B-x, I-x, E-x, S-x); "
        "need 2 to 4 columns, word first, tag last"
    )


def read_conll(path: str | Path) -> list[Sentence]:
    """The sentences of one file, tags as they stand there."""
    path = Path(path)
    numbered, starts = [], True
    for number, cells in enumerate(split_rows(decode(path)), 1):
        mark = bool(cells) and is_mark(cells, starts)
        numbered.append((number, [] if mark else cells))
        starts = not cells or mark
    rows = [(number, cells) for number, cells in numbered if cells]
    if not rows:
        raise DataError(f"{path}: the file is empty: need one word and one tag a line")
    count, word, tag = columns(path, rows)
    sentences: list[Sentence] = []
    inside = False
    for number, cells in numbered:
        if not cells:
            inside = False
            continue
        check_row(path, number, cells, count, tag)
        if not inside:
            sentences.append(Sentence([], [], f"{path}:{number}"))
            inside = True
        sentences[-1].words.append(cells[word])
        sentences[-1].tags.append(cells[tag].strip())
        sentences[-1].lines.append(number)
    return sentences


def check_row(path: Path, number: int, cells: list[str], count: int, tag: int) -> None:
    if len(cells) < count:
        raise DataError(f"{path}:{number}: {cells[0]!r} has no tag: {len(cells)} columns, other lines have {count}")
    if len(cells) > count:
        raise DataError(f"{path}:{number}: {len(cells)} columns, other lines have {count}: does a word hold a blank?")
    if not TAG.fullmatch(cells[tag].strip()):
        raise DataError(f"{path}:{number}: {cells[tag]!r} is no tag: need O, B-x, I-x, E-x or S-x")


# Tag schemes


def entities(tags: list[str]) -> list[tuple[str, int, int]]:
    """(type, first, end) of every entity under any scheme.

    An entity starts at B or S, and at I or E where none of its type is open; it ends after E or S. This reads IOB1, IOB2 and
    BIOES alike, and repairs what is broken in them as conlleval does.
    """
    found: list[tuple[str, int, int]] = []
    is_open = False
    for i, tag in enumerate(tags):
        letter, _, kind = tag.partition("-")
        letter = CANONICAL.get(letter, letter)
        if letter == "O":
            is_open = False
            continue
        if letter in "IE" and is_open and found[-1][0] == kind:
            found[-1] = (kind, found[-1][1], i + 1)
        else:
            found.append((kind, i, i + 1))
        is_open = letter in "BI"
    return found


def iob2(tags: list[str]) -> list[str]:
    """The same entities in strict IOB2: B- starts every one, I- goes on."""
    out = ["O"] * len(tags)
    for kind, first, end in entities(tags):
        out[first:end] = [f"B-{kind}"] + [f"I-{kind}"] * (end - first - 1)
    return out


def scheme(sentences: list[Sentence]) -> str:
    """The name of the scheme that a data set's tags are in."""
    letters = {tag[0] for s in sentences for tag in s.tags}
    if letters - set("BIO"):
        return "BIOES"
    orphans = starts = 0  # I- without an open entity; B- without an entity of its type right before
    for s in sentences:
        for before, tag in zip(["O", *s.tags], s.tags, strict=False):
            orphans += tag[0] == "I" and before[1:] != tag[1:]
            starts += tag[0] == "B" and before[1:] != tag[1:]
    if not orphans:
        return "IOB2"
    return "IOB1" if starts < orphans else "IOB2 with stray I- tags"


# Finding and loading a data set


def find_splits(folder: Path) -> dict[str, Path]:
    """{"train": path, ...} by file name: train / dev, valid, testa / test, testb."""
    found: dict[str, Path] = {}
    names = [p for p in sorted(folder.iterdir()) if p.is_file() and p.suffix.lower() in SUFFIXES and p.name[0] != "."]
    for path in names:
        role = next((role for role, pattern in ROLES.items() if pattern.search(path.name.lower())), None)
        if role in found:
            raise DataError(f"{folder}: {found[role].name} and {path.name} both look like {role} data: keep one")
        if role:
            found[role] = path
    if "train" not in found:
        seen = ", ".join(p.name for p in folder.iterdir()) or "nothing"
        raise DataError(
            f"{folder}: no training file: need a name with `train` in it, such as train.txt, or give one file (found: {seen})"
        )
    return found


def load(path: str | Path) -> Corpus:
    """The data set in a folder (train, dev and test found by name) or in one file (cut in order, 80 / 10 / 10)."""
    path, notes = Path(path), []
    if not path.exists():
        raise DataError(f"{path}: no such folder or file")
    if path.is_file():
        sentences = read_conll(path)
        a, b = len(sentences) * 8 // 10, len(sentences) * 9 // 10
        splits = {"train": sentences[:a], "dev": sentences[a:b], "test": sentences[b:]}
        notes.append("one file: cut in order into train, dev and test, 80 / 10 / 10")
    else:
        splits = {role: read_conll(p) for role, p in find_splits(path).items()}
    if "dev" not in splits:
        cut = len(splits["train"]) * 9 // 10
        splits["train"], splits["dev"] = splits["train"][:cut], splits["train"][cut:]
        notes.append("no dev file: the last tenth of train serves")
    if "test" not in splits:
        splits["test"] = splits["dev"]
        notes.append("no test file: dev serves, so the result is flattering")
    for role, sentences in splits.items():
        if not sentences:
            raise DataError(f"{path}: too few sentences, none left for {role}")
    found = scheme([s for part in splits.values() for s in part])
    notes.insert(0, f"tags are {found}" + ("" if found == "IOB2" else ", converted to IOB2"))
    return corpus(splits["train"], splits["dev"], splits["test"], notes)


def corpus(train: list[Sentence], dev: list[Sentence], test: list[Sentence], notes: list[str]) -> Corpus:
    """Convert to IOB2, take the entity types from train and refuse one that train does not have."""
    for part in (train, dev, test):
        part[:] = [Sentence(s.words, iob2(s.tags), s.where, s.lines) for s in part]
    types = {tag[2:] for s in train for tag in s.tags if tag != "O"}
    if not types:
        raise DataError(f"{train[0].where}: the training data holds no entity, every tag is O")
    for s in (*dev, *test):
        for i, tag in enumerate(s.tags):
            if tag != "O" and tag[2:] not in types:
                place = f"{s.where.rpartition(':')[0]}:{s.lines[i]}" if s.lines else s.where
                raise DataError(
                    f"{place}: type {tag[2:]!r} of {s.words[i]!r} never occurs in train, so it cannot be learned: "
                    f"add a training sentence that has it, or retag it (train has {', '.join(sorted(types))})"
                )
    return Corpus(train, dev, test, sorted(types), notes)
