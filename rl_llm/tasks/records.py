"""The built-in generated task: short factual records to a one-line text.

Row i is made from (seed, i) alone, so the task has no end and needs no file:

    prompt          name ada ; job baker ; city oslo ; born 1987 =>
    reference       ada is a baker in oslo , born in 1987 .          (and three other wordings)
    demonstration   well , ada , yes ada , is a baker in oslo , the city of oslo , born in 1987 .

A policy warm-started on the demonstrations is wordy and repeats itself. Every filler and repetition is drawn on its
own, so each shorter text down to the concise one keeps some probability: reward can lead there step by step.
"""

import random
from collections.abc import Iterator
from typing import Any

NAMES = (
    "ada", "ana", "ben", "carl", "dora", "emil", "eva", "finn", "greta", "hugo", "ida", "ivan",
    "jana", "karl", "lena", "leo", "mara", "nils", "olga", "otto", "paul", "rosa", "tom", "vera",
)  # fmt: skip
# No job starts with a vowel, so "a" is always the right article.
JOBS = (
    "baker", "barber", "butcher", "carpenter", "clerk", "cook", "dancer", "dentist", "doctor", "driver", "farmer",
    "guard", "judge", "lawyer", "miner", "nurse", "painter", "pilot", "sailor", "singer", "tailor", "waiter", "writer",
)  # fmt: skip
CITIES = (
    "bern", "bonn", "brno", "cairo", "cork", "delhi", "dover", "genoa", "ghent", "kyoto", "lima", "lyon",
    "milan", "minsk", "nice", "oslo", "paris", "porto", "prague", "quito", "riga", "rome", "turin", "york",
)  # fmt: skip
YEARS = range(1960, 2000)

OPENINGS = ("well ,", "now ,", "you see ,")
SOURCES = ("as the record shows ,", "it is said that", "it is known that")
ENDINGS = (", and that is all", ", as we know")
WORDINESS = 0.55


def generate(seed: int) -> Iterator[dict[str, Any]]:
    """The rows 0, 1, 2, ... without end."""
    index = 0
    while True:
        yield record(seed, index)
        index += 1


def record(seed: int, index: int) -> dict[str, Any]:
    """Row `index`: `prompt`, the facts `name`, `job`, `city`, `born`, four texts in `reference` and a `demonstration`.

    Equal prompts have equal references; the demonstration differs from row to row.
    """
    rng = random.Random(f"records:{seed}:{index}")
    facts: dict[str, Any] = {
        "name": _pick(rng, NAMES),
        "job": _pick(rng, JOBS),
        "city": _pick(rng, CITIES),
        "born": _pick(rng, YEARS),
    }
    # No colon after a key: a value right behind its key is what a small model learns to copy soonest.
    prompt = " ; ".join(f"{key} {value}" for key, value in facts.items()) + " =>"
    return {"prompt": prompt, **facts, "reference": _references(**facts), "demonstration": _demonstration(rng, **facts)}


def _pick(rng: random.Random, choices: Any) -> Any:
    # Python promises the same numbers in every version for random() alone, not for choice().
    return choices[int(rng.random() * len(choices))]


def _references(name: str, job: str, city: str, born: int) -> list[str]:
    return [
        f"{name} is a {job} in {city} , born in {born} .",
        f"{name} , born in {born} , is a {job} in {city} .",
        f"born in {born} , {name} is a {job} in {city} .",
        f"the {job} {name} from {city} was born in {born} .",
    ]


def _demonstration(rng: random.Random, name: str, job: str, city: str, born: int) -> str:
    def maybe(*texts: str) -> str:
        text = _pick(rng, texts)
        return f"{text} " if rng.random() < WORDINESS else ""

    return (
        f"{maybe(*OPENINGS)}{maybe(*SOURCES)}"
        f"{name} {maybe(f', yes {name} ,')}"
        f"is a {job} {maybe(f', yes a {job} ,')}"
        f"in {city} {maybe(f', the city of {city}')}"
        f", born in {born} {maybe(f', yes in {born}')}{maybe(*ENDINGS)}."
    )
