"""The reward worker: holds a run's components and scores shards with them."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from rl_llm.config import ComponentConfig
from rl_llm.rewards.cache import Cache
from rl_llm.rewards.component import Component, Scores


class RewardWorker:
    """Builds and sets up every component in its own process, before any request and its deadline.

    Args:
        functions: components given as they are, by name.
        max_steps: of the run; components are told.
        caches: folders of those that have one, see `cache_folders`.

    Raises:
        RunFailed: a component's setup() failed.
    """

    def __init__(
        self,
        configs: Mapping[str, ComponentConfig],
        functions: Mapping[str, Callable[..., Any]],
        max_steps: int = 0,
        caches: Mapping[str, Path] | None = None,
    ) -> None:
        self._max_steps = max_steps
        self._components = {name: Component(name, config, functions.get(name)) for name, config in configs.items()}
        for component in self._components.values():
            component.setup()
        self._caches = {name: Cache(folder) for name, folder in (caches or {}).items()}

    def score(self, name: str, shard: pa.Table, row: int | None = None) -> Scores:
        """Scores of a shard, or of one row of it."""
        component, rows = self._components[name], shard if row is None else shard.slice(row, 1)
        if name in self._caches:
            return self._caches[name].score(component, rows, self._max_steps)
        return component.score(rows, self._max_steps)

    def score_all(self, names: Sequence[str], shard: pa.Table) -> dict[str, Scores]:
        """Scores of a shard by several components, one after the other."""
        return {name: self.score(name, shard) for name in names}
