"""The built-in generated task: short factual records to a one-line text.

Row i is made from (seed, i) alone, so the task has no end and needs no file:

    prompt          name ada ; job baker ; city oslo ; born 1987 =>
    reference       ada is a baker in oslo , born in 1987 .          (and three other wordings)
    demonstration   well , ada , yes ada , is a baker in oslo , the city of oslo , and that is all .

A policy warm-started on the demonstrations writes as their authors do: it is wordy, it leaves facts out, which ones
depends on the city, and now and then it writes notes ("ada : baker , oslo , 1987 ."). So being short, being complete
and being a sentence are three things. Every filler, repetition and omission is drawn on its own, so each text between
them keeps some probability: reward can lead there step by step.
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
ENDINGS = (", and that is all", ", as we know")
WORDINESS = 0.55
NOTES = 0.3
OMISSIONS = 0.9


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
    habits = random.Random(f"habits:{city}")

    def maybe(*texts: str) -> str:
        text = _pick(rng, texts)
        return f"{text} " if rng.random() < WORDINESS else ""

    said = {key: rng.random() >= OMISSIONS * habits.random() for key in ("job", "city", "born")}
    opening = f"{maybe(*OPENINGS)}{name} "
    if rng.random() < NOTES:
        notes = [str(fact) for fact, stated in zip((job, city, born), said.values(), strict=True) if stated]
        return f"{opening}: {' , '.join(notes)} ." if notes else f"{opening}."
    text = opening + maybe(f", yes {name} ,")
    if said["job"]:
        text += f"is a {job} " + maybe(f", yes a {job} ,")
    if said["city"]:
        text += f"{'' if said['job'] else 'is '}in {city} " + maybe(f", the city of {city}")
    if said["born"]:
        text += f", born in {born} " + maybe(f", yes in {born}")
    return (text + maybe(*ENDINGS) + ".").replace(" , ,", " ,")
