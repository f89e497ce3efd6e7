"""Whole runs in one process: what they leave, what failing rewards do to them, and when they stop."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from conftest import Tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

import rl_llm
from rl_llm.config import PolicyConfig
from rl_llm.errors import RunFailed
from rl_llm.learner.learner import Learner
from rl_llm.policies import CausalLM
from rl_llm.runs.callbacks import Callback
from rl_llm.runs.jsonl import read_jsonl
from rl_llm.runs.run import Run
from rl_llm.tasks import load_task
from rl_llm.tasks.source import PromptSource

Reward = Callable[..., list[Any]]


def components(**specs: Any) -> dict[str, Any]:
    """Components beside `match`; a spec without `use` is of the function of that name."""
    return {
        "match": {"use": "tiny_rewards:match"},
        **{name: {"use": f"function:{name}", **spec} for name, spec in specs.items()},
    }


def learner_of(trainer: Any) -> Learner:
    """The learner of a run in this process."""
    return trainer.workers.here


# What a run leaves.


def test_run_directory_holds_what_the_run_did(tiny_run: Tiny) -> None:
    run = Run(tiny_run.undisturbed)
    assert run.metrics["step"].tolist() == [1, 2, 3, 4, 5, 6]
    lines = [(line["step"], line["split"], line["label"]) for line in run.evaluations]
    validations = [(step, "tune", "validation") for step in (2, 4, 6)]
    assert lines == [(0, "tune", "validation"), (0, "test", "before"), *validations, (6, "test", "after")]
    summary = json.loads((run.path / "summary.json").read_text())
    assert (summary["status"], summary["reason"], summary["steps"]) == ("finished", "", 6)
    assert summary["before"] == run.evaluations[1]["metrics"]
    assert summary["after"] == run.evaluations[-1]["metrics"]
    assert run.rollout_steps == [1, 2, 3, 4, 5, 6]
    assert sorted(folder.name for folder in (run.path / "checkpoints").glob("step-*")) == ["step-000004", "step-000006"]
    assert "match" in (run.path / "report.html").read_text()


def test_rollout_table_is_what_was_trained_on(tiny_run: Tiny) -> None:
    run = Run(tiny_run.undisturbed)
    tokenizer = AutoTokenizer.from_pretrained(tiny_run.policy)
    table = run.rollouts(3)
    assert table.num_rows == 24
    assert table["sample_id"].to_pylist() == list(range(48, 72))
    assert table["group"].to_pylist() == [12 + i // 4 for i in range(24)]
    assert set(table["policy_version"].to_pylist()) == {2}
    for row in table.to_pylist():
        assert row["completion"] == tokenizer.decode(row["completion_ids"], skip_special_tokens=True)
        assert len(row["logprobs"]) == len(row["completion_ids"]) == len(row["action_mask"])
        assert row["reward"] == pytest.approx(row["reward/match"] + 0.2 * row["reward/length"])
    advantages = table["advantage"].to_numpy().reshape(6, 4)
    np.testing.assert_allclose(advantages.sum(axis=1), 0, atol=1e-5)
    line = tiny.metrics(run.path)[2]
    assert line["reward/match/mean"] == pytest.approx(np.mean(table["reward/match"].to_numpy()))
    assert line["reward/match/extra/words"] == np.mean([len(text.split()) for text in table["completion"].to_pylist()])
    assert line["reward/match/extra/step"] == 2
    assert line["completion/length"] == np.mean([len(ids) for ids in table["completion_ids"].to_pylist()])
    stopped = np.mean([finish == "stop" for finish in table["finish"].to_pylist()])
    assert 0 < line["completion/stopped"] < 1
    assert line["completion/stopped"] == pytest.approx(stopped)


def test_every_step_measures_how_far_engine_and_trainer_are_apart(tiny_run: Tiny) -> None:
    for line in tiny.metrics(tiny_run.undisturbed):
        assert 0 < line["mismatch"] <= line["mismatch/max"] < 1e-4


def test_steps_walk_through_all_prompts_before_any_comes_again(tiny_run: Tiny) -> None:
    train = tiny.prompt_table(CausalLM(tiny_run.policy, PolicyConfig()), [str(i) for i in range(10)])
    source, other = PromptSource(train, seed=3), PromptSource(train, seed=4)
    seen = [i for _ in range(10) for i in source.take(4)["prompt_id"].to_pylist()]
    epochs = [seen[start : start + 10] for start in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    source.position = other.position = 28
    assert source.take(4)["prompt_id"].to_pylist() == seen[28:32]
    assert other.take(4)["prompt_id"].to_pylist() != seen[28:32]


def test_seed_decides_the_run(tiny_run: Tiny, tmp_path: Path) -> None:
    tiny.train(tiny_run.config(trainer={"seed": 1, "steps": 1}), tmp_path / "other")
    first, other = Run(tiny_run.undisturbed).rollouts(1), Run(tmp_path / "other").rollouts(1)
    assert first["completion"].to_pylist() != other["completion"].to_pylist()


@pytest.mark.parametrize("algorithm", ["grpo", "dapo", "ppo", "reinforce_pp"])
def test_constant_reward_changes_nothing(tiny_run: Tiny, tmp_path: Path, algorithm: str) -> None:
    config = tiny_run.config(rewards={"components": ["constant"]}, algorithm={"name": algorithm})
    run = tiny.train(config, tmp_path / "run")
    assert run.metrics["grad_norm"].tolist() == [0.0] * 6
    assert run.metrics["groups/without_signal"].tolist() == [1.0] * 6
    state = run.path / "checkpoints" / "step-000006" / "weights.safetensors"
    trained, base = tiny.load_file(state), dict(CausalLM(tiny_run.policy, PolicyConfig()).trainable)
    assert all(torch.equal(trained[name], base[name]) for name in base)
    tiny.assert_same_weights(run.model, tiny_run.policy)
    assert run.summary["after"] == run.summary["before"]


@pytest.mark.parametrize("trainable", ["all", "last_layers", "lora"])
def test_saved_model_is_the_policy_and_what_is_frozen_stays(tiny_run: Tiny, tmp_path: Path, trainable: str) -> None:
    functions, count = worsening(best=3)  # whatever the policy does, the third is the best
    config = tiny_run.config(
        policy={"trainable": trainable, "last_layers": 1, "lora": {"r": 4, "alpha": 16}},
        learner={"lr": 3e-2},
        evaluation={"metrics": {"quality": {"use": "function:quality"}}, "utility": {"quality": 1.0}, "every": 3},
        trainer={"steps": 3},
    )
    run = tiny.train(config, tmp_path / "run", count, functions=functions)
    assert run.summary["best_step"] == 3

    found, base = tiny.weights(run.model), tiny.weights(tiny_run.policy)
    changed = {name for name in base if not torch.equal(found[name], base[name])}
    if trainable == "all":
        assert changed == set(base)
    elif trainable == "last_layers":
        assert changed == {name for name in base if "layers.1." in name}
    else:  # an adapter is merged into the matrices it stands beside
        assert changed == {name for name in base if name.endswith("_proj.weight")}

    model = AutoModelForCausalLM.from_pretrained(run.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(run.model)
    last = [line for line in run.evaluations if line["label"] == "after"][-1]
    for shown in last["samples"]:
        ids = tokenizer(shown["prompt"], return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=5, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert tokenizer.decode(out, skip_special_tokens=True) == shown["completion"]


# Rewards that fail.


def shy(completions: list[str], colour: list[str], **columns: Any) -> list[float | None]:
    return [None if name == "red" else float(len(text)) for text, name in zip(completions, colour, strict=True)]


def undefined(completions: list[str], colour: list[str], **columns: Any) -> list[float]:
    return [math.nan if name == "blue" else 1.0 for name in colour]


def broken(completions: list[str], colour: list[str], **columns: Any) -> list[float]:
    if "green" in colour:
        raise KeyError("no <green> here")
    return [1.0] * len(completions)


def short(completions: list[str], colour: list[str], **columns: Any) -> list[float]:
    return [1.0 for name in colour if name != "gold"]


BAD = {"shy": shy, "undefined": undefined, "broken": broken, "short": short}


def test_each_kind_of_failure_has_its_own_outcome(tiny_run: Tiny, tmp_path: Path) -> None:
    config = tiny_run.config(
        rewards={
            "components": components(
                shy={},
                undefined={"max_failure_rate": 1},
                broken={"on_failure": "impute", "impute": -3.0, "max_failure_rate": 1},
                short={"max_failure_rate": 1},
            )
        },
        rollout={"prompts_per_step": 12},  # every colour comes up
        trainer={"steps": 2},
    )
    run = tiny.train(config, tmp_path / "run", functions=BAD)

    assert run.status == "finished"
    hit = {"shy": "red", "undefined": "blue", "broken": "green", "short": "gold"}
    kind = {"shy": "not_applicable", "undefined": "error", "broken": "error", "short": "error"}
    table = run.rollouts(1)
    rows = table.to_pylist()
    assert {row["field/colour"] for row in rows} == set(tiny.COLOURS)
    for row in rows:
        for name, colour in hit.items():
            there = row["field/colour"] != colour
            assert row[f"status/{name}"] == ("ok" if there else kind[name])
            value = row[f"reward/{name}"]
            assert (value is not None) if there else (value == (-3.0 if name == "broken" else None))
        present = [row[f"reward/{name}"] for name in ("match", *BAD) if row[f"reward/{name}"] is not None]
        assert row["reward"] == pytest.approx(sum(present))
    line = tiny.metrics(run.path)[0]
    for name, colour in hit.items():
        count = sum(row["field/colour"] == colour for row in rows)
        assert line[f"failures/{name}"] == (0 if name == "shy" else count)
        assert line[f"not_applicable/{name}"] == (count if name == "shy" else 0)

    noted = {(f["component"], f["status"], f["outcome"]) for f in run.failures}
    assert noted == {("undefined", "error", "mask"), ("broken", "error", "impute"), ("short", "error", "mask")}
    first = {f["component"]: f for f in run.failures if f["step"] == 1}
    prompts = {row["prompt_id"] for row in rows if row["field/colour"] == "green"}
    assert set(first["broken"]["prompt_ids"]) == prompts
    report = (run.path / "report.html").read_text()
    for message in (r"no &lt;green&gt; here", r"returned the value nan", r"returned \d values for \d completions"):
        assert re.search(message, report)


def test_call_that_was_mended_row_by_row_is_on_record(tiny_run: Tiny, tmp_path: Path) -> None:
    def first_only(completions: list[str], **columns: Any) -> list[float]:
        return [1.0]

    config = tiny_run.config(rewards={"components": components(first_only={})}, trainer={"steps": 1})
    run = tiny.train(config, tmp_path / "run", functions={"first_only": first_only})
    [failure] = [line for line in run.failures if line["step"] == 1 and "label" not in line]
    assert (failure["outcome"], failure["status"], failure["rows"]) == ("retried", "error", 24)
    assert run.metrics["failures/first_only"].tolist() == [0]
    assert "retried" in (run.path / "report.html").read_text()


def test_failures_do_not_touch_the_rows_that_are_well(tiny_run: Tiny, tmp_path: Path) -> None:
    """A component without a value for whole groups: the others' advantages are those of a run without it."""
    with_shy = tiny_run.config(rewards={"components": components(shy={}), "weights": {"shy": 0.0}})
    alone = tiny_run.config(rewards={"components": components()})
    tiny.train(with_shy, tmp_path / "shy", functions=BAD)
    tiny.train(alone, tmp_path / "alone")
    tiny.assert_same_weights(tmp_path / "shy" / "model", tmp_path / "alone" / "model")


def test_rows_without_any_value_have_no_reward_and_no_advantage(tiny_run: Tiny, tmp_path: Path) -> None:
    config = tiny_run.config(rewards={"components": {"shy": {"use": "function:shy"}}}, trainer={"steps": 1})
    run = tiny.train(config, tmp_path / "run", functions=BAD)
    rows = run.rollouts(1).to_pylist()
    for row in rows:
        assert (row["reward"] is None) == (row["field/colour"] == "red")
        if row["reward"] is None:
            assert row["advantage"] == 0
    trained = sum(len(row["completion_ids"]) for row in rows if row["reward"] is not None)
    assert run.metrics["tokens/trained"].tolist() == [trained]


def test_run_without_any_value_on_the_tune_split_keeps_the_first_policy(tiny_run: Tiny, tmp_path: Path) -> None:
    config = tiny_run.config(rewards={"components": {"elsewhere": {"use": "function:elsewhere"}}}, trainer={"steps": 2})
    tune = set(load_task(config.task, 0).splits["tune"]["prompt"].to_pylist())

    def elsewhere(completions: list[str], prompts: list[str], **columns: Any) -> list[float | None]:
        return [None if prompt in tune else len(text) for prompt, text in zip(prompts, completions, strict=True)]

    run = tiny.train(config, tmp_path / "run", functions={"elsewhere": elsewhere})
    assert run.evaluations[0]["metrics"]["utility"]["mean"] is None
    assert (run.status, run.summary["best_step"]) == ("finished", 0)
    tiny.assert_same_weights(run.model, tiny_run.policy)


class After(Callback):
    """Makes the component fail in training only, and keeps what happened at the end."""

    def __init__(self) -> None:
        self.training = False

    def on_checkpoint(self, trainer: Any, path: Path) -> None:
        self.training = True


@pytest.mark.parametrize(
    ("spec", "limit"),
    [
        ({}, "more than max_failure_rate 0.5 allows"),
        ({"on_failure": "impute", "impute": 0.0}, "more than max_failure_rate 0.5 allows"),
        ({"on_failure": "raise", "max_failure_rate": 1}, "on_failure is raise"),
    ],
    ids=["mask", "impute", "raise"],
)
def test_component_that_always_fails_ends_the_run_with_its_name(
    tiny_run: Tiny, tmp_path: Path, spec: dict[str, Any], limit: str
) -> None:
    after = After()

    def bomb(completions: list[str], **columns: Any) -> list[float]:
        if after.training:
            raise RuntimeError("out of order")
        return [1.0] * len(completions)

    path = tmp_path / "run"
    with pytest.raises(RunFailed, match="component 'bomb' failed on 24 of 24 rows"):
        tiny.train(
            tiny_run.config(rewards={"components": components(bomb=spec)}), path, after, functions={"bomb": bomb}
        )
    run = Run(path)
    assert run.status == "failed"
    assert "'bomb'" in run.summary["reason"]
    assert limit in run.summary["reason"]
    assert "RuntimeError: out of order" in run.summary["reason"]
    [failure] = run.failures
    assert (failure["step"], failure["outcome"], failure["rows"]) == (1, "raise", 24)
    report = (path / "report.html").read_text()
    assert "bomb" in report
    assert "out of order" in report


def test_component_that_fails_in_the_first_evaluation_is_noted_too(tiny_run: Tiny, tmp_path: Path) -> None:
    def bomb(completions: list[str], **columns: Any) -> list[float]:
        raise RuntimeError("out of order")

    path = tmp_path / "run"
    with pytest.raises(RunFailed, match="'bomb'"):
        tiny.train(tiny_run.config(rewards={"components": components(bomb={})}), path, functions={"bomb": bomb})
    [failure] = Run(path).failures
    assert (failure["step"], failure["component"], failure["outcome"]) == (0, "bomb", "raise")


def test_exception_of_a_callback_ends_the_run_as_failed(tiny_run: Tiny, tmp_path: Path) -> None:
    class Mistaken(Callback):
        def on_step(self, trainer: Any, metrics: dict[str, Any]) -> None:
            raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError):
        tiny.train(tiny_run.config(), tmp_path / "run", Mistaken())
    summary = Run(tmp_path / "run").summary
    assert (summary["status"], summary["reason"], summary["steps"]) == ("failed", "ZeroDivisionError: mine", 1)


# When a run stops, and which policy it keeps.


def test_policy_that_gives_no_finite_loss_ends_the_run(tiny_run: Tiny, tmp_path: Path) -> None:
    class Ruin(Callback):
        def on_step(self, trainer: Any, metrics: dict[str, Any]) -> None:
            if metrics["step"] == 2:
                learner = learner_of(trainer)
                loss = learner.objective.loss
                learner.objective.loss = lambda *args: loss(*args) * math.nan
                self.policy, self.before = learner.policy, tiny.flat(learner.policy)

    ruin = Ruin()
    config = tiny_run.config(learner={"max_bad_steps": 3}, evaluation={"every": 10})
    with pytest.raises(RunFailed, match="step 5: loss nan"):
        tiny.train(config, tmp_path / "run", ruin)
    run = Run(tmp_path / "run")
    assert run.metrics["bad_steps"].tolist() == [0, 0, 1, 2]
    assert "not finite for 3 updates in a row" in run.summary["reason"]
    assert "not finite for 3 updates in a row" in (run.path / "report.html").read_text()
    assert torch.equal(tiny.flat(ruin.policy), ruin.before)


def worsening(best: int) -> tuple[dict[str, Reward], Callback]:
    """A metric that rises up to the validation after step `best` and then falls, whatever the policy does."""

    class Count(Callback):
        step = 0

        def on_step(self, trainer: Any, metrics: dict[str, Any]) -> None:
            self.step = metrics["step"]

    count = Count()

    def quality(completions: list[str], **columns: Any) -> list[float]:
        return [-abs(count.step - best) + 10.0 * (i % 2) for i in range(len(completions))]

    return {"quality": quality}, count


def watched(tiny_run: Tiny, **evaluation: Any) -> Any:
    quality = {"quality": {"use": "function:quality"}}
    utility = {"metrics": quality, "utility": {"quality": 1.0}, "every": 2, "prompts": 6, "test_prompts": 4}
    return tiny_run.config(evaluation={**utility, **evaluation}, trainer={"steps": 12})


def test_run_without_progress_stops_and_keeps_the_best_policy(tiny_run: Tiny, tmp_path: Path) -> None:
    functions, count = worsening(best=4)
    saved: dict[int, torch.Tensor] = {}

    class Keep(Callback):
        def on_step(self, trainer: Any, metrics: dict[str, Any]) -> None:
            saved[metrics["step"]] = tiny.flat(learner_of(trainer).policy)

    run = tiny.train(watched(tiny_run, patience=2), tmp_path / "run", count, Keep(), functions=functions)

    assert run.status == "stopped_early"
    assert run.summary["reason"] == "no better utility in 2 validations"
    assert (run.summary["best_step"], len(run.metrics)) == (4, 8)
    assert torch.equal(tiny.flat(CausalLM(run.model, PolicyConfig())), saved[4])
    assert not torch.equal(saved[4], saved[8])
    greedy = tiny.generate(
        CausalLM(run.model, PolicyConfig(precision="fp32")),
        tiny.prompt_table(CausalLM(run.model, PolicyConfig()), [s["prompt"] for s in run.evaluations[-1]["samples"]]),
        np.arange(2), np.arange(2), tiny.greedy(5),
    )  # fmt: skip
    assert greedy["completion"].to_pylist() == [s["completion"] for s in run.evaluations[-1]["samples"]]


def test_run_stopped_early_is_complete_and_patience_survives_a_resumption(tiny_run: Tiny, tmp_path: Path) -> None:
    functions, count = worsening(best=4)
    config = watched(tiny_run, patience=2)
    whole = tiny.train(config, tmp_path / "whole", count, functions=functions)

    class PullPlug(Callback):
        def on_step(self, trainer: Any, metrics: dict[str, Any]) -> None:
            if metrics["step"] == 7:
                raise KeyboardInterrupt

    functions, count = worsening(best=4)
    with pytest.raises(KeyboardInterrupt):
        tiny.train(config, tmp_path / "run", count, PullPlug(), functions=functions)
    count.step = 6  # type: ignore[attr-defined]
    run = tiny.train(config, tmp_path / "run", count, functions=functions, resume=True)
    assert (run.status, run.summary["best_step"], len(run.metrics)) == ("stopped_early", 4, 8)
    tiny.assert_same_weights(run.model, whole.model)

    again = tiny.train(config, tmp_path / "run", count, functions=functions, resume=True)
    assert (again.status, len(again.metrics)) == ("stopped_early", 8)


# The Python face.


def test_train_takes_rows_functions_and_short_settings(tiny_run: Tiny, tmp_path: Path) -> None:
    seen: list[str] = []

    def shout(completions: list[str], prompts: list[str], **columns: Any) -> list[float]:
        seen.extend(prompts)
        return [float(text.isupper()) for text in completions]

    run = rl_llm.train(
        tiny_run.policy,
        tiny.rows(),
        rewards=[shout, "length"],
        weights={"length": 0.3},
        output=tmp_path / "run",
        steps=2,
        seed=5,
        learning_rate=2e-3,
        task={"prompt": "Say: {text}"},
        rollout={"prompts_per_step": 2, "samples_per_prompt": 2, "max_new_tokens": 4},
        evaluation={"prompts": 3, "test_prompts": 3},
    )

    assert run.status == "finished"
    assert len(run.metrics) == 2
    assert run.metrics["weights/shout"].tolist() == [1.0, 1.0]
    assert run.metrics["weights/length"].tolist() == [0.3, 0.3]
    assert run.metrics["lr"].tolist() == [2e-3, 2e-3]
    assert run.config.trainer.seed == 5
    assert all(prompt.startswith("Say: ") for prompt in seen)
    assert {"before", "after"} <= run.table().columns.keys()
    AutoModelForCausalLM.from_pretrained(run.model)


def test_mapping_names_rewards_and_two_of_a_name_are_refused(tiny_run: Tiny, tmp_path: Path) -> None:
    few = {
        "rollout": {"prompts_per_step": 2, "samples_per_prompt": 2, "max_new_tokens": 3},
        "task": {"prompt": "{text}"},
    }
    run = rl_llm.train(
        tiny_run.policy,
        tiny.write_task(tmp_path / "task.jsonl"),
        rewards={"brevity": "length", "ones": lambda completions, **columns: [1.0] * len(completions)},
        output=tmp_path / "run",
        steps=1,
        evaluation={"prompts": 2, "test_prompts": 2},
        **few,
    )
    assert set(run.evaluations[0]["metrics"]) == {"brevity", "ones", "utility", "tokens"}
    with pytest.raises(rl_llm.UserError, match="two rewards are called 'length'"):
        rl_llm.train(tiny_run.policy, tiny.rows(), rewards=["length", "length"], output=tmp_path / "no", **few)
    assert not (tmp_path / "no").exists()


def test_functions_in_one_process_may_keep_what_they_see(tiny_run: Tiny, tmp_path: Path) -> None:
    run = tiny.train(
        tiny_run.config(rewards={"components": {"ids": {"use": "function:ids"}}}, trainer={"steps": 1}),
        tmp_path / "run",
        functions={"ids": lambda completion_ids, **columns: [float(len(ids)) for ids in completion_ids]},
    )
    lengths = [len(ids) for ids in run.rollouts(1)["completion_ids"].to_pylist()]
    assert run.rollouts(1)["reward/ids"].to_pylist() == lengths
    assert read_jsonl(run.path / "failures.jsonl") == []
