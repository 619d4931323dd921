"""A deterministic synthetic corpus: a small grammar and invented names, so that `make ner` runs anywhere, without data or network.

Names are built from syllables and dealt out to train, dev and test before a sentence is written, so no name of test was ever seen in
training: a model has to read the context. The contexts are made to be ambiguous: one stem serves as surname, place and company
(`Halden`), places carry typical endings only half of the time, titles and sentence starts are capitalised without being names,
and the cue that decides often stands behind the name or several words away.
"""

import random
import re

from .data import Corpus, Sentence, corpus

SIZES = {"train": 1500, "dev": 250, "test": 400}
SHARES = {"train": 0.6, "dev": 0.15, "test": 0.25}  # of the names

ONSETS = [*"bcdfghjklmnprstvwz", "br", "ch", "dr", "gr", "kl", "sh", "st", "th", "tr"]
VOWELS = [*"aaaeeeiioou", "ai", "ea", "ou"]
CODAS = [*"lnrstx", "lm", "ld", "nd", "rk", "rt", "st"]
ENDINGS = {
    "given": ["a", "o", "ie", "us", "ina", "ek", "il", "and"],
    "town": ["ton", "ville", "burg", "port", "mouth", "by"],
    "people": ["ian", "ish", "ese"],
}

PLACEHOLDER = re.compile(r"\{([\w.]+)\}")

# `{rule}` stands for one of the rule's right-hand sides; a rule in capitals is an entity, its type the part before the dot.
GRAMMAR = {
    "PER": ["{given} {stem}", "{given} {stem}", "{given} {letter}. {stem}", "{stem}"],
    "LOC": ["{stem}", "{town}", "{town}", "New {stem}", "{stem} Valley", "Port {stem}"],
    "ORG": [
        *("{stem} Corp", "{stem} & {stem}", "Bank of {stem}", "University of {town}"),
        *("{stem} Institute", "{stem}", "{stem} United", "{letter}{letter}{letter}"),
    ],
    "MISC.people": ["{people}"],
    "MISC.event": ["{stem} Cup", "Treaty of {stem}", "{stem} {year}", "{stem} Games"],
    "MISC.work": ["The {noun} of {stem}", "{stem}", "{noun} and {noun}", "Songs of {town}"],
    "any": ["{PER}", "{LOC}", "{ORG}"],
    "noun": ["river", "garden", "engine", "letter", "bridge", "winter", "mirror", "song"],
    "title": ["President", "Dr.", "Captain", "Judge", "Mrs.", "Sir"],
    "job": ["painter", "striker", "chemist", "minister", "singer", "lawyer", "goalkeeper", "novelist"],
    "day": ["Monday", "Tuesday", "Friday", "Sunday", "March", "October"],
    "said": ["said", "wrote", "insisted", "denied", "announced"],
    "letter": list("ABCDEFGHJKLMNPRSTW"),
    "digit": list("0123456789"),
    "year": ["19{digit}{digit}", "200{digit}"],
    "sentence": [
        "{PER} , a {job} from {LOC} , {said} on {day} that the {noun} was lost .",
        "{PER} was born in {LOC} in {year} and joined {ORG} as a {job} .",
        "{title} {PER} {said} that {ORG} would leave {LOC} .",
        "{ORG} {said} on {day} that it had bought a {noun} in {LOC} from {ORG} .",
        "{ORG} beat {ORG} {digit} - {digit} in {LOC} on {day} .",
        "In {year} {PER} left {ORG} for {LOC} .",
        "{LOC} , a port in the north , is known for its {noun} .",
        "The {noun} of {LOC} was painted by the {MISC.people} {job} {PER} .",
        "{PER} won the {MISC.event} in {year} .",
        "The {MISC.event} was opened in {LOC} by {PER} and {PER} .",
        "Her first {noun} , {MISC.work} , was published by {ORG} .",
        "They wrote to {any} about the {noun} .",
        "{any} and {any} were mentioned in the {noun} .",
        "{LOC} , where the {noun} freezes in {day} , has {digit}{digit} schools .",
        "{PER} , whose wife is a {job} , lives near {LOC} .",
        "{ORG} , whose shares fell on {day} , will close its office in {LOC} .",
        "The road from {LOC} to {LOC} follows the {noun} .",
        "He moved to {LOC} , where he met {PER} , a {MISC.people} {job} .",
        "Shares of {ORG} rose while {ORG} lost ground .",
        "Captain and crew were rescued near {LOC} .",
        "Winter came early that {year} .",
        "The President of the club resigned on {day} .",
        "Bridge and Garden are the names of two songs .",
        "{PER} of {ORG} scored twice against {ORG} .",
        'We lost the {noun} , " {said} {PER} .',
        "The {MISC.people} language is spoken in {LOC} and {LOC} .",
        "Sir , the letter is lost , the {job} {said} .",
        "{ORG} 's {job} {PER} and {LOC} 's {job} {PER} met on {day} .",
    ],
}


def name_lists(rng: random.Random) -> dict[str, dict[str, list[str]]]:
    """{split: {rule: names}}: invented stems and what is derived from them, disjoint between the splits."""

    def stem():
        light = "".join(rng.choice(ONSETS) + rng.choice(VOWELS) for _ in range(rng.choice((0, 1, 1, 2))))
        return (light + rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS)).capitalize()

    stems = list(dict.fromkeys(stem() for _ in range(1200)))
    lists: dict[str, dict[str, list[str]]] = {}
    start = 0
    for split, share in SHARES.items():
        end = start + round(share * len(stems))
        lists[split] = {"stem": stems[start:end]}
        for rule, endings in ENDINGS.items():
            lists[split][rule] = [stem + rng.choice(endings) for stem in stems[start:end]]
        start = end
    return lists


class Writer:
    """Writes sentences from the grammar, with one split's names."""

    def __init__(self, names: dict[str, list[str]], rng: random.Random):
        self.rules, self.rng = {**GRAMMAR, **names}, rng

    def fill(self, text: str) -> str:
        """The text with every `{rule}` in it replaced."""
        return PLACEHOLDER.sub(lambda match: self.fill(self.rng.choice(self.rules[match[1]])), text)

    def tagged(self, text: str) -> list[tuple[str, str]]:
        """(word, IOB2 tag) pairs of a text."""
        pairs: list[tuple[str, str]] = []
        for part in text.split(" "):
            match = PLACEHOLDER.fullmatch(part)
            if match is None:
                pairs.append((self.fill(part), "O"))
            elif match[1][0].isupper():
                words, kind = self.fill(part).split(" "), match[1].partition(".")[0]
                pairs += [(word, f"{'I' if i else 'B'}-{kind}") for i, word in enumerate(words)]
            else:
                pairs += self.tagged(self.rng.choice(self.rules[match[1]]))
        return pairs

    def sentence(self, where: str) -> Sentence:
        words, tags = zip(*self.tagged("{sentence}"), strict=True)
        return Sentence([words[0][0].upper() + words[0][1:], *words[1:]], list(tags), where)


def make(seed: int = 0, sizes: dict[str, int] = SIZES) -> Corpus:
    """The corpus; the same seed gives the same sentences on every machine."""
    rng = random.Random(seed)
    parts = {
        split: [writer.sentence(f"synthetic {split} {i}") for i in range(sizes[split])]
        for split, names in name_lists(rng).items()
        for writer in [Writer(names, rng)]
    }
    return corpus(parts["train"], parts["dev"], parts["test"], ["synthetic sentences, names of test unseen in train"])
