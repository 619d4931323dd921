"""PaLMTokenizer: byte-fallback BPE that loses nothing (PaLM section 4: whitespace kept, unknown characters as bytes, single digits).

decode(encode(text)) == text for every string. A byte's token <0x41> is an ordinary vocabulary entry that no text can spell: the
pre-tokenizer cuts around each digit and between punctuation and letters, so neither `<0x41>` nor `<pad>` in a text ever becomes one
piece, and added special tokens are not looked for in texts (split_special_tokens).
"""

import collections
import itertools
import json
from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIALS = ("<pad>", "<s>", "</s>", "<mask>")  # ids 0 to 3, as in PaLMConfig
BYTES = tuple(f"<0x{b:02X}>" for b in range(256))  # ids 4 to 259
# a word or a run of punctuation with the space before it; each digit alone; whitespace, all but the last before a word
PIECES = r" ?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+|\s+(?!\S)|\s+"


def _backend(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIALS])
    return tokenizer


def _learn(texts: Iterable, size: int, min_frequency: int) -> tuple[list[str], list[tuple[str, str]]]:
    """At most `size` pieces of the texts, in the order in which BPE finds them, and the merges that make them."""
    if size == 0:
        return [], []
    texts = [t if isinstance(t, str) else "".join(f" {w}" for w in t) for t in texts]
    counts = collections.Counter(itertools.chain.from_iterable(texts))
    # named here because the trainer drops rare characters of equal count in no fixed order
    alphabet = sorted(counts, key=lambda c: (-counts[c], c))[: max(1, size // 2)]
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=min_frequency,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
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
        """A tokenizer of at most vocab_size tokens, learnt from texts: strings, or lists of words.

        260 of them are the special tokens and the bytes; a piece occurs at least min_frequency times. Deterministic.
        kwargs go to the constructor (model_max_length, padding_side, ...).
        """
        room = vocab_size - len(SPECIALS) - len(BYTES)
        if room < 0:
            raise ValueError(f"PaLMTokenizer.train: vocab_size is {vocab_size}, need at least {vocab_size - room}")
        if isinstance(texts, str):
            raise TypeError(
                "PaLMTokenizer.train: texts is one string, need an iterable of strings or of lists of words"
            )
        pieces, merges = _learn(texts, room, min_frequency)
        vocab = {token: i for i, token in enumerate((*SPECIALS, *BYTES, *pieces))}
        return cls(tokenizer_object=_backend(vocab, merges), **kwargs)

    def _encode_plus(self, text, *args, is_split_into_words: bool = False, **kwargs):
        if not is_split_into_words:
            return super()._encode_plus(text, *args, **kwargs)
        self.backend_tokenizer.normalizer = normalizers.Prepend(
            " "
        )  # the only way that keeps offsets within the given word
        try:
            return super()._encode_plus(text, *args, is_split_into_words=True, **kwargs)
        finally:
            self.backend_tokenizer.normalizer = None
