"""A utility found by looking: blind pairs of answers from the models of a front, and what the choices say."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rl_llm.errors import UserError
from rl_llm.files import write_text
from rl_llm.launch.inference import config_for, measure
from rl_llm.rng import Purpose, stream
from rl_llm.runs.jsonl import read_jsonl
from rl_llm.runs.results import Interval, interval_text
from rl_llm.runs.text import printable, prompt_text
from rl_llm.search.compare import as_interval, column, over_seeds
from rl_llm.search.front import Candidate
from rl_llm.search.ledger import Ledger
from rl_llm.search.preference import Preference, fit
from rl_llm.search.search import Search
from rl_llm.search.wording import point_text
from rl_llm.trainer.utility import Utility, base_statistics, in_spreads
from rl_llm.values import to_json

ANSWERS, PICKS = "answers", "picks.jsonl"
MODELS = 8  # of a longer front as many are shown, evenly along it
PROMPTS = 64  # of each split that the models answer
CHOICES = {"a": 1.0, "b": 0.0, "=": 0.5}
TEST_EVERY = 3  # every third pair is of the test split
_TRIES = 100

Note = Callable[[str], None]


@dataclass(frozen=True)
class Answer:
    """What a model wrote, and its metrics."""

    prompt: str
    completion: str
    metrics: dict[str, float | None]


@dataclass(frozen=True)
class Pair:
    """Two answers to a prompt: the place of the prompt in its split's answers, and the models' names."""

    number: int
    split: str
    prompt: int
    a: str
    b: str


class Picker:
    """The answers of a front's models, the pairs to show, and the choices so far.

    Args:
        search: of which the front is.
        note: is told of progress.

    Raises:
        UserError: fewer than two models, or they cannot be used.
    """

    def __init__(self, search: Search, note: Note) -> None:
        self.search = search
        self.models = _spread([one for one in search.front.points if one.model is not None])
        if len(self.models) < 2:
            raise UserError(
                f"{search.path}: the front has {len(self.models)} models in folders, and two are compared; let the "
                "search come to its end"
            )
        self.answers = {
            split: {one.name: _answers(search, one, split, note) for one in self.models} for split in ("tune", "test")
        }
        known = {one.name for one in self.models}
        self._ledger = Ledger(search.path / PICKS)
        self.picks = [pick for pick in self._ledger.lines if {pick["a"], pick["b"]} <= known]

    def pairs(self, count: int) -> Iterator[Pair]:
        """Those of the first `count` pairs that have not been chosen from; the same ones in the same order each time.

        Two equal answers are no pair.
        """
        done = {pick["pair"] for pick in self.picks}
        names = [one.name for one in self.models]
        for number in range(count):
            split = "test" if number % TEST_EVERY == TEST_EVERY - 1 else "tune"
            answers, generator = self.answers[split], stream(self.search.config.seed, Purpose.PAIR, number)
            for _ in range(_TRIES):
                prompt = int(generator.integers(len(answers[names[0]])))
                a, b = (names[k] for k in generator.permutation(len(names))[:2])
                if answers[a][prompt].completion != answers[b][prompt].completion:
                    if number not in done:
                        yield Pair(number, split, prompt, a, b)
                    break

    def chosen(self, pair: Pair, choice: str) -> None:
        """Take a choice, "a", "b" or "=": it is on disk when this returns."""
        line = {"pair": pair.number, "split": pair.split, "prompt": pair.prompt}
        line |= {"a": pair.a, "b": pair.b, "choice": choice}
        self.picks.append(self._ledger.write(line))

    def preference(self) -> Preference:
        """The utility that the choices on tune prompts say, and whether it foresees those on test prompts."""
        names = list(self._base())
        tune, test = (self._differences(split) for split in ("tune", "test"))
        return fit(*tune, *test, names)

    def ranking(self, preference: Preference) -> list[tuple[Candidate, Interval]]:
        """The whole front by a utility on the tune split, the highest first, with 95 % bounds over prompts."""
        utility = Utility(preference.weights, self._base())
        ranked = [(one, as_interval(over_seeds(utility.per_prompt(one.values)))) for one in self.search.front.points]
        return sorted(ranked, key=lambda pair: -(pair[1]["mean"] or 0.0))

    def _base(self) -> dict[str, tuple[float, float]]:
        """Mean and spread of each metric that a utility can weigh."""
        known = self.search.run_config.measured
        return base_statistics({name: values for name, values in self.search.base_values.items() if name in known})

    def _differences(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """[N, M] first less second answer, and the choices [N]."""
        base = self._base()
        picks = [pick for pick in self.picks if pick["split"] == split]
        sides = []
        for side in ("a", "b"):
            shown = [self.answers[split][pick[side]][pick["prompt"]].metrics for pick in picks]
            values = {name: column([metrics.get(name) for metrics in shown]) for name in base}
            sides.append({name: in_spreads(values[name], *base[name]) for name in base})
        # A metric without a value on one side says nothing of the two.
        differences = [np.nan_to_num(sides[0][name] - sides[1][name]) for name in base]
        choices = np.array([CHOICES[pick["choice"]] for pick in picks], dtype=np.float64)
        return np.stack(differences, axis=1).reshape(len(picks), len(base)), choices


def pick(path: Path, pairs: int, note: Note) -> None:
    """Show pairs in the terminal, take choices from standard input, and print the utility that they say."""
    picker = Picker(Search(path), note)
    models = picker.models
    print(f"{pairs} pairs of answers from {len(models)} models; which one is better: a, b, or = for neither; q stops")
    for pair in picker.pairs(pairs):
        choice = _ask(picker, pair, pairs)
        if choice is None:
            break
        picker.chosen(pair, choice)
    print("\n".join(told(picker)))


def told(picker: Picker) -> list[str]:
    """What the choices say, in lines."""
    found = picker.preference()
    if not found.choices or not any(found.weights.values()):
        return ["The choices on tune prompts say nothing yet; go on with the same command, or with more --pairs."]
    lines = ["", found.to_yaml().rstrip(), ""]
    for name, bound in found.bounds.items():
        unsure = "" if name in found.sure else "  cannot be told from 0"
        lines.append(f"{name}: {interval_text(bound)}{unsure}")
    lines.append(f"from {found.choices} choices on tune prompts, sizes adding up to 1, with 95 % intervals")
    if not found.sure:
        lines.append("The choices cannot tell which metrics matter: choose from more pairs, with a larger --pairs.")
    if not found.held_out:
        lines.append("No choice on a test prompt yet, so nothing confirms it.")
    else:
        verdict = "better than a coin" if found.confirmed else "not shown to be better than a coin"
        lines.append(
            f"It foresees {interval_text(found.agreed)} of {found.held_out} choices on test prompts: {verdict}."
        )
    lines += ["", "the front by it, on the tune split:"]
    for one, utility in picker.ranking(found):
        lines.append(f"  {one.name}  {interval_text(utility)}  {point_text(one.point)}  {one.model or 'no model/'}")
    return lines


def _ask(picker: Picker, pair: Pair, count: int) -> str | None:
    """One of `CHOICES`; None where no more is wanted."""
    a, b = (picker.answers[pair.split][name][pair.prompt] for name in (pair.a, pair.b))
    shown = ["", f"pair {pair.number + 1} of {count}", prompt_text(a.prompt)]
    shown += ["", "--- a", a.completion, "", "--- b", b.completion, ""]
    print(printable("\n".join(shown)))
    while True:
        print("a, b, = or q: ", end="", flush=True)
        line = sys.stdin.readline()
        choice = line.strip().lower()
        if not line or choice == "q":
            print()
            return None
        if choice in CHOICES:
            return choice


def _spread(points: list[Candidate]) -> list[Candidate]:
    """At most `MODELS` of them, evenly along the front."""
    if len(points) <= MODELS:
        return points
    return [points[round(k * (len(points) - 1) / (MODELS - 1))] for k in range(MODELS)]


def _answers(search: Search, one: Candidate, split: str, note: Note) -> list[Answer]:
    """A model's answers to prompts of a split, in the order of the prompts; made once, and kept."""
    file = search.path / ANSWERS / f"{one.name}-{split}.jsonl"
    if not file.is_file():
        note(f"{one.name}: its model answers {split} prompts")
        overrides = [f"evaluation.test_prompts={PROMPTS}", f"evaluation.samples={PROMPTS}"]
        config = config_for(str(search.folder(one.name)), None, overrides)
        found = measure(config, split, note)
        file.parent.mkdir(exist_ok=True)
        write_text(file, "".join(to_json(sample) + "\n" for sample in found.line["samples"]))
    return [Answer(line["prompt"], line["completion"], line["rewards"]) for line in read_jsonl(file)]
