"""Makes synthetic directories of searches: a real course over trials that only pretend to train."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from run_factory import make_config

from rl_llm.rng import Purpose, stream
from rl_llm.search.config import SearchConfig, build_search, run_of
from rl_llm.search.course import Entry, Report
from rl_llm.search.forecast import forecast
from rl_llm.search.ledger import DECISIONS, Ledger
from rl_llm.search.plan import evaluation_every, make_course, make_space, utility_of
from rl_llm.search.samples import Samples
from rl_llm.trainer.utility import Utility
from rl_llm.values import to_json

COMPONENTS = {"chrf": 1.0, "length": 1.0, "facts": 1.0}
TUNE, TEST = 24, 40
STEPS = 18
TOKENS_A_STEP = 1000

# Each metric's gain over the whole of a run, by the share of weight that each component has.
Gain = Callable[[dict[str, float]], dict[str, float]]


def opposed(weights: dict[str, float]) -> dict[str, float]:
    """Each component lifts its own metric, less and less, and length costs chrf."""
    chrf, length, facts = (weights.get(name, 0.0) for name in COMPONENTS)
    return {"chrf": 0.5 * chrf**0.5 - 0.4 * length, "length": 0.4 * length**0.5, "facts": 0.3 * facts**0.5 + 0.1 * chrf}


def search_config(**changes: Any) -> SearchConfig:
    """A search over the weights of three components, 9 trials, 2 finalists on 2 seeds."""
    run = make_config(COMPONENTS, (f"trainer.steps={STEPS}",)).to_dict()
    raw: dict[str, Any] = {
        "run": run,
        "space": {"rewards.weights": {"simplex": list(COMPONENTS)}, "learner.lr": {"loguniform": [1e-6, 1e-4]}},
        "trials": 9,
        "utility": {"chrf": 1.0, "length": 1.0, "facts": 0.5},
        "finalists": 2,
        "seeds": 2,
    }
    return build_search({**raw, **changes})


class Pretender:
    """Writes what a search writes, with metrics that rise as `gain` says.

    Args:
        reports: that are made before the search is killed; None: it comes to its end.
        fails: names of trials that crash at their first report.
    """

    def __init__(
        self, path: Path, config: SearchConfig, gain: Gain, reports: int | None = None, fails: tuple[str, ...] = ()
    ) -> None:
        self.path, self.config, self.gain, self.left, self.fails = path, config, gain, reports, fails
        self.run = run_of(config)
        self.utility = utility_of(config, self.run)

    def search(self) -> Path:
        self.path.mkdir(parents=True)
        (self.path / "search.yaml").write_text(yaml.safe_dump(self.config.model_dump(mode="json"), sort_keys=False))
        self.evaluate(self.path / "base", {}, 0, 0, "validation", "tune")
        self.evaluate(self.path / "base", {}, 0, 0, "before", "test")
        course = make_course(self.config, make_space(self.config), [], Ledger(self.path / DECISIONS))
        while course.going and (self.left is None or self.left > 0):
            entry = course.going[0]
            if entry.name in self.fails:
                course.fail(entry.name, "it crashed: <b>no room</b>", again=entry.failures == 0)
                continue
            course.report(entry.name, self.advance(entry))
            self.left = None if self.left is None else self.left - 1
        if course.over:
            summary = {"status": "finished", "reason": "", "seconds": 754.2}
            (self.path / "summary.json").write_text(to_json(summary))
        return self.path

    def advance(self, entry: Entry) -> Report:
        """Train a trial up to its next evaluation."""
        folder, every = self.path / "trials" / entry.name, evaluation_every(self.config, self.run)
        done = entry.reports[-1].step if entry.reports else 0
        step = STEPS if entry.role == "soup" else min(done + every, STEPS)
        label = "soup" if entry.role == "soup" else "validation"
        values = self.evaluate(folder, entry.point, entry.seed or 0, step, label, "tune")
        if step == STEPS:
            if entry.role in ("finalist", "control"):
                self.evaluate(folder, entry.point, entry.seed or 0, step, "after", "test")
            (folder / "model").mkdir()
            (folder / "summary.json").write_text(to_json({"status": "finished", "best_step": STEPS}))
        known = [None if np.isnan(value) else float(value) for value in values.get("utility", [])]
        return Report(
            step=step,
            tokens=step * TOKENS_A_STEP,
            seconds=step * 1.5,
            utility=known if self.utility else [],
            metrics={name: float(np.nanmean(column)) for name, column in values.items() if name != "utility"},
            reward=[0.1, 0.2],
            ended="finished" if step == STEPS else "",
        )

    def evaluate(
        self, folder: Path, point: dict[str, Any], seed: int, step: int, label: str, split: str
    ) -> dict[str, np.ndarray]:
        """Values a prompt, written as a run writes them; prompts and noise are the same for all policies."""
        count = TUNE if split == "tune" else TEST
        weights = point.get("rewards.weights", {name.removeprefix("single-"): share for name, share in point.items()})
        total = sum(weights.values()) or 1.0
        gains = self.gain({name: weight / total for name, weight in weights.items()}) if step else {}
        own = stream(seed, Purpose.SHUFFLE, 7)
        values = {}
        for number, name in enumerate(COMPONENTS):
            hard = stream(0, Purpose.HELD_OUT, 100 * number + count).normal(0.3, 0.1, size=count)
            jitter = own.normal(0, 0.01) + own.normal(0, 0.02, size=count)
            values[name] = hard + (gains.get(name, 0.0) * step / STEPS + jitter if step else 0.0)
        values["tokens"] = np.full(count, 12.0)
        if self.utility:
            base = Utility(self.utility, {})
            base.measure_base(
                {
                    n: stream(0, Purpose.HELD_OUT, 100 * k + TUNE).normal(0.3, 0.1, size=TUNE)
                    for k, n in enumerate(COMPONENTS)
                }
            )
            values["utility"] = base.per_prompt(values)
        write_evaluation(folder, label, split, step, values)
        (folder / "config.yaml").write_text(self.run.to_yaml())
        return values


def write_evaluation(folder: Path, label: str, split: str, step: int, values: dict[str, np.ndarray]) -> None:
    (folder / "evaluations").mkdir(parents=True, exist_ok=True)
    columns = {name: pa.array(column, pa.float64(), mask=np.isnan(column)) for name, column in values.items()}
    table = pa.table({"prompt_id": pa.array(range(len(next(iter(values.values())))), pa.int64()), **columns})
    pq.write_table(table, folder / "evaluations" / f"{label}-{split}-{step:06d}.parquet")


def make_search(
    path: Path,
    *,
    gain: Gain = opposed,
    reports: int | None = None,
    fails: tuple[str, ...] = (),
    predicted: bool = False,
    **changes: Any,
) -> Path:
    """The directory of a search; `changes` are of its file. See `Pretender`."""
    made = Pretender(path, search_config(**changes), gain, reports, fails).search()
    if predicted:
        (made / "forecast.json").write_text(to_json(forecast_of(search_config(**changes))))
    return made


def forecast_of(config: SearchConfig) -> dict[str, Any]:
    """A forecast from samples in which chrf and length oppose each other."""
    generator = stream(0, Purpose.FORECAST)
    chrf, other = generator.normal(size=(2, TUNE * 16))
    values = {"chrf": 0.3 + 0.1 * chrf, "length": 0.3 - 0.06 * chrf + 0.08 * other, "facts": 0.3 + 0.1 * other}
    base = dict.fromkeys(values, (0.3, 0.1))
    samples = Samples(values, np.repeat(np.arange(TUNE), 16), base)
    return forecast(samples, run_of(config), list(COMPONENTS), config.utility).to_dict()
