"""Scores of what was found against what was right: of classes by scikit-learn, of texts as SQuAD and ROUGE define them."""

import re
import string
from collections import Counter
from collections.abc import Callable

from sklearn.metrics import accuracy_score, f1_score

ARTICLES = re.compile(r"\b(a|an|the)\b")


def of_classes(gold: list[str], found: list[str]) -> dict[str, float]:
    """Accuracy, and the mean over classes of their F1."""
    macro = f1_score(gold, found, average="macro", zero_division=0.0)  # type: ignore
    return {"accuracy": float(accuracy_score(gold, found)), "macro_f1": float(macro)}


def of_relations(gold: list[str], found: list[str], none: str) -> dict[str, float]:
    """Micro-F1 of all classes but `none`, as TACRED scores: a relation found where none is costs precision, one missed recall."""
    labels = sorted({*gold, *found} - {none})
    micro = f1_score(gold, found, labels=labels, average="micro", zero_division=0.0) if labels else 0.0  # type: ignore
    return {"micro_f1": float(micro), "accuracy": float(accuracy_score(gold, found))}


def words(text: str) -> list[str]:
    """SQuAD's normalisation: lower case, no punctuation, no articles, cut at blanks."""
    bare = "".join(c for c in text.lower() if c not in string.punctuation)
    return ARTICLES.sub(" ", bare).split()


def f1_of_words(gold: str, found: str) -> float:
    """F1 of the bags of words (SQuAD): 1 where both are empty, 0 where one is."""
    a, b = words(gold), words(found)
    shared = sum((Counter(a) & Counter(b)).values())
    return 2 * shared / (len(a) + len(b)) if a and b else float(a == b)


def rouge_l(gold: str, found: str) -> float:
    """F1 of the longest common subsequence of words (Lin 2004), words being what blanks separate."""
    a, b = gold.split(), found.split()
    row = [0] * (len(b) + 1)
    for x in a:
        before = row
        row = [0]
        for j, y in enumerate(b, 1):
            row.append(before[j - 1] + 1 if x == y else max(before[j], row[-1]))
    return 2 * row[-1] / (len(a) + len(b)) if a and b else float(a == b)


def best_of(score: Callable[[str, str], float], golds: list[str], found: str) -> float:
    return max(score(gold, found) for gold in golds)


def of_answers(golds: list[list[str]], found: list[str]) -> dict[str, float]:
    """Exact match and F1 of words as SQuAD defines them: normalised, against the best of the right answers."""
    pairs = list(zip(golds, found, strict=True))
    exact = sum(best_of(lambda a, b: words(a) == words(b), g, f) for g, f in pairs)
    return {"exact": exact / len(pairs), "f1": sum(best_of(f1_of_words, g, f) for g, f in pairs) / len(pairs)}


def of_completions(golds: list[str], found: list[str]) -> dict[str, float]:
    """The share that is right to the letter (but for blanks around), and ROUGE-L."""
    pairs = list(zip(golds, found, strict=True))
    exact = sum(gold.strip() == text.strip() for gold, text in pairs)
    return {"exact": exact / len(pairs), "rouge_l": sum(rouge_l(g, f) for g, f in pairs) / len(pairs)}
