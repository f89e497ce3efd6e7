"""A living trainer: advanced, restored in place, and begun anew with another config."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conftest import Tiny

from rl_llm.config import RunConfig
from rl_llm.errors import UserError
from rl_llm.launch.inference import config_for, evaluate, predict
from rl_llm.launch.preflight import make_plan
from rl_llm.runs.callbacks import Callback
from rl_llm.runs.jsonl import read_jsonl
from rl_llm.runs.reader import RunFiles
from rl_llm.runs.writer import RunWriter
from rl_llm.trainer.beginning import Beginning
from rl_llm.trainer.trainer import Trainer

ACTORS = {
    "num_rollout_workers": 1, "num_cpus_per_rollout_worker": 0.4, "num_reward_workers": 1,
    "num_cpus_per_reward_worker": 0.4, "num_learners": 2, "num_cpus_per_learner": 0.4,
}  # fmt: skip
WHERE = pytest.mark.parametrize("resources", [{}, ACTORS], ids=["here", "actors"])


@contextmanager
def opened(
    config: RunConfig,
    path: Path,
    *callbacks: Callback,
    checkpoint: Path | None = None,
    beginning: Beginning | None = None,
) -> Iterator[Trainer]:
    plan = make_plan(config, {})
    base, followers = str(config.policy.model), [RunWriter(), *callbacks]
    opened = Trainer.open(
        config,
        path,
        plan.task,
        base,
        functions=plan.functions,
        callbacks=followers,
        checkpoint=checkpoint,
        beginning=beginning,
    )
    with opened as trainer:
        yield trainer


def assert_same_record(path: Path, other: Path) -> None:
    assert tiny.metrics(path) == tiny.metrics(other) != []
    assert read_jsonl(path / "eval.jsonl") == read_jsonl(other / "eval.jsonl")
    for step in range(1, len(tiny.metrics(other)) + 1):
        assert tiny.table(path, step).equals(tiny.table(other, step)), f"rollouts of step {step} differ"


# ---- advance


def test_advance_goes_from_evaluation_to_evaluation(tiny_run: Tiny, tmp_path: Path) -> None:
    config = tiny_run.config(evaluation={"every": 2}, checkpoint={"every": 3}, trainer={"steps": 5})
    with opened(config, tmp_path) as trainer:
        seen = []
        while True:
            more = trainer.advance()
            seen.append((trainer.steps_done, more))
            if not more:
                break
    assert seen == [(2, True), (4, True), (5, False)]
    validated = [line["step"] for line in read_jsonl(tmp_path / "eval.jsonl") if line["label"] == "validation"]
    assert validated == [0, 2, 4, 5]
    assert sorted(folder.name for folder in (tmp_path / "checkpoints").glob("step-*")) == ["step-000003", "step-000005"]


def test_trainer_that_is_asked_to_stop_saves_and_can_be_opened_again(tiny_run: Tiny, tmp_path: Path) -> None:
    class Stop(Callback):
        def on_step(self, trainer: Any, metrics: dict[str, Any]) -> None:
            trainer.stopping = metrics["step"] == 3

    with opened(tiny_run.config(), tmp_path, Stop()) as trainer:
        while trainer.advance():
            pass
        assert trainer.steps_done == 3
    with opened(tiny_run.config(), tmp_path, checkpoint=tmp_path / "checkpoints" / "step-000003") as trainer:
        while trainer.advance():
            pass
    assert tiny.metrics(tmp_path) == tiny.metrics(tiny_run.undisturbed)


# ---- restore


@WHERE
def test_living_trainer_acts_with_the_weights_of_another_runs_checkpoint(
    tiny_run: Tiny, ray_session: None, tmp_path: Path, resources: dict[str, Any]
) -> None:
    """At the same step, too, where workers have weights of that step already."""
    donor, steps = tmp_path / "donor", {"steps": 4}
    with opened(tiny_run.config(learner={"lr": 5e-2}, trainer=steps), donor) as trainer:
        while trainer.advance():
            pass
    config = tiny_run.config(resources=resources, trainer=steps)
    with opened(config, tmp_path / "run") as trainer:
        trainer.advance()
        assert trainer.steps_done == 2
        own = trainer.weights.number
        trainer.restore(tmp_path / "donor" / "checkpoints" / "step-000002")
        assert trainer.weights.number > own
        trainer.advance()
    # The third step's samples are those of the donor's policy, bit for bit; the learning rate is this run's own.
    samples, expected = (tiny.table(path, 3)["completion_ids"] for path in (tmp_path / "run", donor))
    assert samples.to_pylist() == expected.to_pylist()
    assert [line["lr"] for line in tiny.metrics(tmp_path / "run")] == [1e-2] * 4
    assert [line["step"] for line in tiny.metrics(tmp_path / "run")] == [1, 2, 3, 4]


def test_going_back_to_an_own_checkpoint_repeats_the_steps(tiny_run: Tiny, tmp_path: Path) -> None:
    sections = {
        "algorithm": {"name": "ppo", "kl": {"coef": 0.1, "target": 0.05, "horizon": 50},
                      "reference": {"refresh_every": 3}},
        "learner": {"lr": 1e-2, "epochs": 2}, "checkpoint": {"every": 2, "keep": 9},
    }  # fmt: skip
    config = tiny_run.config(**sections)
    with opened(config, tmp_path / "whole") as trainer:
        while trainer.advance():
            pass
    with opened(config, tmp_path / "back") as trainer:
        while trainer.advance():
            pass
        # The reference was the first policy at step 2, and is another by now.
        trainer.restore(tmp_path / "back" / "checkpoints" / "step-000002")
        assert len(tiny.metrics(tmp_path / "back")) == 6
        while trainer.advance():
            pass
    assert_same_record(tmp_path / "back", tmp_path / "whole")


def test_what_is_configured_anew_goes_before_what_was_live(tiny_run: Tiny, tmp_path: Path) -> None:
    class Live(Callback):
        def on_step(self, trainer: Any, metrics: dict[str, Any]) -> None:
            if metrics["step"] == 1:
                trainer.mixture.set_weight("match", 0.5)
                trainer.mixture.set_weight("length", 0.5)
                trainer.learning_rate.peak = 2e-2

    kl = {"coef": 0.1, "target": 1e-6, "horizon": 50}
    with opened(tiny_run.config(trainer={"steps": 2}, algorithm={"kl": kl}), tmp_path / "donor", Live()) as trainer:
        trainer.advance()
    checkpoint = tmp_path / "donor" / "checkpoints" / "step-000002"

    def third(**sections: Any) -> dict[str, Any]:
        config = tiny_run.config(**{"algorithm": {"kl": kl}, **sections})
        with opened(config, tmp_path / "other", checkpoint=checkpoint) as trainer:
            assert trainer.state.config["learner"]["lr"] == config.learner.lr
            return trainer.step()

    live = third()
    assert (live["weights/match"], live["weights/length"], live["lr"]) == (0.5, 0.5, 2e-2)
    assert live["kl/coef"] < 0.1
    anew = third(
        learner={"lr": 3e-2},
        rewards={
            "components": tiny_run.config().model_dump()["rewards"]["components"],
            "weights": {"length": {"start": 3.0, "end": 5.0, "steps": 4}},
        },
        algorithm={"kl": {**kl, "coef": 0.3}},
    )
    # One weight was given anew, as a ramp; the other is what it was.
    assert (anew["weights/match"], anew["weights/length"]) == (0.5, 4.0)
    assert (anew["lr"], anew["kl/coef"]) == (3e-2, 0.3)


def test_checkpoint_of_another_version_is_refused_by_name(tiny_run: Tiny, tmp_path: Path) -> None:
    with opened(tiny_run.config(trainer={"steps": 1}), tmp_path) as trainer:
        folder = trainer.save()
        (folder / "state.json").write_text('{"steps_done": 0}')
        with pytest.raises(UserError, match=r"step-000000 was made by another version"):
            trainer.restore(folder)


# ---- reset


@pytest.mark.parametrize(("resources", "trainable"), [({}, "all"), (ACTORS, "lora")], ids=["here", "actors"])
def test_reset_gives_the_run_of_a_fresh_process(
    tiny_run: Tiny, ray_session: None, tmp_path: Path, resources: dict[str, Any], trainable: str
) -> None:
    first = tiny_run.config(resources=resources, trainer={"steps": 2})
    second = tiny_run.config(
        resources=resources,
        policy={"trainable": trainable},
        rewards={"components": {"length": {"args": {"mode": "target", "target": 2}}}},
        algorithm={"name": "rloo", "kl": {"coef": 0.05}, "reference": {"refresh_every": 2}},
        learner={"lr": 2e-2, "minibatches": 2},
        rollout={"prompts_per_step": 4, "max_new_tokens": 4},
        trainer={"steps": 4, "seed": 3},
    )
    base = str(tiny_run.policy)
    with opened(second, tmp_path / "fresh") as trainer:
        while trainer.advance():
            pass
        expected = tiny.flat(trainer.workers.here.policy) if trainer.workers.here else None
    with opened(first, tmp_path / "first") as trainer:
        while trainer.advance():
            pass
        before = trainer.workers.rollouts.where(0)
        task = make_plan(second, {}).task
        trainer.reset(second, tmp_path / "again", task, base)
        while trainer.advance():
            pass
        assert trainer.workers.rollouts.where(0) == before  # the same process
        if expected is not None and trainer.workers.here is not None:
            assert torch.equal(tiny.flat(trainer.workers.here.policy), expected)
    assert_same_record(tmp_path / "again", tmp_path / "fresh")
    assert len(tiny.metrics(tmp_path / "first")) == 2


def test_reset_to_other_resources_is_refused(tiny_run: Tiny, tmp_path: Path) -> None:
    with opened(tiny_run.config(), tmp_path) as trainer:
        other = tiny_run.config(resources={"threads": 2})
        with pytest.raises(UserError, match="resources cannot change"):
            trainer.reset(other, tmp_path / "other", trainer.task, str(tiny_run.policy))


# ---- without learning


@pytest.mark.parametrize("workers", [0, 1])
def test_inference_starts_no_learner(
    tiny_run: Tiny, ray_session: None, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("a learner was started")

    monkeypatch.setattr("rl_llm.trainer.workers.Learner", refuse)
    monkeypatch.setattr("rl_llm.trainer.workers.LearnerGroup", refuse)
    counts = [f"resources.num_{kind}={workers}" for kind in ("learners", "rollout_workers")]
    # The machine has no GPU: were a learner's asked for, there would be no room.
    asked = ["resources.num_gpus_per_learner=1", "resources.wait_s=10", "resources.num_cpus_per_rollout_worker=0.4"]
    config = config_for(str(tiny_run.undisturbed), None, [*counts, *asked])
    metrics, count = evaluate(config, "test", print)
    after = RunFiles(tiny_run.undisturbed).summary["after"]
    assert count == 8
    assert all(metrics[name] == after[name] for name in ("match", "length", "tokens"))
    config.resources.num_reward_workers = 9 * workers  # more than there is room for, and nothing to score
    answers = list(predict(config, str(tiny_run.data), print))
    assert len(answers) == 48
