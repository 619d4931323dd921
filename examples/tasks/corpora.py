"""Deterministic toy corpora, in the same form as a user's JSON lines: a seed gives the same examples on every machine.

Invented names are dealt out to train, dev and test before anything is written, so those of test are unseen; where names are known, and
of negations and adjectives, a quarter of the pairs is kept for test. So a score on test says what was understood, not what was
remembered.
"""

import random
from collections.abc import Callable

from ..ner.synthetic import name_lists

Parts = dict[str, list[dict]]
SIZES = {"train": 3000, "dev": 100, "test": 300}
MONTHS = ["January", "March", "April", "June", "August", "October", "December"]
LONGEST = 8  # letters of a name: rows stay short
NUMBERS = ["two", "three", "four", "five", "six", "seven", "eight"]


class Source:
    """What one part is written from: its names, chance, and whether the pairs kept for test are those to use."""

    def __init__(self, names: dict[str, list[str]], rng: random.Random, kept: bool):
        self.names = {kind: sorted({n for n in names[kind] if len(n) <= LONGEST}) for kind in ("stem", "given", "town")}
        self.rng, self.kept = rng, kept

    def pick(self, choices):
        return self.rng.choice(choices)

    def different(self, kind: str, count: int) -> list[str]:
        """So many names of a kind (stem, given, town), no two the same."""
        return self.rng.sample(self.names[kind], count)

    def pair(self, first: list, second: list) -> tuple:
        """One of each, not the same twice; of all pairs a quarter is met in test alone, and test meets no other."""
        while True:
            i, j = self.rng.randrange(len(first)), self.rng.randrange(len(second))
            if first[i] != second[j] and ((i + j) % 4 == 1) == self.kept:
                return first[i], second[j]


def make(write: Callable[[Source], dict], seed: int = 0, sizes: dict[str, int] = SIZES) -> Parts:
    """{"train": examples, "dev": ..., "test": ...} by one of the writers below; none of dev and test is in another part."""
    rng = random.Random(seed)
    names, seen, parts = name_lists(rng), set(), {}
    for part, size in sizes.items():
        source, parts[part] = Source(names[part], rng, part == "test"), []
        while len(parts[part]) < size:
            example = write(source)
            if part == "train" or str(example) not in seen:
                parts[part].append(example)
                seen.add(str(example))
    return parts


def fill(template: str, values: dict[str, str]) -> tuple[str, dict[str, list[int]]]:
    """The template with each {key} replaced, and {key: [start, end]} of the characters where its value stands."""
    text, spans = "", {}
    for piece in template.split("{"):
        key, _, rest = piece.rpartition("}")
        if key:
            spans[key] = [len(text), len(text) + len(values[key])]
            text += values[key]
        text += rest
    return text, spans


# Classification: the verdict of a review

ADJECTIVES = {
    "positive": ["good", "lovely", "fresh", "friendly", "excellent", "clean", "quick", "cheerful"],
    "negative": ["bad", "dreadful", "stale", "rude", "poor", "dirty", "slow", "gloomy"],
}
NEGATIONS = ["not", "far from", "anything but", "hardly"]
ADVERBS = ["", "", "very ", "really ", "rather "]
SERVED = ["soup", "bread", "service", "room", "music", "waiter", "view", "coffee"]
FACTS = [
    "The {} of the {} is next to the harbour.",
    "The {} at the {} was built of brick in spring.",
    "One reaches the {} of the {} through the garden.",
    "There is a {} in the {}, and a second one upstairs.",
]


def _clause(source: Source, verdict: str) -> str:
    opposite = "negative" if verdict == "positive" else "positive"
    subject = f"the {source.pick(SERVED)}" + source.pick(["", f" at the {source.pick(source.names['stem'])}"])
    if source.rng.random() < 0.3:
        negation, adjective = source.pair(NEGATIONS, ADJECTIVES[opposite])
        return f"{subject} was {negation} {adjective}"
    return f"{subject} was {source.pick(ADVERBS)}{source.pick(ADJECTIVES[verdict])}"


def review(source: Source) -> dict:
    """{"text", "label"}: positive or negative by the main clause, whatever the others say, or neutral for a mere fact."""
    label = source.pick(["positive", "negative", "neutral"])
    if label == "neutral":
        return {
            "text": source.pick(FACTS).format(source.pick(SERVED), source.pick(source.names["stem"])),
            "label": label,
        }
    opposite = "negative" if label == "positive" else "positive"
    form = source.pick(["{0}", "{0}", "{0}", "although {1}, {0}", "{1}, but {0}"])
    text = form.format(_clause(source, label), _clause(source, opposite))
    return {"text": text[0].upper() + text[1:] + ".", "label": label}


# Relations: persons P and Q, organisations O and N, places L and M

FOUNDED, WORKS, BORN, BASED, NONE = "founded", "works for", "born in", "based in", "none"
SENTENCES = [
    ("{P} founded {O} in {L}.", [("P", FOUNDED, "O"), ("O", BASED, "L")]),
    ("{O}, founded by {P}, has bought {N}.", [("P", FOUNDED, "O")]),
    ("{P}, who set up {O}, comes from {L}.", [("P", FOUNDED, "O"), ("P", BORN, "L")]),
    ("{P} was born in {L} and works for {O}.", [("P", BORN, "L"), ("P", WORKS, "O")]),
    ("{Q} of {O} met {P} in {L}.", [("Q", WORKS, "O")]),
    ("{O} has hired {P}, who left {N}.", [("P", WORKS, "O")]),
    ("{P}, a native of {L}, moved to {M}.", [("P", BORN, "L")]),
    ("{O} of {L} sued {N}, which {P} founded in {M}.", [("P", FOUNDED, "N"), ("N", BASED, "M"), ("O", BASED, "L")]),
    ("From its seat in {L}, {O} wrote to {P}.", [("O", BASED, "L")]),
    ("{P} wrote to {Q}, the founder of {O}.", [("Q", FOUNDED, "O")]),
]


def relation(source: Source) -> dict:
    """{"text", "head", "tail", "label"}: two marked names, and what the first is to the second; "none" the other way round."""
    template, facts = source.pick(SENTENCES)
    stems = source.different("stem", 4)
    names = dict(zip("PQOLNM", [*source.different("given", 2), *stems], strict=True))
    text, spans = fill(template, names)
    known = {(head, tail): label for head, label, tail in facts}
    others = [(a, b) for a in spans for b in spans if a != b and (a, b) not in known]
    head, tail = source.pick(list(known)) if source.rng.random() < 0.6 else source.pick(others)
    return {"text": text, "head": spans[head], "tail": spans[tail], "label": known.get((head, tail), NONE)}


# Questions: who did what, among others who did something else

PEOPLE = [
    "Ada",
    "Ben",
    "Clara",
    "David",
    "Emma",
    "Felix",
    "Greta",
    "Hugo",
    "Ida",
    "Jonas",
    "Karl",
    "Lena",
    "Max",
    "Nora",
]
STORIES = [  # a sentence, and what may be asked about it
    ("{name} moved to {town} in {month}.", {"Where did {} move?": "town", "When did {} move?": "month"}),
    ("{name} works for {firm} and has {count} dogs.", {"Who employs {}?": "firm", "How many dogs has {}?": "count"}),
    ("In {month} {name} left {firm}.", {"When did {} leave?": "month", "What did {} leave?": "firm"}),
    ("{name} sold {count} boats to {firm}.", {"Who got boats of {}?": "firm", "How many boats sold {}?": "count"}),
]


def question(source: Source) -> dict:
    """{"question", "context", "answers"}: a name, a month or a number that is said of one of three persons, who did different things."""
    context, asked = "News:", []
    people, towns, firms = source.rng.sample(PEOPLE, 3), source.different("town", 3), source.different("stem", 3)
    stories = source.rng.sample(STORIES, 3)
    for name, town, firm, (template, asks) in zip(people, towns, firms, stories, strict=True):
        values = {"name": name, "town": town, "firm": firm, "count": source.pick(NUMBERS), "month": source.pick(MONTHS)}
        text, spans = fill(template, values)
        context += " "
        for ask, key in asks.items():
            start, end = spans[key]
            asked.append((ask.format(name), text[start:end], len(context) + start))
        context += text
    ask, answer, start = source.pick(asked)
    return {"question": ask, "context": context, "answers": {"text": [answer], "answer_start": [start]}}


# Completions: a summary, a translation, the next turn of a dialogue


TEAMS = [
    "Ajax",
    "Arrows",
    "Bears",
    "Comets",
    "Eagles",
    "Foxes",
    "Giants",
    "Lions",
    "Rockets",
    "Sharks",
    "Tigers",
    "Wolves",
]
PLACES = ["Berlin", "Cairo", "Dublin", "Lima", "London", "Madrid", "Oslo", "Paris", "Prague", "Rome", "Tokyo", "Vienna"]


def summary(source: Source) -> dict:
    """{"prompt", "target"}: a match reported at length, and in one line."""
    (home, guest), place = source.pair(TEAMS, TEAMS), source.pick(PLACES)
    more, fewer = sorted(source.rng.sample(range(7), 2), reverse=True)
    winner, loser = source.pick([(home, guest), (guest, home)])
    filler = source.pick(["It rained.", "The stands were full.", "Nobody was hurt.", "The light failed twice."])
    report = [
        source.pick([f"{home} and {guest} met in {place}.", f"In {place}, {home} played {guest}."]),
        filler,
        source.pick([f"{winner} scored {more} and {loser} {fewer}.", f"{loser} got {fewer}, {winner} got {more}."]),
    ]
    return {
        "prompt": f"Report: {' '.join(report)}\nSummary:",
        "target": f"{winner} beat {loser} {more} to {fewer} in {place}.",
    }


NOUNS = [  # English, German, gender
    *(("man", "Mann", "m"), ("dog", "Hund", "m"), ("table", "Tisch", "m"), ("woman", "Frau", "f")),
    *(
        ("cat", "Katze", "f"),
        ("lamp", "Lampe", "f"),
        ("child", "Kind", "n"),
        ("horse", "Pferd", "n"),
        ("book", "Buch", "n"),
    ),
]
QUALITIES = [
    ("old", "alt"),
    ("small", "klein"),
    ("red", "rot"),
    ("new", "neu"),
    ("beautiful", "schön"),
    ("heavy", "schwer"),
]
VERBS = [("sees", "sieht"), ("finds", "findet"), ("buys", "kauft"), ("draws", "malt"), ("looks for", "sucht")]
ARTICLES = {"m": ("der", "den"), "f": ("die", "die"), "n": ("das", "das")}


def _noun_phrase(source: Source, is_object: bool) -> tuple[str, str]:
    (english, german, gender), (quality, stem) = source.pair(NOUNS, QUALITIES)
    article = ARTICLES[gender][is_object]
    return f"the {quality} {english}", f"{article} {stem}{'en' if article == 'den' else 'e'} {german}"


def translation(source: Source) -> dict:
    """{"prompt", "target"}: English and German, whose endings follow gender and case, and whose verb moves to the end after "that"."""
    (subject, subjekt), (thing, objekt) = _noun_phrase(source, False), _noun_phrase(source, True)
    verb, wort = source.pick(VERBS)
    english, german = source.pick(
        [
            (f"{subject} {verb} {thing}", f"{subjekt} {wort} {objekt}"),
            (f"today {subject} {verb} {thing}", f"heute {wort} {subjekt} {objekt}"),
            (f"I know that {subject} {verb} {thing}", f"ich weiß, dass {subjekt} {objekt} {wort}"),
        ]
    )
    return {"prompt": f"English: {english}.\nGerman:", "target": f"{german}."}


RESTAURANTS = ["Antonio's", "the Anchor", "the Bridge", "Chang's", "the Garden", "Maria's", "the Mill", "the Swan"]
ASKED = {"place": "Which restaurant?", "people": "For how many?", "time": "At what time?"}


def dialogue(source: Source) -> dict:
    """{"prompt", "target"}: a table is booked; the assistant asks for what is missing, or repeats what was said."""
    place, time = source.pair(RESTAURANTS, NUMBERS)
    said = {"place": place, "people": source.pick(NUMBERS), "time": time}
    words = {"place": "at {}", "people": "for {}", "time": "at {} o'clock"}
    slots = list(said)
    source.rng.shuffle(slots)
    given = slots[: source.rng.randrange(4)]
    wish = " ".join(words[slot].format(said[slot]) for slot in given)
    lines = [f"User: {source.pick(['A table', 'I want a table', 'Please book a table'])}{' ' + wish if wish else ''}."]
    for slot in ASKED:
        if slot not in given:
            lines.append(f"Assistant: {ASKED[slot]}")
            lines.append(f"User: {words[slot].format(said[slot])}.")
    lines.append(f"Assistant: A table for {said['people']} at {said['place']} at {said['time']} o'clock.")
    turn = source.pick([i for i, line in enumerate(lines) if line.startswith("Assistant")])
    return {"prompt": "\n".join([*lines[:turn], "Assistant:"]), "target": lines[turn].removeprefix("Assistant: ")}


COMPLETIONS = {"summarisation": summary, "translation": translation, "dialogue": dialogue}
