"""Does a search see through a trap? Problems with a component that is easy, varies most, and lowers what is held out.

    python benchmarks/trap.py [--problems 20] [--first 20] [--output FOLDER]

Each problem is generated from its number: a text in which the prompt's word stands a number of times, a reward for the
word, one for the length, and one that counts different words, of which each more is a wrong one. Their scales differ by
up to two orders of magnitude, and the trap varies most. A search of 12 trials by halving ranks by a metric that is no
component. It has seen through the trap where its result, the best finalist, gives the trap less than a third of its
equal weight. Beside it stands what ranking by the weighted reward would have taken: of the same 12 trials, all trained
to the end, the one with the highest reward under its own weights, a mean over its last third of steps.

Problems below 20 and from 1000 on were used to make the benchmark. What is there already is not run again.
"""

import argparse
import json
import os
import random
import sys
from pathlib import Path
from typing import Any

# As the commands do, and before torch is there: threads that wait spinning slow the processes beside them.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np

from rl_llm.imports import look_in
from rl_llm.search.config import SearchConfig, build_search
from rl_llm.search.course import Course
from rl_llm.search.launching import run_search
from rl_llm.search.ledger import Ledger
from rl_llm.search.plan import make_course, make_space
from rl_llm.search.space import WEIGHTS

WORDS = (
    "apple", "birch", "candle", "delta", "ember", "forest", "garnet", "hollow", "island", "jacket", "kettle",
    "lantern", "meadow", "nickel", "orchid", "pepper", "quartz", "ribbon", "saddle", "timber", "umber", "velvet",
)  # fmt: skip
SPREAD = {"match": 0.3, "near": 2.0, "trap": 1.2}
"""Standard deviations of the raw values among samples of the first policy, about."""


class Problem:
    """A task in which the prompt's word is to be written a number of times, and rewards of unequal scale.

    Everything is drawn from the seed: words, length, and the scales, over two orders of magnitude.
    """

    def __init__(self, seed: int) -> None:
        rng = random.Random(f"trap:{seed}")
        self.seed = seed
        self.words = rng.sample(WORDS, 8)
        self.length = rng.randint(2, 4)
        scales = {name: 10 ** rng.uniform(-1, 1) for name in ("match", "near")}
        # Of all components it varies most among the samples of a prompt.
        scales["trap"] = max(scales[name] * SPREAD[name] for name in scales) * rng.uniform(1, 3) / SPREAD["trap"]
        self.scales = {name: round(scale, 3) for name, scale in scales.items()}

    def rows(self, count: int = 480) -> list[dict[str, Any]]:
        rng = random.Random(f"trap rows:{self.seed}")
        rows = []
        for i in range(count):
            word = self.words[i % 4]
            demonstrations = []
            for _ in range(8):
                words = [word if rng.random() < 0.4 else rng.choice(self.words) for _ in range(rng.randint(1, 8))]
                demonstrations.append(" ".join(words))
            rows.append({"id": str(i), "prompt": f"{i} {word} :", "word": word, "demonstration": demonstrations})
        return rows

    def settings(self, folder: Path) -> dict[str, Any]:
        """The settings of a run, with the task's rows in a file of this folder."""
        data = folder / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in self.rows()))
        use = {
            "match": {"use": "trap_rewards:match"},
            "near": {"use": "trap_rewards:near", "args": {"length": self.length}},
            "trap": {"use": "trap_rewards:different"},
        }
        return {
            "task": {"data": str(data), "split": {"by": "id", "tune": 0.2, "test": 0.3}},
            "policy": {"scratch": {"layers": 2, "hidden_size": 64, "heads": 2, "vocab_size": 300}, "precision": "fp32"},
            "warm_start": {"target": "demonstration", "supervised_steps": 200, "lr": 1.0e-2, "max_target_tokens": 32},
            "rollout": {
                "prompts_per_step": 6, "samples_per_prompt": 8, "rows_per_request": 48, "max_new_tokens": 16,
            },
            "rewards": {"components": {name: {**use[name], "scale": self.scales[name]} for name in use}},
            "learner": {"lr": 4.0e-3, "schedule": "linear", "warmup_steps": 2},
            "evaluation": {
                "metrics": {"ideal": {"use": "trap_rewards:ideal", "args": {"length": self.length}}},
                "utility": {"ideal": 1.0},
                "temperature": 1.0,
                "prompts": 64,
                "samples": 0,
                "test_prompts": 128,
            },
            "logging": {"tensorboard": False, "rollouts": 0},
            "trainer": {"steps": 36},
        }  # fmt: skip


def search_of(settings: dict[str, Any], **changes: Any) -> SearchConfig:
    """12 weightings of the three; equal weights and those that leave one out are tried first."""
    space = {WEIGHTS: {"simplex": ["match", "near", "trap"]}}
    base = {"run": settings, "space": space, "trials": 12, "finalists": 2, "seeds": 2, "controls": False}
    return build_search({**base, **changes})


def run(search: SearchConfig, path: Path) -> Course:
    run_search(search, path, resume=True)
    return make_course(search, make_space(search), [], Ledger(path / "decisions.jsonl"))


def result(course: Course) -> dict[str, float]:
    """Weights of the finalist whose runs on fresh seeds have the highest tune utility."""
    utilities: dict[str, list[float]] = {}
    for entry in course.of("finalist"):
        utilities.setdefault(entry.source, []).append(float(np.nanmean(entry.utility)))
    best = max(utilities, key=lambda name: float(np.mean(utilities[name])))
    return dict(course.entries[best].point[WEIGHTS])


def by_reward(course: Course) -> dict[str, float]:
    """Weights of the trial with the highest weighted reward of its own, over the last third of its steps."""

    def reward(name: str) -> float:
        steps = [value for report in course.entries[name].reports for value in report.reward]
        return float(np.mean(steps[-len(steps) // 3 :]))

    best = max((entry.name for entry in course.of("trial") if entry.state == "done"), key=reward)
    return dict(course.entries[best].point[WEIGHTS])


def shown(weights: dict[str, float]) -> str:
    return " ".join(f"{name} {weight:.2f}" for name, weight in weights.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=20)
    parser.add_argument("--first", type=int, default=20, help="number of the first problem")
    parser.add_argument("--output", type=Path, default=Path("runs/trap"))
    given = parser.parse_args()
    look_in(Path(__file__).parent)
    limit, seen_through, fooled = 1 / 9, 0, 0
    print("| problem | scales | search | trap | by weighted reward | trap |")
    print("|---" * 6 + "|")
    for number in range(given.first, given.first + given.problems):
        problem, folder = Problem(number), given.output / str(number)
        folder.mkdir(parents=True, exist_ok=True)
        settings = problem.settings(folder)
        ours = result(run(search_of(settings), folder / "search"))
        plain = {"scheduler": "none", "finalists": 0, "overoptimized": 0, "forecast": 0}
        theirs = by_reward(run(search_of(settings, **plain), folder / "complete"))
        seen_through += ours["trap"] < limit
        fooled += theirs["trap"] >= limit
        cells = (shown(problem.scales), shown(ours), _mark(ours, limit), shown(theirs), _mark(theirs, limit))
        print(f"| {number} | {' | '.join(cells)} |", flush=True)
    print(f"the search gave the trap less than {limit:.3f} in {seen_through} of {given.problems} problems")
    print(f"ranking by the weighted reward gave it as much or more in {fooled}")


def _mark(weights: dict[str, float], limit: float) -> str:
    return "seen" if weights["trap"] < limit else "**fallen for**"


if __name__ == "__main__":
    sys.exit(main())
