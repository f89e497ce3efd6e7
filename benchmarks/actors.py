"""A training step of the quickstart with three actors (rollout, reward, learner), against the step in one process.

    python benchmarks/actors.py

Both trainers are alive at once and take turns: step k of the one, then step k of the other, which does the same work on
the same tokens. A step is what `rl-llm train` repeats: sample, score, weigh, update, publish.
The last line is one ratio, median seconds of the pairs' steps with actors / in one process.
"""

import argparse
import os
import statistics
import tempfile
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

# As the commands do, and before torch is there: threads that wait spinning slow the processes beside them.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import ray

from rl_llm.config import RunConfig, load_config
from rl_llm.launch.preflight import load_tokenizer, make_plan
from rl_llm.launch.warm_start import ensure_base
from rl_llm.runtime import connected
from rl_llm.runtime.replica import fetch
from rl_llm.trainer.trainer import Trainer

ACTORS = [f"resources.num_{kind}=1" for kind in ("rollout_workers", "reward_workers", "learners")]
Timed = tuple[float, dict[str, Any]]
"""Seconds of a step, and its metrics."""


def open_trainer(config: RunConfig, folder: Path) -> AbstractContextManager[Trainer]:
    plan = make_plan(config, {}, None)
    base = ensure_base(config, plan.task, print)
    plan.task.tokenize(load_tokenizer(base))
    return Trainer.open(config, folder, plan.task, base)


def timed_step(trainer: Trainer) -> Timed:
    start = time.perf_counter()
    metrics = trainer.step()
    return time.perf_counter() - start, metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--warm-up", type=int, default=3, help="pairs of steps before the measured ones")
    args = parser.parse_args()
    steps = f"trainer.steps={args.pairs + args.warm_up}"
    here, actors = (load_config("quickstart", [steps, *extra]) for extra in ([], ACTORS))
    with (
        tempfile.TemporaryDirectory() as folder,
        connected(actors.resources),
        open_trainer(here, Path(folder) / "here") as one,
        open_trainer(actors, Path(folder) / "actors") as many,
    ):
        pairs = []
        for k in range(args.warm_up + args.pairs):
            done = {trainer: timed_step(trainer) for trainer in ((one, many) if k % 2 == 0 else (many, one))}
            pairs.append((done[one], done[many]))
        show_steps(pairs[args.warm_up :])
        show_weights(many)
    ratios = sorted(actors[0] / here[0] for here, actors in pairs[args.warm_up :])
    print(f"quartiles of the ratio: {ratios[len(ratios) // 4]:.3f} to {ratios[3 * len(ratios) // 4]:.3f}")
    print(f"{statistics.median(ratios):.3f}")


def show_steps(pairs: list[tuple[Timed, Timed]]) -> None:
    """Medians of both sides, part by part."""
    assert all(here[1][key] == actors[1][key] for here, actors in pairs for key in ("loss", "reward/mean"))
    print(f"| milliseconds, median of {len(pairs)} steps | one process | actors |\n|---|---:|---:|")
    for name in ("rollout", "mixture", "learn", "publish", "step"):
        here, actors = (statistics.median(1e3 * pair[side][1][f"time/{name}"] for pair in pairs) for side in (0, 1))
        print(f"| {name} | {here:.1f} | {actors:.1f} |")


def show_weights(trainer: Trainer) -> None:
    """What a publish puts into the object store, and that who reads it maps it: here, and in another process."""
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        weights = trainer.workers.channel.publish(trainer.learner, trainer.steps_done).data
        seconds.append(time.perf_counter() - start)
    readers = [
        where_it_lies(fetch([weights])[0]),
        ray.get(ray.remote(where_it_lies).options(num_cpus=0).remote(weights)),
    ]
    size = fetch([weights])[0].nbytes
    print(f"publish: {size} bytes in {1e3 * statistics.median(seconds):.1f} ms; its readers have them {readers}")


def where_it_lies(array: np.ndarray) -> str:
    """The mapped file that holds an array's memory (Linux), and whether it can be written to."""
    address = array.ctypes.data
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, file = line.split(maxsplit=5)
        low, high = (int(end, 16) for end in span.split("-"))
        if low <= address < high:
            return f"{'writable' if array.flags.writeable else 'read-only'} in {file}"
    raise LookupError("the address is in no mapping")


if __name__ == "__main__":
    main()
