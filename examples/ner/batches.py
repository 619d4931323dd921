"""Sentences to tensors and back: sub-words, padded batches, tags that form whole entities."""

import random
import re
import sys
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from palm_kernels.train import by_length

from .data import DataError, Sentence

CLOSES = re.compile(r"[.,;:!?)\]}%]+|'(s|re|ve|ll|d|m)")  # words written without a space before them
OPENS = re.compile(r"[(\[{$#]")  # and without one behind


@dataclass
class Row:
    """One sequence for the model: the sub-words of the words first to end of a sentence."""

    ids: list[int]
    words: list[int]  # the word that each sub-word belongs to, counted in the sentence
    labels: list[int]  # the class of each word, counted from `first`
    sentence: int
    first: int


@dataclass
class Batch:
    """ids, mask, labels and words [B,T] int64: labels are -100 but on a word's first sub-word, words are -1 on padding."""

    ids: Tensor
    mask: Tensor
    labels: Tensor
    words: Tensor
    rows: list[Row]


class Encoder:
    """Words to the sub-words of a tokenizer, at most `limit` to a row; each word is encoded once and remembered.

    A word that no row holds is an error, or with `shorten` loses its end.
    """

    def __init__(self, tokenizer, labels: list[str], limit: int, shorten: bool = False):
        self.tokenizer, self.labels, self.limit, self.shorten = tokenizer, labels, limit, shorten
        self.class_of = {label: i for i, label in enumerate(labels)}
        self.known: dict[str, list[int]] = {}
        # the characters of a word that can fill a row: what stands behind them is not even encoded
        self.longest = limit * max(map(len, tokenizer.get_vocab())) if shorten else None

    def subwords(self, texts: list[str]) -> list[list[int]]:
        """The ids of each word; one that leaves nothing, such as the empty word, becomes the mask token, so that it can be tagged."""
        texts = [text[: self.longest] for text in texts]
        new = list({text for text in texts if text not in self.known})
        if new:  # together: one by one costs six times as much
            ids = self.tokenizer(new, add_special_tokens=False)["input_ids"]
            self.known.update((text, i or [self.tokenizer.mask_token_id]) for text, i in zip(new, ids, strict=True))
        return [self.known[text] for text in texts]

    def pieces(self, words: list[str], natural: bool = False) -> list[list[int]]:
        """The ids of each word, a space before every one; natural: spaces only where running text has them."""
        if not natural:
            return self.subwords([f" {word}" for word in words])
        glued = [
            True,
            *(bool(CLOSES.fullmatch(b) or OPENS.fullmatch(a)) for a, b in pairwise(words)),
        ]
        return self.subwords([word if glue else f" {word}" for word, glue in zip(words, glued, strict=True)])

    def rows(self, sentence: Sentence, index: int = 0, natural: bool = False) -> list[Row]:
        """The sentence as one row, or as several where it is too long, cut between words and if possible not inside an entity."""
        pieces, rows, first = self.pieces(sentence.words, natural), [], 0
        if self.shorten:
            pieces = [piece[: self.limit] for piece in pieces]
        while first < len(pieces):
            end, size = first, 0
            while end < len(pieces) and size + len(pieces[end]) <= self.limit:
                size += len(pieces[end])
                end += 1
            if end == first:
                raise DataError(
                    f"{sentence.where or 'text'}: the word {sentence.words[end][:40]!r} has {len(pieces[end])} sub-words, a row "
                    f"holds {self.limit}: set --max-length to at least that, or shorten the word"
                )
            cut = end
            while end < len(pieces) and cut > first and sentence.tags[cut][0] == "I":
                cut -= 1
            end = cut if cut > first else end
            ids = [i for piece in pieces[first:end] for i in piece]
            words = [k for k in range(first, end) for _ in pieces[k]]
            rows.append(Row(ids, words, [self.class_of[tag] for tag in sentence.tags[first:end]], index, first))
            first = end
        return rows

    def windows(self, sentence: Sentence, index: int) -> list[Row]:
        """The sentence as one row, or as several that overlap by about a quarter, so that each word is seen with words on both sides."""
        pieces, rows, first = self.pieces(sentence.words), [], 0
        if self.shorten:
            pieces = [piece[: self.limit] for piece in pieces]
        sizes = np.array([len(piece) for piece in pieces])
        if sizes.sum() <= self.limit or sizes.max() > self.limit:
            return self.rows(sentence, index)
        while True:
            end = first + int(np.searchsorted(sizes[first:].cumsum(), self.limit, "right"))
            ids = [i for piece in pieces[first:end] for i in piece]
            words = [k for k in range(first, end) for _ in pieces[k]]
            rows.append(Row(ids, words, [0] * (end - first), index, first))
            if end == len(pieces):
                return rows
            behind = sizes[first:end][::-1].cumsum()  # sub-words from a word to the window's end
            first = max(first + 1, end - int(np.searchsorted(behind, self.limit // 4, "right")))


def collate(rows: list[Row], pad_id: int) -> Batch:
    """Rows padded to the longest."""
    shape = (len(rows), max(len(row.ids) for row in rows))
    ids, labels, words = (np.full(shape, fill, dtype=np.int64) for fill in (pad_id, -100, -1))
    for i, row in enumerate(rows):
        n = len(row.ids)
        ids[i, :n], words[i, :n] = row.ids, row.words
        starts = np.diff(words[i, :n], prepend=-1) != 0
        labels[i, :n][starts] = row.labels
    words_BT = torch.from_numpy(words)
    return Batch(torch.from_numpy(ids), (words_BT >= 0).long(), torch.from_numpy(labels), words_BT, rows)


def shuffled(rows: list[Row], size: int, pad_id: int, rng: random.Random) -> list[Batch]:
    """Batches of similar length in random order: little padding, other batches every epoch."""
    return [collate(batch, pad_id) for batch in by_length(rows, size, rng, lambda row: len(row.ids))]


def forbidden(labels: list[str]) -> np.ndarray:
    """[K+1,K] cost of class j after class i (row K: at the start): infinite where I-x follows neither B-x nor I-x."""
    after = [*labels, "O"]
    return np.array([[-np.inf if b[0] == "I" and a[1:] != b[1:] else 0.0 for b in labels] for a in after])


def best_path(scores: np.ndarray, cost: np.ndarray) -> list[int]:
    """The likeliest classes of log-probabilities [words,K] that form whole entities (Viterbi)."""
    total, back = scores[0] + cost[-1], []
    for row in scores[1:]:
        steps = total[:, None] + cost[:-1]
        back.append(steps.argmax(0))
        total = steps.max(0) + row
    path = [int(total.argmax())]
    for choice in reversed(back):
        path.append(int(choice[path[-1]]))
    return path[::-1]


@torch.inference_mode()
def word_scores(model, encoder: Encoder, sentences: list[Sentence], size: int = 32) -> list[np.ndarray]:
    """The log-probabilities [words,K] of each sentence's words; the model is left in eval mode.

    Of two windows that hold a word, the one with more words between it and the window's nearer end is believed.
    """
    model.eval()
    scores = [np.zeros((len(s.words), len(encoder.labels))) for s in sentences]
    margins = [np.full(len(s.words), -1) for s in sentences]
    bare = [Sentence(s.words, ["O"] * len(s.words), s.where) for s in sentences]  # cut without a look at the answer
    rows = [row for i, s in enumerate(bare) for row in encoder.windows(s, i)]
    rows.sort(key=lambda row: len(row.ids))
    starts = range(0, len(rows), size)
    for start in tqdm(starts, "tagging", unit="batch", delay=3, leave=False, disable=not sys.stderr.isatty()):
        batch = collate(rows[start : start + size], encoder.tokenizer.pad_token_id)
        device = model.device
        logits = model(batch.ids.to(device), attention_mask=batch.mask.to(device)).logits.float().log_softmax(-1).cpu()
        for i, row in enumerate(batch.rows):
            count, words = len(row.labels), len(margins[row.sentence])
            left = np.arange(count) if row.first else np.full(count, words)
            right = np.arange(count)[::-1] if row.first + count < words else np.full(count, words)
            margin, here = np.minimum(left, right), slice(row.first, row.first + count)
            better = margin > margins[row.sentence][here]
            margins[row.sentence][here][better] = margin[better]
            scores[row.sentence][here][better] = logits[i][batch.labels[i] >= 0].numpy()[better]
    return scores


def best_tags(scores: list[np.ndarray], labels: list[str]) -> list[list[str]]:
    """The likeliest IOB2 tags that form whole entities, for each sentence's scores [words,K]."""
    cost = forbidden(labels)
    return [[labels[k] for k in best_path(s, cost)] if len(s) else [] for s in scores]


def tag(model, encoder: Encoder, sentences: list[Sentence], size: int = 32) -> list[list[str]]:
    """The IOB2 tags that the model gives the words of each sentence."""
    return best_tags(word_scores(model, encoder, sentences, size), encoder.labels)
