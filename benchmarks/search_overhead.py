"""What a search costs beside its training: a trial against a single run, new weights in a live run, a PBT exploit.

    python benchmarks/search_overhead.py [--rounds 3] [key=value ...]

A trial's seconds are those that four more trials add to a search of the same weighting, one at a time, so what a
search does once is not in them. The single run is not the first of its process, so neither are Python's imports. Both
evaluate at the same steps and write the same records; the run also measures its test split twice. Searches and runs
take turns; the ratio is the median over the rounds. An exploit is what a slot does for it: another config and
another directory on the workers there are, the donor's checkpoint in place, and a checkpoint of its own. Overrides are
of the run, the quickstart without controls.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# As the commands do, and before torch is there: threads that wait spinning slow the processes beside them.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from rl_llm.config import RunConfig, load_config
from rl_llm.launch.preflight import make_plan
from rl_llm.launch.record import prepare_base
from rl_llm.launch.training import run_training
from rl_llm.runs.writer import RunWriter
from rl_llm.search.config import build_search
from rl_llm.search.launching import run_search
from rl_llm.trainer.trainer import Trainer

SETTINGS = ("evaluation.controls=[]", "evaluation.every=6", "checkpoint.every=6", "logging.tensorboard=false")
FEW, MANY = 1, 5
REPEATS = 20


def seconds_of(do: Callable[[], Any]) -> float:
    start = time.perf_counter()
    do()
    return time.perf_counter() - start


def search_seconds(config: RunConfig, trials: int, path: Path) -> float:
    """Of a search that trains the same point `trials` times, one after the other."""
    settings = {
        "run": config.to_dict(),
        # The same in all but a digit that changes nothing.
        "space": {"learner.lr": {"grid": [config.learner.lr * (1 + 1e-9 * i) for i in range(trials)]}},
        "searcher": "grid",
        "scheduler": "none",
        "finalists": 0,
        "controls": False,
        "overoptimized": 0,
        "concurrent": 1,
    }
    return seconds_of(lambda: run_search(build_search(settings), path))


def live_seconds(config: RunConfig, folder: Path) -> tuple[list[float], list[float], list[float]]:
    """Seconds of steps, of setting weights and learning rate between two, and of an exploit."""
    plan = make_plan(config, {})
    base = prepare_base(plan, folder, None, print)
    steps, settings, exploits = [], [], []
    opened = Trainer.open(config, folder / "a", plan.task, base, callbacks=[RunWriter()], origin=plan.origin)
    with opened as trainer:
        trainer.begin()
        for i in range(REPEATS):
            steps.append(seconds_of(trainer.step))

            def set_live(i: int = i) -> None:
                for name in config.rewards.components:
                    trainer.mixture.set_weight(name, 1.0 + 0.01 * i)
                trainer.learning_rate.peak = config.learner.lr * (1 + 0.01 * i)

            settings.append(seconds_of(set_live))
        donor = trainer.save()
        for i in range(REPEATS):
            other = config.model_copy(deep=True)
            other.rewards.weights = dict.fromkeys(config.rewards.components, 1.0 + 0.1 * i)

            def exploit(path: Path = folder / f"b{i}", other: RunConfig = other) -> None:
                path.mkdir()
                trainer.reset(other, path, plan.task, base, origin=plan.origin)
                trainer.restore(donor)
                trainer.save()

            exploits.append(seconds_of(exploit))
    return steps, settings, exploits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    config = load_config("quickstart", [*SETTINGS, *given.overrides])
    trials, runs = [], []
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        run_training(config, folder / "first")
        for i in range(given.rounds):
            few, many = (search_seconds(config, n, folder / f"search-{i}-{n}") for n in (FEW, MANY))
            trials.append((many - few) / (MANY - FEW))
            runs.append(seconds_of(lambda i=i: run_training(config, folder / f"run-{i}")))  # type: ignore[misc]
        steps, settings, exploits = (statistics.median(found) for found in live_seconds(config, folder))
    ratio = statistics.median(trial / run for trial, run in zip(trials, runs, strict=True))
    print(f"a step: {steps:.3f} s; new weights and learning rate: {settings:.6f} s; an exploit: {exploits:.3f} s")
    print(f"a trial: {statistics.median(trials):.1f} s; the single run: {statistics.median(runs):.1f} s")
    print(f"a trial against the single run: {ratio:.2f}")


if __name__ == "__main__":
    main()
