"""The learners of a run as the driver sees them: one, or several that act as one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from rl_llm.config import RunConfig
from rl_llm.runtime.pool import Pool
from rl_llm.runtime.shared import marked
from rl_llm.runtime.weights import Manifest


class LearnerGroup:
    """Every call goes to every learner; who writes a file is their own affair. Waiting, all other pools are served."""

    def __init__(self, pool: Pool, config: RunConfig) -> None:
        """`pool` is of one replica, which has all learners in it."""
        self._pool, self._count = pool, config.resources.num_learners
        self.kind: Literal["full", "adapter"] = "adapter" if config.policy.trainable == "lora" else "full"

    def join(self) -> None:
        """Wait until several learners have found each other."""
        if self._count > 1:
            self._pool.call("join", *self._pool.call("open"))

    def see(self, folder: Path) -> None:
        """Raise `UserError` where a learner, on another node perhaps, does not see a folder of this process's."""
        with marked(folder) as mark:
            self._pool.call("see", mark)

    def update(
        self, shards: Sequence[Any], columns: pa.Table, step: int, lr: float, path: Path | None
    ) -> dict[str, float]:
        """The updates of a step; returns its metrics. See `Learner.update`."""
        return self._pool.call("update", columns, step, lr, path and str(path), *shards)

    def weights(self) -> tuple[Manifest, Any]:
        """The trainable weights: their manifest, and the flat array or a reference to it."""
        return self._pool.call("weights", returns=2)

    def save(self, folder: Path) -> None:
        """Everything an exact resume needs of the learners."""
        self._pool.call("save", folder)

    def load(self, folder: Path) -> None:
        self._pool.call("load", folder)

    def save_weights(self, file: Path) -> None:
        self._pool.call("save_weights", file)

    def load_weights(self, file: Path) -> None:
        """Put saved weights in place; the optimiser is left as it is."""
        self._pool.call("load_weights", file)

    def export(self, folder: Path) -> None:
        """Leave a folder that `transformers` loads."""
        self._pool.call("export", folder)

    def kill(self, rank: int) -> None:
        """End one's process, to see what becomes of the run."""
        self._pool.kill(0, rank)

    def supervise(self, prompts: Sequence[np.ndarray], targets: Sequence[list[str]], tokens: int) -> int:
        """Supervised training on about `tokens` target tokens; returns how many."""
        trained = self._pool.call("supervise", prompts, targets, tokens)
        self._pool.call("follow")
        return int(trained)
