"""PaLMTokenizer loses nothing, spells no special or byte token from text, and keeps words apart."""

import itertools
import pathlib
import pickle
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from palm_kernels.models import PaLMConfig, PaLMTokenizer, tokenization
from palm_kernels.models.tokenization import BYTES, LONG_PIECE, SPECIALS

TEXTS = [
    "0123456789 the quick brown fox <pad> jumps </s> over the lazy dog in 1961, <0x41><0x42> and <mask> <s> again",
    "Wolff , currently a journalist in Argentina , played with Del Bosque in the final years of the seventies .",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich; 日本語のテキスト 日本語",
] * 4
HARD = [
    "",
    " ",
    "  two  spaces\tand\ttabs \n\n lines\r\n ",
    "<0x41> <0xFF> <0x0A>",
    "<pad></s><s><mask> </s>",
    "<0x41",
    "\u2581piece\u2581",
    "\x00\x01\x7f\x80\xff",
    "\ufeff\u200b\u200d\u2028\u3000\ufffd",
    "e\u0301 \u00e9 \ufb01 \u212b",
    "\U0001f926\U0001f3fd\u200d\u2642\ufe0f",
    "\U0010ffff\ue000",
    "0123456789 \u0663\u0664 \u00b2 \u2167",
    "a" * 1000,
    "\u8bcd\u5143\u5316\uff1a\u4e2d\u6587\u3001\U00020bb7\u91ce\u5bb6\u30022026\u5e74",  # Chinese, one character beyond the 16-bit plane
    "\u0645\u0631\u062d\u0628\u0627 \u200f\u05e9\u05c1\u05b8\u05dc\u05d5\u05b9\u05dd\u202c \u2067x\u2069",  # right to left
    "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466\U0001f1e8\U0001f1f3",  # a family by joiners, a flag
    "q\u0307\u0323 \u0e01\u0e33 \u0928\u093f \u1112\u1161\u11ab",  # marks in an order that normal forms change
    "".join(map(chr, range(32))) + "\x7f\x85\x9f",
]
ANY = st.text(max_size=60) | st.lists(st.sampled_from([*HARD, *BYTES[:70:7], *SPECIALS, " ", "x", "1"])).map("".join)


@pytest.fixture(scope="module")
def tokenizer():
    return PaLMTokenizer.train(TEXTS, 420, min_frequency=1)


def assert_lossless(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert all(4 <= i < len(tokenizer) for i in ids), f"{text!r} spells a special token"
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("text", [*HARD, *TEXTS[:3]], ids=repr)
def test_round_trip(tokenizer, text):
    assert_lossless(tokenizer, text)
    assert_lossless(PaLMTokenizer(), text)


@given(text=ANY)
def test_every_string_comes_back(tokenizer, text):
    assert_lossless(tokenizer, text)


@given(texts=st.lists(ANY, min_size=1, max_size=4), probe=ANY)
def test_whatever_it_was_trained_on(texts, probe):
    tokenizer = PaLMTokenizer.train(texts, 300, min_frequency=1)
    for text in (*texts, probe):
        assert_lossless(tokenizer, text)
    assert set(BYTES) & set(tokenizer.get_vocab()) == set(BYTES) and tokenizer.get_vocab()["<0x00>"] == 4


def test_texts_full_of_token_names_train_no_such_piece():
    tokenizer = PaLMTokenizer.train(["<0x41></s><pad>" * 50] * 50, 1000, min_frequency=1)
    assert len(tokenizer.get_vocab()) == len(set(tokenizer.get_vocab().values()))
    assert_lossless(tokenizer, "<0x41></s><pad>")


def test_bytes_are_ordinary_entries(tokenizer):
    assert set(tokenizer.get_added_vocab()) == set(SPECIALS)
    assert tokenizer.convert_tokens_to_ids("<0x41>") == 4 + 0x41
    assert [tokenizer.convert_tokens_to_ids(t) for t in SPECIALS] == [0, 1, 2, 3]
    assert tokenizer.tokenize("\x07") == ["<0x07>"]
    assert tokenizer.decode([1, 4 + 0xE2, 4 + 0x82, 4 + 0xAC, 2, 0], skip_special_tokens=True) == "\u20ac"
    config = PaLMConfig()
    ids = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.mask_token_id)
    assert ids == (config.pad_token_id, config.bos_token_id, config.eos_token_id, config.mask_token_id)


def test_digits_stand_alone(tokenizer):
    assert [t for t in tokenizer.tokenize("born 1961 at 123.5") if any(c.isdigit() for c in t)] == list("19611235")


@given(words=st.lists(ANY.filter(bool), min_size=1, max_size=8))
def test_each_word_starts_a_token(tokenizer, words):
    encoded = tokenizer(words, is_split_into_words=True, return_offsets_mapping=True)
    assert sorted(set(encoded.word_ids())) == list(range(len(words)))
    for word_id, (start, end) in zip(encoded.word_ids(), encoded["offset_mapping"], strict=True):
        assert 0 <= start <= end <= len(words[word_id])
    for i, word in enumerate(words):
        own = [t for t, w in zip(encoded["input_ids"], encoded.word_ids(), strict=True) if w == i]
        assert tokenizer.decode(own) == " " + word
    assert tokenizer.decode(encoded["input_ids"]) == "".join(f" {w}" for w in words)


def test_words_meet_the_pieces_of_running_text(tokenizer):
    words = ["the", "lazy", "dog", "in", "Argentina"]
    assert (
        tokenizer(words, is_split_into_words=True)["input_ids"] == tokenizer(" the lazy dog in Argentina")["input_ids"]
    )
    assert tokenizer("the dog")["input_ids"] == tokenizer("the dog")["input_ids"]  # the prefix is gone again
    batch = tokenizer([["the", "dog"], ["fox"]], is_split_into_words=True, padding=True, return_tensors="pt")
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    assert batch["attention_mask"].sum(-1).tolist() == [
        len(batch.word_ids(0)),
        sum(w is not None for w in batch.word_ids(1)),
    ]


def test_empty_words_have_no_token(tokenizer):
    assert tokenizer(["a", "", "b"], is_split_into_words=True).word_ids() == [0, 2]


def assert_offsets(tokenizer, text, ids, spans):
    """Each token's span is its characters; the bytes of a character all point at it."""
    for span, group in itertools.groupby(zip(spans, ids, strict=True), key=lambda pair: pair[0]):
        assert tokenizer.decode([i for _, i in group]) == text[slice(*span)]


@given(text=ANY.filter(bool))
def test_offsets_of_text(tokenizer, text):
    encoded = tokenizer(text, return_offsets_mapping=True)
    spans = encoded["offset_mapping"]
    assert spans[0][0] == 0 and spans[-1][1] == len(text)
    assert all(a[1] == b[0] or a == b for a, b in itertools.pairwise(spans))
    assert_offsets(tokenizer, text, encoded["input_ids"], spans)
    for i in range(len(text)):
        start, end = spans[encoded.char_to_token(i)]
        assert start <= i < end


@given(
    text=ANY.filter(bool), length=st.integers(2, 9), stride=st.integers(0, 3), side=st.sampled_from(["left", "right"])
)
def test_windows_cover_the_text(tokenizer, text, length, stride, side):
    """Overflowing windows of at most `length` tokens, `stride` in common, each with its offsets into the whole text."""
    whole, stride = tokenizer(text)["input_ids"], min(stride, length - 1)
    tokenizer.truncation_side = side
    try:
        encoded = tokenizer(
            [text, text],
            truncation=True,
            max_length=length,
            stride=stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
    finally:
        tokenizer.truncation_side = "right"
    rows, samples = encoded["input_ids"], encoded["overflow_to_sample_mapping"]
    mine = [row for row, sample in zip(rows, samples, strict=True) if sample == 1]
    assert samples == sorted(samples) and all(len(row) <= length for row in rows)
    assert mine[0] == (whole[:length] if side == "right" else whole[-length:])
    order = mine if side == "right" else mine[::-1]
    joined = list(order[0])
    for row in order[1:]:
        assert joined[len(joined) - stride :] == row[:stride]
        joined += row[stride:]
    assert joined == whole
    for row, spans in zip(rows, encoded["offset_mapping"], strict=True):
        for i, (start, end) in zip(row, spans, strict=True):
            assert tokenizer.convert_ids_to_tokens(i) in (text[start:end], *BYTES)


def test_padding_and_truncation_sides(tokenizer):
    texts = ["the quick brown fox", "fox"]
    plain = [tokenizer(t)["input_ids"] for t in texts]
    for side in ("left", "right"):
        padded = tokenizer(texts, padding=True, padding_side=side)
        empty = [0] * (len(plain[0]) - len(plain[1]))
        assert padded["input_ids"][1] == (empty + plain[1] if side == "left" else plain[1] + empty)
        assert padded["attention_mask"][1] == [int(i != 0) for i in padded["input_ids"][1]]
        assert tokenizer.batch_decode(padded["input_ids"], skip_special_tokens=True) == texts
    assert tokenizer(texts[0], truncation=True, max_length=3)["input_ids"] == plain[0][:3]
    left = PaLMTokenizer(tokenizer_object=tokenizer.backend_tokenizer, truncation_side="left")
    assert left(texts[0], truncation=True, max_length=3)["input_ids"] == plain[0][-3:]


def test_nothing_is_normalised(tokenizer):
    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        for text in HARD:
            assert_lossless(tokenizer, unicodedata.normalize(form, text))


@pytest.mark.parametrize("call", ["__call__", "encode", "tokenize"])
@pytest.mark.parametrize(
    ("text", "place"),
    [("ab\ud800c", "text"), (["a", "ab\ud800c"], r"text\[1\]"), ([["a", "x"], ["ab\udfff"]], r"text\[1\]\[0\]")],
)
def test_lone_surrogates_are_pythons_error(tokenizer, call, text, place):
    """UnicodeEncodeError, as "\ud800".encode() raises it, with the string of the batch."""
    words = isinstance(text, list) and isinstance(text[0], list)
    with pytest.raises(UnicodeEncodeError, match=f"in position 2: surrogates not allowed, in {place}$"):
        getattr(tokenizer, call)(text, **({"is_split_into_words": True} if words else {}))
    with pytest.raises(UnicodeEncodeError, match="position 0: surrogates not allowed, in text_pair"):
        tokenizer("a", "\ud800")
    assert tokenizer.tokenize("the") == tokenizer.tokenize("the")  # no prefix is left behind
    assert tokenizer.backend_tokenizer.normalizer is None


def test_training_names_the_lone_surrogate():
    with pytest.raises(UnicodeEncodeError, match=r"position 1: surrogates not allowed, in texts\[1\]$"):
        PaLMTokenizer.train(["a", "b\ud800"], 300)
    with pytest.raises(UnicodeEncodeError, match=r"position 0: surrogates not allowed, in texts\[0\]\[1\]$"):
        PaLMTokenizer.train([["a", "\ud800"]], 300)


def test_files(tmp_path):
    text = "".join(f"{t}\r\n" for t in TEXTS)
    path, other = tmp_path / "a.txt", tmp_path / "b.txt"
    path.write_bytes(text.encode())
    other.write_bytes(b"fine\nthe \xff\n")
    from_file = PaLMTokenizer.train([path], 420)
    assert from_file.get_vocab() == PaLMTokenizer.train(text.splitlines(keepends=True), 420).get_vocab()
    assert from_file.get_vocab() == PaLMTokenizer.train(iter([path]), 420).get_vocab()
    with pytest.raises(UnicodeDecodeError, match=r"byte 0xff in position 4: .*, in line 2 of .*b\.txt$"):
        PaLMTokenizer.train([path, other], 420)
    with pytest.raises(FileNotFoundError, match="none"):
        PaLMTokenizer.train([tmp_path / "none"], 420)
    with pytest.raises(ValueError, match=r"a\.txt' is a file's name, need pathlib.Path"):
        PaLMTokenizer.train([str(path)], 420)
    assert len(PaLMTokenizer.train([str(path), "no file"], 420)) > 260


def test_training_looks_at_bounded_parts(tmp_path, monkeypatch):
    """The trainer's time grows with the square of a piece, its memory with a text: neither gets a long one."""
    running, seen = " ".join(TEXTS) * 40, []
    whole = PaLMTokenizer.train([running], 420).get_vocab()
    monkeypatch.setattr(tokenization, "LONG_TEXT", 1000)
    assert PaLMTokenizer.train([running], 420).get_vocab() == whole
    parts = list(tokenization._short("a" * 2500 + running))
    assert "".join(parts) == "a" * 2500 + running and max(map(len, parts)) <= 1000
    lengths = pre_tokenizers.FixedLength(length=LONG_PIECE)
    monkeypatch.setattr(pre_tokenizers, "FixedLength", lambda length: seen.append(length) or lengths)
    longest = max(map(len, PaLMTokenizer.train(["ab" * 20000, "=" * 20000], 1000).get_vocab()))
    assert seen == [LONG_PIECE] and longest == LONG_PIECE


@given(text=ANY.map(lambda text: text * 8))
def test_parts_are_cut_where_pieces_begin(text):
    split = pre_tokenizers.Split(tokenization.Regex(tokenization.PIECES), behavior="isolated")
    starts = {0, len(text)} | {span[0] for _, span in split.pre_tokenize_str(text)}
    for found in tokenization.BETWEEN_WORDS.finditer(text):
        assert found.start() in starts


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = [PaLMTokenizer.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)]
    loaded.append(pickle.loads(pickle.dumps(tokenizer)))
    plain, bare = PreTrainedTokenizerFast.from_pretrained(tmp_path), Tokenizer.from_file(f"{tmp_path}/tokenizer.json")
    bare.encode_special_tokens = True  # what tokenizer.json does not hold
    for text in (*HARD, *TEXTS[:3]):
        assert plain(text)["input_ids"] == bare.encode(text).ids == tokenizer(text)["input_ids"]
    for other in loaded:
        assert type(other) is PaLMTokenizer and other.get_vocab() == tokenizer.get_vocab()
        for text in (*HARD, *TEXTS[:3]):
            assert other(text)["input_ids"] == tokenizer(text)["input_ids"]
            assert_lossless(other, text)


def test_training_is_deterministic_and_keeps_to_its_size():
    first, again = (PaLMTokenizer.train(TEXTS, 350) for _ in range(2))
    assert first.get_vocab() == again.get_vocab() and len(first) <= 350
    assert len(PaLMTokenizer.train([], 4096)) == 260 == len(PaLMTokenizer.train(TEXTS, 260))


def test_bos_and_eos_on_request():
    tokenizer = PaLMTokenizer.train(TEXTS, 420, add_bos_token=True, add_eos_token=True, padding_side="left")
    ids = tokenizer("the dog")["input_ids"]
    assert ids[0] == 1 and ids[-1] == 2 and tokenizer.decode(ids, skip_special_tokens=True) == "the dog"
    assert tokenizer(["the dog", "a"], padding=True)["input_ids"][1][0] == 0


def test_errors():
    with pytest.raises(ValueError, match="vocab_size is 100, need at least 260"):
        PaLMTokenizer.train(TEXTS, 100)
    with pytest.raises(TypeError, match="texts is one str,"):
        PaLMTokenizer.train("text")
    with pytest.raises(TypeError, match="texts is one PosixPath,"):
        PaLMTokenizer.train(pathlib.Path("text"))  # pyright: ignore[reportArgumentType]
    for texts, kind in (([b"abc"], "bytes"), ([3], "int"), ([["a", 3]], "int")):
        with pytest.raises(TypeError, match=rf"texts\[0\] holds {kind}, need a string"):
            PaLMTokenizer.train(texts)
