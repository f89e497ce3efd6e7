"""Learning, on tasks with a known answer: they must be solved."""

from pathlib import Path
from typing import Any

import pytest
import tiny
from conftest import Tiny

from rl_llm.runs.run import Run

# At a policy's rate values keep up with rates as high as these tests'.
VALUE = {"lr_factor": 1.0}
ALGORITHMS: dict[str, dict[str, Any]] = {
    **{name: {"name": name} for name in ("grpo", "dr_grpo", "rloo", "dapo", "gspo", "cispo")},
    **{name: {"name": name, "value": VALUE} for name in ("reinforce", "reinforce_pp", "ppo")},
    "ppo_own": {"name": "ppo", "value": {**VALUE, "model": "own"}},
    "td": {"name": "reinforce", "advantage": "gae", "lam": 0.0, "gamma": 0.9, "value": {**VALUE, "model": "own"}},
}
TOKEN = 150


def solve(tiny_run: Tiny, path: Path, functions: dict[str, Any], steps: int, **sections: Any) -> Run:
    components = {name: {"use": f"function:{name}"} for name in functions}
    sections = {"rewards": {}, "evaluation": {}, **sections}
    sections["rewards"] = {"components": components, **sections["rewards"]}
    sections["evaluation"] = {"every": 20, "prompts": 6, "test_prompts": 8, **sections["evaluation"]}
    config = tiny_run.config(
        **sections, trainer={"steps": steps}, checkpoint={"every": 1000}, logging={"rollouts": 0, "tensorboard": False}
    )
    return tiny.train(config, path, functions=functions)


def after(run: Run, metric: str) -> float:
    return run.summary["after"][metric]["mean"]


def one_token(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """Constant target: the share of tokens that are a certain one."""
    return [ids.count(TOKEN) / len(ids) for ids in completion_ids]


def constant_target(tiny_run: Tiny, path: Path, algorithm: str, steps: int, **sections: Any) -> Run:
    """An untrained policy is to find one token of 300."""
    run = solve(
        tiny_run,
        path,
        {"one_token": one_token},
        steps=steps,
        policy={"model": str(tiny_run.policy.parent / "random")},
        algorithm=ALGORITHMS[algorithm],
        rollout={"prompts_per_step": 8, "samples_per_prompt": 16, "rows_per_request": 64, "max_new_tokens": 8},
        **sections,
    )
    assert run.summary["before"]["one_token"]["mean"] < 0.1
    return run


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_constant_target_is_found_by_an_untrained_policy(tiny_run: Tiny, tmp_path: Path, algorithm: str) -> None:
    # Without returns, credit has to come back through the values, token by token.
    run = constant_target(tiny_run, tmp_path / "run", algorithm, steps=60 if algorithm == "td" else 40)
    assert after(run, "one_token") > 0.9
    assert run.metrics["reward/one_token/mean"].iloc[-1] > 0.9  # sampled, not only greedy


@pytest.mark.parametrize("algorithm", ["grpo", "dapo", "gspo", "cispo", "reinforce_pp", "ppo"])
def test_several_updates_a_step_find_it_in_fewer_steps(tiny_run: Tiny, tmp_path: Path, algorithm: str) -> None:
    learner = {"lr": 1e-2, "epochs": 2, "minibatches": 2}
    run = constant_target(tiny_run, tmp_path / "run", algorithm, steps=20, learner=learner)
    assert after(run, "one_token") > 0.9
    assert run.metrics["reward/one_token/mean"].iloc[-1] > 0.9
    assert run.metrics["clip_fraction"].max() > 0


def echo(completions: list[str], colour: list[str], **columns: Any) -> list[float]:
    """Prompt-dependent target: the word the prompt ends with."""
    return [float(text.split() == [wanted]) for text, wanted in zip(completions, colour, strict=True)]


def prompt_dependent_target(tiny_run: Tiny, path: Path, algorithm: str, steps: int, lr: float) -> Run:
    return solve(
        tiny_run,
        path / "run",
        {"echo": echo},
        steps=steps,
        task={"data": str(tiny.write_task(path / "task.jsonl", count=96))},
        algorithm=ALGORITHMS[algorithm],
        learner={"lr": lr},
        # Warmer than 1, or some colours are given up before they were tried where they belong.
        rollout={
            "prompts_per_step": 16, "samples_per_prompt": 16, "rows_per_request": 256, "max_new_tokens": 1,
            "temperature": 1.5,
        },
    )  # fmt: skip


@pytest.mark.parametrize("algorithm", ["grpo", "dr_grpo", "rloo"])
def test_prompt_dependent_target_is_learned_and_holds_for_unseen_prompts(
    tiny_run: Tiny, tmp_path: Path, algorithm: str
) -> None:
    run = prompt_dependent_target(tiny_run, tmp_path, algorithm, steps=250, lr=1e-3)
    assert run.summary["before"]["echo"]["mean"] < 0.5
    assert after(run, "echo") >= 0.95


@pytest.mark.parametrize("algorithm", ["reinforce_pp", "ppo"])
def test_without_groups_a_prompt_dependent_target_is_learned_in_part(
    tiny_run: Tiny, tmp_path: Path, algorithm: str
) -> None:
    run = prompt_dependent_target(tiny_run, tmp_path, algorithm, steps=150, lr=2e-3)
    assert after(run, "echo") >= 2 * run.summary["before"]["echo"]["mean"]
    reward = run.metrics["reward/echo/mean"]
    assert reward.iloc[-10:].mean() > 2 * reward.iloc[:10].mean()


def brief(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    return [-float(len(ids)) for ids in completion_ids]


def lengthy(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    return [float(len(ids)) for ids in completion_ids]


@pytest.mark.parametrize(("weights", "tokens"), [((1.0, 0.2), 1), ((0.2, 1.0), 5)])
def test_weights_decide_between_rewards_with_opposite_wishes(
    tiny_run: Tiny, tmp_path: Path, weights: tuple[float, float], tokens: int
) -> None:
    run = solve(
        tiny_run,
        tmp_path / "run",
        {"brief": brief, "lengthy": lengthy},
        steps=20,
        rewards={"weights": dict(zip(("brief", "lengthy"), weights, strict=True))},
    )
    assert after(run, "lengthy") == tokens
    assert -after(run, "brief") == tokens
    assert run.metrics["correlation/brief~lengthy"].iloc[0] == pytest.approx(-1)


@pytest.mark.parametrize("combine", ["sum_then_normalize", "normalize_then_sum"])
def test_both_ways_of_combining_learn(tiny_run: Tiny, tmp_path: Path, combine: str) -> None:
    def gold(completions: list[str], **columns: Any) -> list[float]:
        return [text.split().count("gold") / max(len(text.split()), 1) for text in completions]

    run = solve(tiny_run, tmp_path / "run", {"gold": gold, "lengthy": lengthy}, steps=30, rewards={"combine": combine})
    assert after(run, "gold") > 0.9
    assert after(run, "lengthy") > 4.5


@pytest.mark.parametrize("trainable", ["last_layers", "lora"])
def test_part_of_the_policy_is_enough_to_learn(tiny_run: Tiny, tmp_path: Path, trainable: str) -> None:
    run = solve(
        tiny_run,
        tmp_path / "run",
        {"lengthy": lengthy},
        steps=20,
        policy={"trainable": trainable, "last_layers": 1, "lora": {"r": 4, "alpha": 16}},
    )
    assert run.summary["before"]["lengthy"]["mean"] < 4
    assert after(run, "lengthy") == 5


def test_kl_holds_the_policy_nearer_to_where_it_began(tiny_run: Tiny, tmp_path: Path) -> None:
    def drift(coef: float) -> list[float]:
        algorithm = {"kl": {"coef": coef}}
        run = solve(tiny_run, tmp_path / str(coef), {"lengthy": lengthy}, steps=12, algorithm=algorithm)
        return run.metrics["kl"].tolist()

    loose, tight = drift(1e-6), drift(1.0)
    assert loose[0] == pytest.approx(0, abs=1e-6)
    assert min(loose[1:]) > 0
    assert sum(tight[-5:]) < 0.3 * sum(loose[-5:])
