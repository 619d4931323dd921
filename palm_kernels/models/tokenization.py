"""PaLMTokenizer: byte-fallback BPE that loses nothing (PaLM section 4: whitespace kept, unknown characters as bytes, single digits).

decode(encode(text)) == text for every string. A byte's token <0x41> is an ordinary vocabulary entry that no text can spell: the
pre-tokenizer cuts around each digit and between punctuation and letters, so neither `<0x41>` nor `<pad>` in a text ever becomes one
piece, and added special tokens are not looked for in texts (split_special_tokens).
"""

import collections
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIALS = ("<pad>", "<s>", "</s>", "<mask>")  # ids 0 to 3, as in PaLMConfig
BYTES = tuple(f"<0x{b:02X}>" for b in range(256))  # ids 4 to 259
# a word or a run of punctuation with the space before it; each digit alone; whitespace, all but the last before a word
PIECES = r" ?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+|\s+(?!\S)|\s+"
BETWEEN_WORDS = re.compile(r"(?<=\S) (?=\S)")  # a piece begins here whatever stands around it
LONG_TEXT = 1 << 16  # characters: the trainer holds 90 bytes for each of a text's
LONG_PIECE = 256  # characters: the trainer's time grows with the square of a piece's


def _backend(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIALS])
    return tokenizer


def _check_unicode(text, where: str) -> None:
    """Raises what str.encode raises at a lone surrogate, with the place among the texts; text is a string or nested lists of them."""
    if isinstance(text, (list, tuple)):
        for i, item in enumerate(text):
            _check_unicode(item, f"{where}[{i}]")
    elif isinstance(text, str):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            error.reason += f", in {where}"
            raise


def _lines(path: os.PathLike) -> Iterator[str]:
    """A UTF-8 file's lines as they are; UnicodeDecodeError names the file and the line."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield line.decode()
            except UnicodeDecodeError as error:
                error.reason += f", in line {number} of {os.fspath(path)}"
                raise


def _checked(text, where: str) -> str | os.PathLike:
    """A text, or words joined as running text; a file stays a path."""
    if isinstance(text, os.PathLike):
        return text
    words = [text] if isinstance(text, (str, bytes)) or not isinstance(text, Iterable) else list(text)
    for word in words:
        if not isinstance(word, str):
            kind = type(word).__name__
            raise TypeError(f"PaLMTokenizer.train: {where} holds {kind}, need a string, strings or a pathlib.Path")
    _check_unicode(text if isinstance(text, str) else words, where)
    return text if isinstance(text, str) else "".join(f" {w}" for w in words)


def _corpus(texts: Iterable) -> list[str | os.PathLike]:
    if isinstance(texts, (str, bytes, os.PathLike)):
        kind = type(texts).__name__
        raise TypeError(
            f"PaLMTokenizer.train: texts is one {kind}, need an iterable of strings, lists of words or paths"
        )
    found = [_checked(text, f"texts[{i}]") for i, text in enumerate(texts)]
    if found and all(isinstance(t, str) and os.path.isfile(t) for t in found):
        name = f"{found[0]!r}"
        raise ValueError(
            f"PaLMTokenizer.train: {name} is a file's name, need pathlib.Path({name}) to learn from the file"
        )
    return found


def _short(text: str) -> Iterator[str]:
    """text in parts of about LONG_TEXT characters, cut between words where there are any."""
    start = 0
    while len(text) - start > LONG_TEXT:
        between = BETWEEN_WORDS.search(text, start + LONG_TEXT // 2, start + LONG_TEXT)
        end = between.start() if between else start + LONG_TEXT
        yield text[start:end]
        start = end
    yield text[start:]


def _stream(texts: list[str | os.PathLike]) -> Iterator[str]:
    """All texts in parts that are not long, files line by line."""
    for text in texts:
        for whole in [text] if isinstance(text, str) else _lines(text):
            yield from _short(whole)


def _learn(texts: list, size: int, min_frequency: int) -> tuple[list[str], list[tuple[str, str]]]:
    """At most `size` pieces of the texts, in the order in which BPE finds them, and the merges that make them."""
    if size == 0:
        return [], []
    counts = collections.Counter(itertools.chain.from_iterable(_stream(texts)))
    # named here because the trainer drops rare characters of equal count in no fixed order
    alphabet = sorted(counts, key=lambda c: (-counts[c], c))[: max(1, size // 2)]
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PIECES), behavior="isolated"), pre_tokenizers.FixedLength(length=LONG_PIECE)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=min_frequency,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    learner.train_from_iterator(_stream(texts), trainer)
    model = json.loads(learner.to_str())["model"]
    pieces = sorted(model["vocab"], key=model["vocab"].get)
    return pieces, [tuple(m) for m in model["merges"]]


class PaLMTokenizer(PreTrainedTokenizerFast):
    """A lossless tokenizer, trained in seconds: `PaLMTokenizer.train(texts, 4096)`.

    Given words (`is_split_into_words=True`) are encoded as if each had a space before it, so that they meet the pieces of running
    text; every word starts a token of its own, and offsets count within the word. Texts get neither this prefix nor special tokens.
    A special token is put in by its id or by add_bos_token / add_eos_token, never by its name in a text; split_special_tokens=False
    gives transformers' usual reading of names, and loses them on the way back.
    """

    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012 (transformers' own attribute, never changed)

    @classmethod
    def convert_to_native_format(cls, **kwargs):
        """tokenizer.json holds everything: nothing is taken apart and rebuilt."""
        kwargs.pop("trust_remote_code", None)
        return kwargs

    def __init__(self, *args, **kwargs):
        for name, token in zip(("pad_token", "bos_token", "eos_token", "mask_token"), SPECIALS, strict=True):
            kwargs.setdefault(name, token)
        kwargs.setdefault("split_special_tokens", True)
        kwargs["clean_up_tokenization_spaces"] = False
        if not {"tokenizer_object", "tokenizer_file"} & {k for k, v in kwargs.items() if v is not None}:
            kwargs["tokenizer_object"] = _backend({t: i for i, t in enumerate((*SPECIALS, *BYTES))}, [])
        super().__init__(*args, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """transformers' from_pretrained; a file that is no JSON is an OSError that says where."""
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except json.JSONDecodeError as error:
            raise OSError(
                f"{cls.__name__}: a file in {str(pretrained_model_name_or_path)!r} is cut off or corrupt ({error}): "
                "save or fetch it anew"
            ) from error

    @classmethod
    def train(cls, texts: Iterable, vocab_size: int = 4096, *, min_frequency: int = 2, **kwargs) -> "PaLMTokenizer":
        """A tokenizer of at most vocab_size tokens, learnt from texts: strings, lists of words, or UTF-8 files as pathlib.Path.

        260 of them are the special tokens and the bytes; a piece occurs at least min_frequency times. Deterministic. Files are read
        twice, line by line, and never held whole. kwargs go to the constructor (model_max_length, padding_side, ...).
        Raises ValueError (vocab_size; strings that are all names of files), TypeError (what is no text), UnicodeEncodeError (a lone
        surrogate, with its text), UnicodeDecodeError (a file that is not UTF-8, with its line), OSError (a file that cannot be read).
        """
        room = vocab_size - len(SPECIALS) - len(BYTES)
        if room < 0:
            raise ValueError(f"PaLMTokenizer.train: vocab_size is {vocab_size}, need at least {vocab_size - room}")
        pieces, merges = _learn(_corpus(texts), room, min_frequency)
        vocab = {token: i for i, token in enumerate((*SPECIALS, *BYTES, *pieces))}
        return cls(tokenizer_object=_backend(vocab, merges), **kwargs)

    def _encode_plus(self, text, text_pair=None, *args, is_split_into_words: bool = False, **kwargs):
        if is_split_into_words:  # the only way that keeps offsets within the given word
            self.backend_tokenizer.normalizer = normalizers.Prepend(" ")
        try:
            return super()._encode_plus(text, text_pair, *args, is_split_into_words=is_split_into_words, **kwargs)
        except TypeError:  # all that the library says of a lone surrogate
            _check_unicode(text, "text")
            _check_unicode(text_pair, "text_pair")
            raise
        finally:
            if is_split_into_words:
                self.backend_tokenizer.normalizer = None
