"""Reinforcement learning of language models with mixtures of rewards.

import rl_llm

run = rl_llm.train("path/to/model", "data.jsonl", rewards=["chrf", my_reward], weights={"chrf": 1.0}, steps=50)
run.table()
"""

from types import ModuleType
from typing import TYPE_CHECKING, Any

import rl_llm.search as _room
from rl_llm.errors import RunFailed, UserError
from rl_llm.rewards.registry import Takes, reward
from rl_llm.runs.callbacks import Callback
from rl_llm.runs.run import Run, load_run

if TYPE_CHECKING:
    from rl_llm.api import forecast, search, train
    from rl_llm.search.search import Search, load_search

__all__ = [
    "Callback", "Run", "RunFailed", "Search", "Takes", "UserError", "forecast", "load_run", "load_search", "reward",
    "search", "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    # Training brings in torch and transformers; reading a run or a search, or writing a reward, needs neither.
    if name in ("forecast", "train"):
        from rl_llm import api

        return getattr(api, name)
    if name in ("Search", "load_search"):
        from rl_llm.search import search

        return getattr(search, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _Room(ModuleType):
    """The package of searches, which is also the call that searches: `rl_llm.search(...)`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from rl_llm import api

        return api.search(*args, **kwargs)


_room.__class__ = _Room
