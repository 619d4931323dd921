"""PaLMTokenizer loses nothing, spells no special or byte token from text, and keeps words apart."""

import itertools
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from palm_kernels.models import PaLMConfig, PaLMTokenizer
from palm_kernels.models.tokenization import BYTES, SPECIALS

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


def test_offsets_of_text(tokenizer):
    text = "the quick \U0001f926 dog \u65e5"
    encoded = tokenizer(text, return_offsets_mapping=True)
    spans = encoded["offset_mapping"]
    assert spans[0][0] == 0 and spans[-1][1] == len(text)
    assert all(a[1] == b[0] or a == b for a, b in itertools.pairwise(spans))


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = [PaLMTokenizer.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)]
    loaded.append(pickle.loads(pickle.dumps(tokenizer)))
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
    with pytest.raises(TypeError, match="one string"):
        PaLMTokenizer.train("text")
