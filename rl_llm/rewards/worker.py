"""The reward worker: holds a run's components and scores shards with them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from rl_llm.config import ComponentConfig
from rl_llm.rewards.component import Component, Scores


class RewardWorker:
    """Builds and sets up every component in its own process, before any request and its deadline.

    Args:
        functions: components given as they are, by name.
        max_steps: of the run; components are told.

    Raises:
        RunFailed: a component's setup() failed.
    """

    def __init__(
        self, configs: Mapping[str, ComponentConfig], functions: Mapping[str, Callable[..., Any]], max_steps: int = 0
    ) -> None:
        self._max_steps = max_steps
        self._components = {name: Component(name, config, functions.get(name)) for name, config in configs.items()}
        for component in self._components.values():
            component.setup()

    def score(self, name: str, shard: pa.Table, row: int | None = None) -> Scores:
        """Scores of a shard, or of one row of it."""
        return self._components[name].score(shard if row is None else shard.slice(row, 1), self._max_steps)

    def score_all(self, names: Sequence[str], shard: pa.Table) -> dict[str, Scores]:
        """Scores of a shard by several components, one after the other."""
        return {name: self.score(name, shard) for name in names}
