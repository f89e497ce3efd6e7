"""What is made once for a search, in the room of a slot: the base policy's evaluation, and samples of it."""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

from rl_llm.config import ResourcesConfig
from rl_llm.launch.preflight import Plan, quiet_libraries
from rl_llm.launch.record import Note, begin_record
from rl_llm.rewards import SCORES
from rl_llm.runs import checkpoint
from rl_llm.runs.writer import RunWriter
from rl_llm.runtime.actor import Actor
from rl_llm.runtime.cluster import HEAD, Placement
from rl_llm.runtime.pool import Pool
from rl_llm.runtime.shared import marked, refuse_unshared
from rl_llm.search.forecasting import TABLE
from rl_llm.search.reader import BASE
from rl_llm.search.sampling import read_samples, sample_base, write_samples
from rl_llm.trainer.trainer import Trainer


class Preparation:
    """The worker that does it."""

    def __init__(self) -> None:
        quiet_libraries()

    def see(self, mark: Path) -> None:
        """Raise `UserError` where the search's directory, which has this file of the driver's, is not to be seen."""
        refuse_unshared(mark, "name an output")

    def measure(self, plan: Plan, base: str, path: Path, group: Any = None) -> None:
        """Begin a run of the base policy, and leave it there, in the search's directory; `group`: see `Placement`."""
        opened = Trainer.open(
            plan.config,
            path,
            plan.task,
            base,
            functions=plan.functions,
            callbacks=[RunWriter()],
            origin=plan.origin,
            scores=path.parent / SCORES,
            group=group,
        )
        with opened as trainer:
            begin_record(plan, path, print)
            trainer.begin()

    def sample(self, plan: Plan, base: str, count: int, path: Path) -> None:
        write_samples(sample_base(plan, base, count, print), path)


def refuse_no_room(resources: ResourcesConfig) -> None:
    """Raise `UserError` where there is no room for a trial within `resources.wait_s`; a cluster may grow meanwhile."""
    Placement(resources, slot=True).remove()


def prepare(plan: Plan, base: str, path: Path, samples: int, note: Note) -> None:
    """Measure the base policy and sample it where that has not been done.

    Args:
        path: of the search.
        samples: a prompt; 0 for none.

    Raises:
        UserError: there is no room for a trial, or its node does not see the search's directory.
    """
    resources = plan.config.resources
    measured = checkpoint.find(path / BASE / "checkpoints")[0] is not None
    sampled = samples == 0 or read_samples(path / TABLE, plan, samples) is not None
    # Workers of its own are placed by themselves; then nothing is in the way yet.
    if not sampled and resources.num_rollout_workers + resources.num_reward_workers:
        write_samples(sample_base(plan, base, samples, note), path / TABLE)
        sampled = True
    if measured and sampled:
        return
    room = Placement(resources, slot=True)
    try:
        place = partial(Actor, resources.threads, room.bundle(HEAD, 0))
        worker: Any = Pool("preparation", Preparation, lambda index: place(), 1, max_attempts=1)
        try:
            with marked(path) as mark:
                worker.call("see", mark)
            if not measured:
                note("base       its policy is measured, once for all trials")
                shutil.rmtree(path / BASE, ignore_errors=True)
                worker.call("measure", plan, base, path / BASE, room.group)
            if not sampled:
                note(f"forecast   from {samples} samples a prompt of the base policy")
                worker.call("sample", plan, base, samples, path / TABLE)
        finally:
            worker.close()
    finally:
        room.remove()
