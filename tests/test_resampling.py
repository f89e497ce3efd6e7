"""Dynamic sampling: groups without signal are made up for by further prompts, and no prompt is lost or drawn twice."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from conftest import Tiny

from rl_llm.rewards import RewardFailed
from rl_llm.runs.run import Run

PROMPTS, SAMPLES = 6, 4


def seldom(completion_ids: list[list[int]], colour: list[str], **columns: Any) -> list[float]:
    """Tells the samples of some prompts apart; for the others all are equally good."""
    pairs = zip(completion_ids, colour, strict=True)
    return [float(sum(ids) % 7) if wanted in ("red", "gold") else 0.5 for ids, wanted in pairs]


def sections(resample: int, **more: Any) -> dict[str, Any]:
    return {
        "algorithm": {"name": "dapo", "resample": resample},
        "rollout": {"prompts_per_step": PROMPTS, "samples_per_prompt": SAMPLES, "rows_per_request": 8},
        "rewards": {"components": {"seldom": {"use": "function:seldom"}}},
        **more,
    }


def spread(run: Run, step: int) -> dict[int, bool]:
    """Whether the rewards of each group of a step differ, in the order of the groups."""
    table = run.rollouts(step)
    groups, rewards = table["group"].to_numpy(), table["reward/seldom"].to_numpy()
    return {int(group): bool(np.ptp(rewards[groups == group]) > 0) for group in np.unique(groups)}


def expected_draws(signal: list[bool], rounds: int) -> int:
    """How many of these groups a step draws: as many in each round as still lack signal."""
    drawn = PROMPTS
    for _ in range(rounds):
        drawn += PROMPTS - sum(signal[:drawn])
    return drawn


@pytest.mark.parametrize("resample", [1, 3])
def test_groups_without_signal_are_made_up_for_and_left_out(tiny_run: Tiny, tmp_path: Path, resample: int) -> None:
    run = tiny.train(tiny_run.config(**sections(resample)), tmp_path / "run", functions={"seldom": seldom})
    following = 0
    for step in run.rollout_steps:
        signal, table = spread(run, step), run.rollouts(step)
        # One group after the other over the whole run: none is left out, none is drawn twice.
        assert list(signal) == list(range(following, following + len(signal)))
        following += len(signal)
        assert len(signal) == expected_draws(list(signal.values()), resample)
        assert run.metrics["groups/drawn"].iloc[step - 1] == len(signal)
        trained = [signal[group] for group in table["group"].to_pylist()]
        assert table["trained"].to_pylist() == trained
        lengths = np.array([len(ids) for ids in table["completion_ids"].to_pylist()])
        assert run.metrics["tokens/trained"].iloc[step - 1] == lengths[trained].sum()
    assert run.metrics["groups/drawn"].max() > PROMPTS


def test_where_no_group_has_signal_all_rows_are_kept_and_nothing_is_learned(tiny_run: Tiny, tmp_path: Path) -> None:
    given = sections(2, trainer={"steps": 1}, rewards={"components": ["constant"]})
    run = tiny.train(tiny_run.config(**given), tmp_path / "run")
    assert run.metrics["groups/drawn"].tolist() == [3 * PROMPTS]
    assert run.rollouts(1)["trained"].to_pylist() == [True] * (3 * PROMPTS * SAMPLES)
    assert run.metrics["grad_norm"].tolist() == [0.0]


def test_control_with_a_constant_reward_does_not_look_for_signal(tiny_run: Tiny, tmp_path: Path) -> None:
    given = sections(2, trainer={"steps": 1}, evaluation={"controls": ["constant_reward"]})
    run = tiny.train(tiny_run.config(**given), tmp_path / "run", functions={"seldom": seldom})
    assert Run(run.path / "controls" / "constant_reward").metrics["groups/drawn"].tolist() == [PROMPTS]


def test_resumed_run_goes_on_with_the_prompts_that_would_have_followed(tiny_run: Tiny, tmp_path: Path) -> None:
    functions = {"seldom": seldom}
    whole = tiny.train(tiny_run.config(**sections(2)), tmp_path / "whole", functions=functions)
    tiny.train(tiny_run.config(**sections(2, trainer={"steps": 4})), tmp_path / "parts", functions=functions)
    parts = tiny.train(tiny_run.config(**sections(2)), tmp_path / "parts", functions=functions, resume=True)
    assert tiny.metrics(parts.path) == tiny.metrics(whole.path)


@pytest.mark.parametrize(("allowed", "ends"), [(0.2, False), (0.1, True)])
def test_share_of_failures_is_that_of_the_whole_step(
    tiny_run: Tiny, tmp_path: Path, allowed: float, ends: bool
) -> None:
    """The first prompt gives no signal, and the one that is drawn for it fails: 4 rows of 32, all of their round."""
    seen: list[str] = []

    def brittle(prompts: list[str], completion_ids: list[list[int]], **columns: Any) -> list[float]:
        if len(set(prompts)) < len(prompts):  # evaluations have a sample a prompt
            seen.extend(prompt for prompt in dict.fromkeys(prompts) if prompt not in seen)
        places = [seen.index(prompt) if prompt in seen else None for prompt in prompts]
        return [{0: 0.0, PROMPTS: float("nan")}.get(place, float(i)) for i, place in enumerate(places)]

    component = {"use": "function:brittle", "max_failure_rate": allowed}
    given = sections(3, trainer={"steps": 1}, rewards={"components": {"brittle": component}})
    config = tiny_run.config(**given)
    if ends:
        with pytest.raises(RewardFailed, match="failed on 4 of 32 rows"):
            tiny.train(config, tmp_path / "run", functions={"brittle": brittle})
    else:
        run = tiny.train(config, tmp_path / "run", functions={"brittle": brittle})
        assert run.metrics["groups/drawn"].tolist() == [PROMPTS + 2]
        assert run.metrics["failures/brittle"].tolist() == [SAMPLES]
