"""examples/ner: files as they are found, errors that say where, sub-words, tags, and the whole run on a small scale."""

import io
import os
import random
import sys
import types
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from examples.ner import augment, batches, data, predict, report, synthetic, train  # noqa: E402
from palm_kernels.models import PaLMTokenizer  # noqa: E402

REAL = Path(os.environ.get("NER_DATA", ROOT.parent / "shared" / "data"))
IOB2 = ["B-PER", "I-PER", "O", "B-LOC", "B-LOC", "O"]


def write(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


# Files


LAYOUTS = {
    "two columns": "Ada B-PER\nByron I-PER\n\nin O\nRome B-LOC\n",
    "tabs": "Ada\tB-PER\nByron\tI-PER\n\nin\tO\nRome\tB-LOC",
    "four columns": "Ada NNP B-NP B-PER\nByron NNP I-NP I-PER\n\nin IN B-PP O\nRome NNP B-NP B-LOC\n",
    "aligned": "Ada    NNP  B-PER\nByron  NNP  I-PER\n\nin     IN   O\nRome   NNP  B-LOC   \n",
    "tag first": "B-PER\tAda\nI-PER\tByron\n\nO\tin\nB-LOC\tRome\n",
    "document marks": "-DOCSTART- -X- O O\n\nAda x y B-PER\nByron x y I-PER\n\n-DOCSTART- -X- O O\nin x y O\nRome x y B-LOC\n",
    "comments": "# id 7 domain=train\nAda _ _ B-PER\nByron _ _ I-PER\n\n# id 8\nin _ _ O\nRome _ _ B-LOC\n",
    "CRLF": "Ada B-PER\r\nByron I-PER\r\n\r\nin O\r\nRome B-LOC\r\n",
    "CR": "Ada B-PER\rByron I-PER\r\rin O\rRome B-LOC\r",
    "byte order mark": "\ufeffAda B-PER\nByron I-PER\n\nin O\nRome B-LOC\n",
    "runs of blank lines": "\n \n\t\nAda B-PER\nByron I-PER\n\n \n\n\nin O\nRome B-LOC\n\n\n",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_reads_layouts(tmp_path, layout):
    first, second = data.read_conll(write(tmp_path, "train.txt", LAYOUTS[layout]))
    assert (first.words, first.tags) == (["Ada", "Byron"], ["B-PER", "I-PER"])
    assert (second.words, second.tags) == (["in", "Rome"], ["O", "B-LOC"])
    lines = LAYOUTS[layout].replace("\r\n", "\n").replace("\r", "\n").split("\n")
    number = int(first.where.rpartition(":")[2])
    assert "Ada" in lines[number - 1] and "Rome" in lines[second.lines[1] - 1]


def test_odd_unicode_stays_whole(tmp_path):
    odd = [
        "\u200b",
        "\xa0",
        "a\xa0b",
        "x\u2028y",
        "\u3000",
        "\x85",
        "\ufe0f",
        "e\u0301",
        "#",
        "-",
        "\U0001f600",
        "",
        " ",
    ]
    (sentence,) = data.read_conll(write(tmp_path, "train.tsv", "".join(f"{w}\tO\n" for w in odd) + "Rome\tB-LOC\n"))
    assert sentence.words == [*odd, "Rome"]
    spaced = [w for w in odd if w.strip(" ")]
    (sentence,) = data.read_conll(write(tmp_path, "train.txt", "".join(f"{w} O\n" for w in spaced) + "Rome B-LOC\n"))
    assert sentence.words == [*spaced, "Rome"]


BAD_FILES = {
    "empty": ("", r"train\.txt: the file is empty"),
    "only blank lines": ("\n \n\n", "the file is empty"),
    "no tag": ("Ada B-PER\nByron\n", r"train\.txt:2: 'Byron' has no tag"),
    "no tag anywhere": ("Ada\nByron\n", r"train\.txt:1: 'Ada' has no tag"),
    "no tag behind the tab": ("Ada\tB-PER\nByron\t\n", r"train\.txt:2: 'Byron' has no tag"),
    "too many columns in a line": (
        "Ada B-PER\nLord Byron I-PER\nx O\n",
        r"train\.txt:2: 3 columns, other lines have 2",
    ),
    "too many columns": ("1 Ada _ _ _ B-PER\n", r"train\.txt:1: 6 columns, need 2 to 4"),
    "unknown layout": ("Ada NNP PER\nByron NNP PER\n", r"train\.txt:1: unknown column layout: 'PER'"),
    "no tag but a word": ("Ada B-PER\nByron B-PER\nmet met\n", r"train\.txt:3: 'met' is no tag"),
    "latin-1": ("Ada B-PER\ncaf\xe9 O\n".encode("latin-1"), r"train\.txt:2: byte 0xe9 is not UTF-8"),
    "UTF-16": ("Ada B-PER\n".encode("utf-16"), "looks like UTF-16"),
    "no entity": ("Ada O\n", "holds no entity"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files(tmp_path, case):
    content, message = BAD_FILES[case]
    write(tmp_path, "train.txt", content)
    write(tmp_path, "dev.txt", "in O\nRome B-PER\n")
    write(tmp_path, "test.txt", "in O\nRome B-PER\n")
    with pytest.raises(data.DataError, match=message):
        data.load(tmp_path)


def test_missing_files(tmp_path, capsys):
    with pytest.raises(data.DataError, match="no such folder or file"):
        data.load(tmp_path / "nowhere")
    with pytest.raises(data.DataError, match=r"no training file.*\(found: nothing\)"):
        data.load(tmp_path)
    with pytest.raises(data.DataError, match="no such file"):
        data.read_conll(tmp_path / "train.txt")
    assert train.main(["--data", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert "error: " in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_tag_only_in_test(tmp_path):
    for name in ("train.txt", "dev.txt"):
        write(tmp_path, name, "in O\nRome B-LOC\n")
    write(tmp_path, "test.txt", "in O\n\nthe O\nWar B-EVENT\n")
    with pytest.raises(data.DataError, match=r"test\.txt:4: type 'EVENT' of 'War' never occurs in train"):
        data.load(tmp_path)


SPELLINGS = [
    ("eng.train", "eng.testa", "eng.testb"),
    ("train.txt", "valid.txt", "test.txt"),
    ("train.conll", "dev.conll", "test.conll"),
    ("wnut17train.conll", "emerging.dev.conll", "emerging.test.annotated"),
    ("my-train.iob2", "my-val.iob2", "my-test.iob2"),
    ("TRAIN.TSV", "Validation.tsv", "Test.tsv"),
]


@pytest.mark.parametrize("names", SPELLINGS, ids=lambda names: names[0])
def test_finds_splits(tmp_path, names):
    for name in (*names, "README.md", ".train.txt.swp", "training-log.json"):
        write(tmp_path, name, "Rome B-LOC\n")
    assert [p.name for p in map(data.find_splits(tmp_path).get, ("train", "dev", "test"))] == list(names)


def test_missing_and_double_splits(tmp_path):
    write(tmp_path, "train.txt", "".join(f"w{i} O\nRome B-LOC\n\n" for i in range(20)))
    corpus = data.load(tmp_path)
    assert (len(corpus.train), len(corpus.dev)) == (18, 2) and corpus.test == corpus.dev and len(corpus.notes) == 3
    corpus = data.load(tmp_path / "train.txt")
    assert [len(part) for part in (corpus.train, corpus.dev, corpus.test)] == [16, 2, 2]
    write(tmp_path, "train.conll", "Rome B-LOC\n")
    with pytest.raises(data.DataError, match=r"train\.conll and train\.txt both look like train data"):
        data.load(tmp_path)


@pytest.mark.parametrize(
    "name, counts, types, tags",
    [("wikigold", [1354, 175, 167], "LOC MISC ORG PER", "IOB1"), ("wnut17", [3394, 1009, 1287], None, "IOB2")],
)
def test_real_data(name, counts, types, tags):
    if not (REAL / name).exists():
        pytest.skip(f"{name} is not on this machine")
    corpus = data.load(REAL / name)
    assert [len(part) for part in (corpus.train, corpus.dev, corpus.test)] == counts
    assert types is None or corpus.types == types.split()
    assert f"tags are {tags}" in corpus.notes[0] and data.scheme(corpus.train) == "IOB2"


# Tag schemes


SCHEMES = {
    "IOB2": IOB2,
    "IOB1": ["I-PER", "I-PER", "O", "I-LOC", "B-LOC", "O"],
    "BIOES": ["B-PER", "E-PER", "O", "S-LOC", "S-LOC", "O"],
    "BILOU": ["B-PER", "L-PER", "O", "U-LOC", "U-LOC", "O"],
    "BMES": ["B-PER", "E-PER", "O", "S-LOC", "S-LOC", "O"],
    "BMEWO": ["B-PER", "E-PER", "O", "W-LOC", "W-LOC", "O"],
}


@pytest.mark.parametrize("name", SCHEMES)
def test_schemes(name):
    tags = SCHEMES[name]
    assert data.iob2(tags) == IOB2
    assert data.scheme([data.Sentence(["w"] * len(tags), tags)]) == (name if name[:3] == "IOB" else "BIOES")


def test_stray_tags():
    assert data.iob2(["I-PER", "O", "B-LOC", "I-PER", "I-LOC"]) == ["B-PER", "O", "B-LOC", "B-PER", "B-LOC"]
    assert data.scheme([data.Sentence(["w"] * 3, ["I-PER", "O", "B-LOC"])]) == "IOB2 with stray I- tags"
    assert data.iob2(["B-A", "M-A", "E-A", "I-A"]) == ["B-A", "I-A", "I-A", "B-A"]


@given(st.lists(st.tuples(st.sampled_from(["PER", "LOC", "X-Y"]), st.integers(1, 4), st.integers(0, 2)), max_size=6))
def test_every_scheme_gives_the_same_entities(entities):
    iob2, iob1, bioes, before = [], [], [], None
    for kind, length, gap in entities:
        iob2 += [f"B-{kind}", *[f"I-{kind}"] * (length - 1), *["O"] * gap]
        iob1 += [f"{'B' if before == kind else 'I'}-{kind}", *[f"I-{kind}"] * (length - 1), *["O"] * gap]
        bioes += [f"S-{kind}"] if length == 1 else [f"B-{kind}", *[f"I-{kind}"] * (length - 2), f"E-{kind}"]
        bioes += ["O"] * gap
        before = kind if not gap else None
    assert data.iob2(iob2) == data.iob2(iob1) == data.iob2(bioes) == iob2


# Synthetic corpus


def test_synthetic_is_deterministic_and_fair():
    corpus = synthetic.make()
    assert corpus.test == synthetic.make().test and corpus.test != synthetic.make(seed=1).test
    assert [len(part) for part in (corpus.train, corpus.dev, corpus.test)] == list(synthetic.SIZES.values())
    assert corpus.types == ["LOC", "MISC", "ORG", "PER"] and data.scheme(corpus.train) == "IOB2"

    def names(lists):
        return {name for rule in lists.values() for name in rule}

    lists = synthetic.name_lists(random.Random(0))
    assert not names(lists["train"]) & names(lists["test"]) and not names(lists["train"]) & names(lists["dev"])
    words = {word for s in corpus.train for word in s.words}
    assert not words & names(lists["test"])
    types = {}  # names that stand for more than one type, so that the context has to be read
    for s in corpus.test:
        for kind, first, end in data.entities(s.tags):
            types.setdefault(tuple(s.words[first:end]), set()).add(kind)
    assert sum(len(kinds) > 1 for kinds in types.values()) > 10


# Sub-words, batches, tags


@pytest.fixture(scope="module")
def tokenizer():
    return PaLMTokenizer.train(["Ada Lovelace met Charles Babbage in London ."] * 4, 300)


LABELS = ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]


def test_first_subword_carries_the_label(tokenizer):
    encoder = batches.Encoder(tokenizer, LABELS, 64)
    words = ["Ada", "Zyx", "met", "\u200b", "", "1984", "Rome"]
    tags = ["B-PER", "I-PER", "O", "O", "O", "O", "B-LOC"]
    rows = encoder.rows(data.Sentence(words, tags))
    batch = batches.collate([*rows, *encoder.rows(data.Sentence(["in"], ["O"]))], tokenizer.pad_token_id)
    kept = batch.labels[0][batch.labels[0] >= 0]
    assert kept.tolist() == [3, 4, 0, 0, 0, 0, 1]
    starts = [i for i, w in enumerate(batch.words[0].tolist()) if w >= 0 and w not in batch.words[0][:i].tolist()]
    assert (batch.labels[0] >= 0).nonzero().flatten().tolist() == starts
    n = batch.mask[1].sum()
    assert (batch.labels[1][n:] == -100).all() and (batch.words[1][n:] == -1).all() and batch.mask[0].all()
    assert tokenizer.decode(batch.ids[1][:n]) == " in"


def test_natural_spacing(tokenizer):
    encoder = batches.Encoder(tokenizer, LABELS, 64)
    words = ["Ada", "'s", "(", "Rome", ")", ",", "met", "."]
    text = "".join(tokenizer.decode(piece) for piece in encoder.pieces(words, natural=True))
    assert text == "Ada's (Rome), met."
    assert "".join(tokenizer.decode(piece) for piece in encoder.pieces(words)) == " " + " ".join(words)


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=12), limit=st.integers(9, 20), seed=st.integers(0, 99))
def test_long_sentences_are_cut_between_words(lengths, limit, seed):
    rng, encoder = random.Random(seed), batches.Encoder(None, LABELS, limit)
    encoder.known = {f" {i}": [i] * n for i, n in enumerate(lengths)}
    tags = data.iob2([rng.choice(LABELS) for _ in lengths])
    rows = encoder.rows(data.Sentence([str(i) for i in range(len(lengths))], tags))
    assert all(len(row.ids) <= limit for row in rows)
    assert [i for row in rows for i in row.ids] == [i for i, n in enumerate(lengths) for _ in range(n)]
    assert [k for row in rows for k in row.labels] == [LABELS.index(tag) for tag in tags]


def test_cut_spares_entities_and_refuses_long_words():
    encoder = batches.Encoder(None, LABELS, 3)
    encoder.known = {f" {w}": [0] for w in "abcdef"} | {" long": [0] * 4}
    rows = encoder.rows(data.Sentence(list("abcdef"), ["O", "O", "B-PER", "I-PER", "O", "O"]))
    assert [row.first for row in rows] == [0, 2, 5]
    with pytest.raises(
        data.DataError, match=r"x\.txt:3: the word 'long' has 4 sub-words, a row holds 3: set --max-length"
    ):
        encoder.rows(data.Sentence(["a", "long"], ["O", "O"], "x.txt:3"))


def test_of_a_huge_word_only_what_fills_a_row_is_encoded(tokenizer):
    encoder, seen = batches.Encoder(tokenizer, LABELS, 16, shorten=True), []
    encoder.tokenizer = lambda words, **keywords: seen.extend(words) or tokenizer(words, **keywords)
    (row,) = encoder.rows(data.Sentence(["ab" * 100_000], ["O"]))
    assert row.ids == tokenizer(" " + "ab" * 500, add_special_tokens=False)["input_ids"][:16]
    assert [len(word) for word in seen] == [16 * max(map(len, tokenizer.get_vocab()))]


def test_long_sentences_are_tagged_in_windows_that_overlap(tokenizer):
    encoder = batches.Encoder(tokenizer, LABELS, 40)
    words = [f"w{i}" for i in range(60)]
    rows = encoder.windows(data.Sentence(words, ["O"] * 60), 0)
    assert len(rows) > 3 and all(len(row.ids) <= 40 for row in rows)
    spans = [(row.first, row.first + len(row.labels)) for row in rows]
    assert spans[0][0] == 0 and spans[-1][1] == 60
    for (a, b), (c, d) in pairwise(spans):
        assert a < c < b < d  # some words are in both
    assert len(encoder.windows(data.Sentence(words[:5], ["O"] * 5), 0)) == 1

    class Seen(torch.nn.Module):
        """Says B-LOC, but not for a window's first and last word where the sentence goes on."""

        device = torch.device("cpu")

        def forward(self, ids, attention_mask):
            logits = torch.zeros(*ids.shape, len(LABELS))
            for i, n in enumerate(attention_mask.sum(1).tolist()):
                row = next(r for r in rows if r.ids == ids[i, :n].tolist())
                last = row.first + len(row.labels) - 1
                inner = [(w > row.first or w == 0) and (w < last or w == 59) for w in row.words]
                logits[i, :n, 1] = 9.0 * torch.tensor(inner)
            return types.SimpleNamespace(logits=logits)

    (tags,) = batches.tag(Seen(), encoder, [data.Sentence(words, ["O"] * 60)])
    assert tags == [LABELS[1]] * 60


def test_best_path_is_the_best_valid_one():
    cost = batches.forbidden(LABELS)
    for seed in range(20):
        scores = torch.randn(4, 5, generator=torch.Generator().manual_seed(seed)).numpy()
        paths = torch.cartesian_prod(*[torch.arange(5)] * 4).tolist()

        def total(path, scores=scores):
            return sum(scores[t][k] + cost[path[t - 1] if t else -1][k] for t, k in enumerate(path))

        found = batches.best_path(scores, cost)
        assert found == max(paths, key=total)
        tags = [LABELS[k] for k in found]
        assert data.iob2(tags) == tags


def test_swap_and_masking(tokenizer):
    sentence = data.Sentence(["in", "New", "York", ",", "Ada", "met"], ["O", "B-LOC", "I-LOC", "O", "B-PER", "O"])
    pool = augment.mentions([sentence, data.Sentence(["Rome", "Bo"], ["B-LOC", "B-PER"])])
    assert pool == {"LOC": [["New", "York"], ["Rome"]], "PER": [["Ada"], ["Bo"]]}
    rng = random.Random(0)
    assert augment.swap_mentions(sentence, pool, 0.0, rng) == sentence
    drawn = {tuple(augment.swap_mentions(sentence, pool, 1.0, rng).words) for _ in range(40)}
    assert drawn == {
        ("in", *loc, ",", *per, "met") for loc in (("New", "York"), ("Rome",)) for per in (("Ada",), ("Bo",))
    }
    assert all(data.iob2(s.tags) == s.tags for s in [augment.swap_mentions(sentence, pool, 1.0, rng) for _ in range(9)])
    encoder = batches.Encoder(tokenizer, LABELS, 64)
    batch = batches.collate([row for _ in range(50) for row in encoder.rows(sentence)], tokenizer.pad_token_id)
    strength, source = augment.weak_masking(batch, 0.3, 0.3, torch.Generator().manual_seed(0))
    assert strength.dtype == torch.float32 and strength.min() >= 0 and strength.max() == 1
    assert ((strength == 1) == (source == -1)).all() and abs((strength == 1).float().mean() - 0.3) < 0.1
    for row_words, row_strength in zip(batch.words, strength, strict=True):  # all sub-words of a word share its fate
        assert all(row_strength[row_words == w].unique().numel() == 1 for w in row_words.unique())
    strength, _ = augment.weak_masking(batch, 0.0, 0.0, torch.Generator())
    assert (strength == 0).all()


# Report


def test_scores_are_strict_and_by_entity():
    gold = [["B-PER", "I-PER", "O", "B-LOC"], ["B-LOC", "O"]]
    found = [["B-PER", "O", "O", "B-LOC"], ["B-LOC", "B-PER"]]
    result = report.scores(gold, found)
    assert list(result) == ["LOC", "PER", "micro avg"]
    assert result["LOC"] == {"precision": 1, "recall": 1, "f1-score": 1, "support": 2}
    assert result["micro avg"]["precision"] == 0.5 and result["micro avg"]["recall"] == pytest.approx(2 / 3)
    lines = report.table(result).splitlines()
    assert lines[0].split() == ["precision", "recall", "F1", "support"] and lines[-1].split()[-1] == "3"
    assert report.micro_f1([["O"]], [["O"]]) == 0
    assert report.confusion(gold, found, ["LOC", "PER"]) == [[1, 0, 1], [0, 2, 0], [1, 0, 1]]


def test_sentences_in_colour_and_plain(monkeypatch):
    words, tags = ["Ada", "Byron", "in", "\x1b[2J", "", "Rome"], ["B-PER", "I-PER", "O", "O", "O", "B-LOC"]
    plain = report.marked(words, tags, ["LOC", "PER"], colour=False)
    assert plain == "[Ada Byron PER] in \\x1b[2J '' [Rome LOC]"
    assert report.marked(words, tags, ["LOC", "PER"], colour=True).count("\x1b[1;") == 2

    class Terminal:
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert report.in_colour(Terminal()) and not report.in_colour(io.StringIO())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not report.in_colour(Terminal())


def test_chinese_by_the_character():
    words = predict.words_of("高勇：男，1971年生 in Rome")
    assert words == ["高", "勇", "：", "男", "，", "1971", "年", "生", "in", "Rome"]
    tags = ["B-NAME", "I-NAME", *["O"] * 7, "B-LOC"]
    assert report.marked(words, tags, ["LOC", "NAME"], False) == "[高勇 NAME] ： 男 ， 1971 年生 in [Rome LOC]"
    assert predict.found_in("高勇：男", tags[:4])[0] == {"type": "NAME", "start": 0, "end": 2, "text": "高勇"}


def test_errors_by_kind_and_the_worst_sentences():
    """Each expected entity has one fate; sentences come by the loss of their tags, and right ones not at all."""
    gold = ["B-PER", "I-PER", "O", "B-LOC", "B-LOC", "O", "B-ORG", "I-ORG", "O", "O"]
    found = ["B-PER", "O", "O", "B-LOC", "B-ORG", "O", "B-LOC", "O", "O", "B-PER"]
    kinds = report.kinds_of_error(gold, found)
    expected = {"right": 1, "wrong bounds": 1, "wrong type": 1, "wrong type and bounds": 1, "spurious": 1}
    assert {k: n for k, n in kinds.items() if n} == expected
    assert report.kinds_of_error(["B-PER", "O"], ["O", "O"])["missed"] == 1
    labels = ["O", "B-PER"]
    sentences = [data.Sentence(["a", "Bo"], ["O", "B-PER"], f"f:{i}") for i in range(3)]
    logs = [np.log(np.array([[0.5, 0.5], [1 - p, p]])) for p in (0.4, 0.9, 0.1)]
    text = report.worst(sentences, batches.best_tags(logs, labels), logs, labels)
    assert text.startswith("expected entities: 1 right, 2 missed, 0 wrong bounds")
    assert text.index("f:2") < text.index("f:0") and "f:1" not in text
    assert "Bo B-PER (0.1), found O" in text and "loss 3.00" in text
