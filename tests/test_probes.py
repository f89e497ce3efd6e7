"""Learning, on tasks with one optimum that is known. Every seed has to get near it, on every processor.

Most policies here are untrained: they say any of 300 tokens, and a reward that counts tokens of a certain kind tells
the samples of a group apart from the first step on, so nothing hangs on a lucky sample. Runs end soon after the optimum
is reached: later groups are almost all equal, and the few that are not would move the policy by chance.
"""

from pathlib import Path
from typing import Any

import pytest
import tiny
from conftest import Tiny

from rl_llm.algorithms import PRESETS
from rl_llm.algorithms.losses import LOSSES
from rl_llm.runs.run import Run

pytestmark = pytest.mark.learning

SEVERAL = {"lr": 1e-2, "epochs": 2, "minibatches": 2}  # updates a step: ratios leave 1, and clipping has a part
FADING = {**SEVERAL, "schedule": "linear"}  # for longer runs: no rate is left to lose in the end what was learned
# At a policy's rate values keep up with rates as high as these tests'.
OWN_VALUES = {"model": "own", "lr_factor": 1.0}
ALGORITHMS: dict[str, dict[str, Any]] = {
    **{name: {"name": name} for name in PRESETS},
    "ppo": {"name": "ppo", "value": {"lr_factor": 1.0}},
    "ppo_own": {"name": "ppo", "value": OWN_VALUES},
}


def solve(
    tiny_run: Tiny,
    path: Path,
    seed: int,
    functions: dict[str, Any],
    steps: int,
    *,
    untrained: bool = True,
    **sections: Any,
) -> Run:
    """A run of an update a step; the keys in `sections` go over its settings."""
    random = {"model": str(tiny_run.policy.parent / "random")} if untrained else {}
    base: dict[str, dict[str, Any]] = {
        "policy": random,
        "rollout": {"prompts_per_step": 8, "samples_per_prompt": 16, "rows_per_request": 256, "max_new_tokens": 4},
        "rewards": {"components": {name: {"use": f"function:{name}"} for name in functions}},
        "learner": {"lr": 1e-2},
        "evaluation": {"every": 1000, "prompts": 6, "test_prompts": 8},
        "checkpoint": {"every": 1000},
        "logging": {"rollouts": 0, "tensorboard": False},
        "trainer": {"steps": steps, "seed": seed},
    }
    merged = {name: {**base.get(name, {}), **sections.get(name, {})} for name in {**base, **sections}}
    return tiny.train(tiny_run.config(**merged), path, functions=functions)


def sampled(run: Run, name: str) -> list[float]:
    """A component's mean over the samples of each step."""
    return run.metrics[f"reward/{name}/mean"].tolist()


def greedy(run: Run, when: str, name: str) -> float:
    """A component's mean over the greedy answers to test prompts, "before" or "after"."""
    return run.summary[when][name]["mean"]


def one_of(count: int, completion_ids: list[list[int]]) -> list[float]:
    """The share of tokens of a kind that one of `count` is; the token that ends a completion, 0, is of none."""
    return [sum(token % count == 1 for token in ids) / len(ids) for ids in completion_ids]


def eighths(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    return one_of(8, completion_ids)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_constant_target_is_found_by_an_untrained_policy(
    tiny_run: Tiny, tmp_path: Path, algorithm: str, seed: int
) -> None:
    settings = ALGORITHMS[algorithm]
    run = solve(tiny_run, tmp_path / "run", seed, {"eighths": eighths}, steps=15, algorithm=settings, learner=SEVERAL)
    assert max(greedy(run, "before", "eighths"), sampled(run, "eighths")[0]) < 0.25
    assert min(greedy(run, "after", "eighths"), sampled(run, "eighths")[-1]) > 0.9
    if PRESETS[settings["name"]].policy_loss is LOSSES["clipped"]:  # the bounds of cispo are too far out to be met
        assert run.metrics["clip_fraction"].max() > 0


def test_credit_comes_back_through_the_values(tiny_run: Tiny, tmp_path: Path, seed: int) -> None:
    """With lambda 0 a token hears of the outcome at the end only from the value of what comes after it."""

    def first(completion_ids: list[list[int]], **columns: Any) -> list[float]:
        return [float(ids[0] % 8 == 1) for ids in completion_ids]

    td = {"name": "reinforce", "advantage": "gae", "lam": 0.0, "gamma": 0.9, "value": OWN_VALUES}
    rollout = {"prompts_per_step": 24, "samples_per_prompt": 8, "max_new_tokens": 2, "min_new_tokens": 2}
    sections = {"algorithm": td, "rollout": rollout, "learner": FADING}
    run = solve(tiny_run, tmp_path / "run", seed, {"first": first}, steps=30, **sections)
    assert max(greedy(run, "before", "first"), sampled(run, "first")[0]) < 0.25
    assert min(greedy(run, "after", "first"), sampled(run, "first")[-1]) > 0.9


def test_prompt_dependent_target_is_learned_and_holds_for_unseen_prompts(
    tiny_run: Tiny, tmp_path: Path, seed: int
) -> None:
    """The colour at the end of the prompt says which quarter of the tokens is wanted."""

    def asked(completion_ids: list[list[int]], colour: list[str], **columns: Any) -> list[float]:
        wanted = map(tiny.COLOURS.index, colour)
        return [float(ids[0] % 4 == quarter) for ids, quarter in zip(completion_ids, wanted, strict=True)]

    run = solve(
        tiny_run,
        tmp_path / "run",
        seed,
        {"asked": asked},
        steps=30,
        task={"data": str(tiny.write_task(tmp_path / "task.jsonl", count=96))},
        rollout={"prompts_per_step": 16, "max_new_tokens": 1},
        learner=FADING,
        evaluation={"test_prompts": 16},
    )
    assert max(greedy(run, "before", "asked"), sampled(run, "asked")[0]) < 0.5
    assert min(greedy(run, "after", "asked"), sampled(run, "asked")[-1]) > 0.9


@pytest.mark.parametrize("combine", ["sum_then_normalize", "normalize_then_sum"])
def test_both_ways_of_combining_learn(tiny_run: Tiny, tmp_path: Path, combine: str, seed: int) -> None:
    """Two components that are both at their best with one token of six."""

    def halves(completion_ids: list[list[int]], **columns: Any) -> list[float]:
        return one_of(2, completion_ids)

    def thirds(completion_ids: list[list[int]], **columns: Any) -> list[float]:
        return one_of(3, completion_ids)

    functions = {"halves": halves, "thirds": thirds}
    run = solve(tiny_run, tmp_path / "run", seed, functions, steps=20, learner=SEVERAL, rewards={"combine": combine})
    assert sampled(run, "halves")[0] < 0.6
    assert sampled(run, "thirds")[0] < 0.45
    for name in functions:
        assert min(greedy(run, "after", name), sampled(run, name)[-1]) > 0.9


def brief(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    return [-float(len(ids)) for ids in completion_ids]


def lengthy(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    return [float(len(ids)) for ids in completion_ids]


@pytest.mark.parametrize(("weights", "tokens"), [((1.0, 0.2), 1), ((0.2, 1.0), 5)])
def test_weights_decide_between_rewards_with_opposite_wishes(
    tiny_run: Tiny, tmp_path: Path, weights: tuple[float, float], tokens: int, seed: int
) -> None:
    run = solve(
        tiny_run,
        tmp_path / "run",
        seed,
        {"brief": brief, "lengthy": lengthy},
        steps=15,
        untrained=False,
        rollout={"max_new_tokens": 5},
        rewards={"weights": dict(zip(("brief", "lengthy"), weights, strict=True))},
    )
    assert 2 < sampled(run, "lengthy")[0] < 4
    assert greedy(run, "after", "lengthy") == tokens
    assert sampled(run, "lengthy")[-1] == pytest.approx(tokens, abs=0.3)
    assert -greedy(run, "after", "brief") == tokens
    assert run.metrics["correlation/brief~lengthy"].iloc[0] == pytest.approx(-1)


@pytest.mark.parametrize("trainable", ["last_layers", "lora"])
def test_part_of_the_policy_is_enough_to_learn(tiny_run: Tiny, tmp_path: Path, trainable: str, seed: int) -> None:
    run = solve(
        tiny_run,
        tmp_path / "run",
        seed,
        {"lengthy": lengthy},
        steps=15,
        untrained=False,
        rollout={"max_new_tokens": 5},
        policy={"trainable": trainable, "last_layers": 1, "lora": {"r": 4, "alpha": 16}},
    )
    assert max(greedy(run, "before", "lengthy"), sampled(run, "lengthy")[0]) < 4
    assert greedy(run, "after", "lengthy") == 5
    assert sampled(run, "lengthy")[-1] > 4.7


def test_kl_holds_the_policy_nearer_to_where_it_began(tiny_run: Tiny, tmp_path: Path, seed: int) -> None:
    """From all tokens to one of eight a policy goes log(8) = 2.1 far a token."""

    def drift(coef: float) -> list[float]:
        path = tmp_path / str(coef)
        algorithm = {"kl": {"coef": coef}}
        run = solve(tiny_run, path, seed, {"eighths": eighths}, steps=15, algorithm=algorithm, learner=SEVERAL)
        return run.metrics["kl"].tolist()

    loose, tight = drift(1e-6), drift(1.0)
    assert max(loose[0], tight[0]) < 0.1
    assert sum(loose[-5:]) / 5 > 1.5
    assert sum(tight[-5:]) < 0.3 * sum(loose[-5:])
