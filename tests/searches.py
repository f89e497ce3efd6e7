"""Searches so small that one takes seconds."""

from pathlib import Path
from typing import Any

import tiny
from conftest import Tiny

from rl_llm.search.config import SearchConfig, build_search
from rl_llm.search.launching import plan_search
from rl_llm.search.preparing import Preparation
from rl_llm.search.slot import BASE, Shared

EQUAL = {"rewards.weights": {"match": 0.5, "length": 0.5}}


def search(tiny_run: Tiny, run: dict[str, Any] | None = None, **settings: Any) -> SearchConfig:
    """A search over two weights whose trials have 9 steps; `run` and `settings` go over it."""
    sections = {"trainer": {"steps": 9}, "evaluation": {"utility": {"match": 1, "length": 1}}, **(run or {})}
    whole = tiny.settings(tiny_run.policy, tiny_run.data, **sections)
    whole["evaluation"] |= {"prompts": 9, "test_prompts": 4, "samples": 0}
    raw: dict[str, Any] = {
        "run": whole, "space": {"rewards.weights": {"simplex": ["match", "length"]}}, "forecast": 0, "controls": False,
        "finalists": 1, "seeds": 1, "trials": 3,
    }  # fmt: skip
    return build_search({**raw, **settings})


def shared(config: SearchConfig, path: Path, silent_s: float = 600) -> Shared:
    """What a slot of the search is given; the base policy is measured in this process."""
    _, plan = plan_search(config, {})
    base = str(plan.config.policy.model)
    Preparation().measure(plan, base, path / BASE)
    return Shared(path, plan.config.to_dict(), plan, base, ranked=True, tokens=config.tokens, silent_s=silent_s)
