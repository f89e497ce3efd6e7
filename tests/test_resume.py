"""A run that was stopped, however that happened, goes on as if it had not been."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
from conftest import Tiny

from rl_llm.config import load_config
from rl_llm.errors import UserError
from rl_llm.runs.callbacks import Callback
from rl_llm.runs.jsonl import read_jsonl
from rl_llm.runs.run import Run

RESOURCES = {
    "num_rollout_workers": 1, "num_cpus_per_rollout_worker": 0.5, "num_reward_workers": 1,
    "num_cpus_per_reward_worker": 0.5, "num_learners": 1, "num_cpus_per_learner": 0.5,
}  # fmt: skip


class PulledPlug(Exception):
    pass


class PullPlug(Callback):
    """Ends a run by an exception in step `step`, after its checkpoint where it has one."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, trainer: Any, metrics: dict[str, Any]) -> None:
        if metrics["step"] == self.step and not trainer.config.checkpoint.every == self.step:
            raise PulledPlug

    def on_checkpoint(self, trainer: Any, path: Path) -> None:
        if path.name == f"step-{self.step:06d}":
            raise PulledPlug


def stopped(tiny_run: Tiny, path: Path, step: int = 3, **sections: Any) -> Path:
    """A run directory left behind in step `step`; checkpoints are made every second step."""
    with pytest.raises(PulledPlug):
        tiny.train(tiny_run.config(**sections), path, PullPlug(step))
    assert Run(path).summary["status"] == "failed"
    return path


@pytest.mark.parametrize("step", [1, 2, 3, 5])
def test_resumed_run_is_the_run_left_alone(tiny_run: Tiny, tmp_path: Path, step: int) -> None:
    path = stopped(tiny_run, tmp_path / "run", step)
    assert len(tiny.metrics(path)) == step
    resumed = tiny.train(tiny_run.config(), path, resume=True)
    tiny.assert_same_run(path, tiny_run.undisturbed)
    assert (resumed.status, resumed.summary["reason"]) == ("finished", "")


def test_run_resumed_with_actors_is_the_run_of_one_process(tiny_run: Tiny, ray_session: None, tmp_path: Path) -> None:
    path = stopped(tiny_run, tmp_path / "run")
    tiny.train(tiny_run.config(resources=RESOURCES), path, resume=True)
    tiny.assert_same_run(path, tiny_run.undisturbed)


# The command in a process of its own, to be killed and interrupted.


class Command:
    """`rl-llm train` under way, halted in step 4 by its own reward."""

    def __init__(self, tiny_run: Tiny, folder: Path, **sections: Any) -> None:
        self.folder, self.path, self.config_file = folder, folder / "run", folder / "config.yaml"
        components = {
            "match": {"use": "tiny_rewards:match_held", "args": {"run": str(self.path), "step": 4}},
            "length": {"args": {"mode": "target", "target": 3}, "scale": 0.2},
        }
        self.config = tiny_run.config(rewards={"components": components}, **sections)
        self.config_file.write_text(self.config.to_yaml())
        os.mkfifo(folder / "go")
        environment = {**os.environ, "PYTHONPATH": str(Path(tiny.__file__).parent)}
        command = [sys.executable, "-m", "rl_llm.cli", "train", str(self.config_file), "--output", str(self.path)]
        self.process = subprocess.Popen(
            command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        while not (folder / "held").exists():
            assert self.process.poll() is None, self.process.communicate()[0]
            time.sleep(0.02)
        assert len(tiny.metrics(self.path)) == 3

    def go_on(self) -> str:
        (self.folder / "go").write_bytes(b"")
        return self.process.communicate()[0]


def test_killed_command_goes_on_as_if_nothing_had_been(tiny_run: Tiny, tmp_path: Path) -> None:
    command = Command(tiny_run, tmp_path)
    command.process.kill()
    command.process.wait()
    assert Run(command.path).status == "running or killed"

    run = tiny.train(command.config, command.path, resume=True)

    tiny.assert_same_run(command.path, tiny_run.undisturbed)
    assert run.status == "finished"


def test_killed_command_with_actors_goes_on_as_if_nothing_had_been(
    tiny_run: Tiny, ray_session: None, tmp_path: Path
) -> None:
    command = Command(tiny_run, tmp_path, resources=RESOURCES)
    command.process.kill()
    command.process.wait()
    tiny.train(command.config, command.path, resume=True)
    tiny.assert_same_run(command.path, tiny_run.undisturbed)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_command_saves_and_leaves_in_order(tiny_run: Tiny, tmp_path: Path, number: signal.Signals) -> None:
    command = Command(tiny_run, tmp_path)
    command.process.send_signal(number)
    shown = command.go_on()

    assert command.process.returncode == 130, shown
    assert "--resume" in shown.splitlines()[-1]
    summary = Run(command.path).summary
    assert (summary["status"], summary["steps"]) == ("interrupted", 4)
    assert tiny.metrics(command.path) == tiny.metrics(tiny_run.undisturbed)[:4]  # the step under way was finished
    assert (command.path / "checkpoints" / "step-000004").is_dir()
    assert (command.path / "report.html").is_file()
    assert (command.path / "model" / "model.safetensors").is_file()

    tiny.train(command.config, command.path, resume=True)
    tiny.assert_same_run(command.path, tiny_run.undisturbed)


# Checkpoints.


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_truncated_checkpoint_is_refused_by_name_and_the_one_before_it_used(
    tiny_run: Tiny, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = stopped(tiny_run, tmp_path / "run", step=5)
    damaged = path / "checkpoints" / "step-000004" / name
    damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size // 2])
    steps: list[int] = []

    class Note(Callback):
        def on_start(self, trainer: Any) -> None:
            steps.append(trainer.steps_done)

    tiny.train(tiny_run.config(), path, Note(), resume=True)

    assert steps == [2]
    shown = "".join(capsys.readouterr())
    what = "manifest is missing or broken" if name == "manifest.json" else f"{name} is damaged"
    assert "checkpoint step-000004 is refused" in shown
    assert what in shown
    tiny.assert_same_run(path, tiny_run.undisturbed)


def test_run_without_a_whole_checkpoint_begins_anew(tiny_run: Tiny, tmp_path: Path) -> None:
    path = stopped(tiny_run, tmp_path / "run", step=1)
    (path / "checkpoints" / "step-000000" / "learner.json").unlink()
    tiny.train(tiny_run.config(), path, resume=True)
    tiny.assert_same_run(path, tiny_run.undisturbed)


def test_checkpoints_and_rollout_tables_are_kept_as_many_as_configured(tiny_run: Tiny, tmp_path: Path) -> None:
    run = tiny.train(tiny_run.config(checkpoint={"every": 1, "keep": 3}, logging={"rollouts": 2}), tmp_path / "run")
    assert run.rollout_steps == [5, 6]
    kept = sorted(folder.name for folder in (run.path / "checkpoints").glob("step-*"))
    assert kept == ["step-000004", "step-000005", "step-000006"]
    tiny.assert_same_weights(run.model, tiny_run.undisturbed / "model")  # how often one saves is no part of the run


# What may change between a run and its resumption.


def test_resume_with_another_config_is_refused_by_key(tiny_run: Tiny, tmp_path: Path) -> None:
    path = stopped(tiny_run, tmp_path / "run")
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    with pytest.raises(UserError, match=r"learner\.lr: 0\.01 -> 0\.02; rollout\.top_k: 0 -> 5"):
        tiny.train(tiny_run.config(learner={"lr": 2e-2}, rollout={"top_k": 5}), path, resume=True)
    with pytest.raises(UserError, match="resume=True"):
        tiny.train(tiny_run.config(), path)
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before


def test_resume_from_anything_else_than_the_run_was_made_from_is_refused(tiny_run: Tiny, tmp_path: Path) -> None:
    data, model = tmp_path / "task.jsonl", tmp_path / "model"
    data.write_bytes(tiny_run.data.read_bytes())
    shutil.copytree(tiny_run.policy, model)
    path = stopped(Tiny(model, data, path := tmp_path / "run"), path)

    def refused(config: Any, message: str) -> None:
        files = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
        with pytest.raises(UserError, match=message):
            tiny.train(config, path, resume=True)
        assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == files

    def refused_with(file: Path, old: bytes, new: bytes, message: str) -> None:
        content = file.read_bytes()
        assert content.count(old) >= 1
        file.write_bytes(content.replace(old, new, 1))
        refused(tiny.config(model, data), message)
        file.write_bytes(content)

    # The run's own config, edited in place and given again, as the file invites to.
    (path / "config.yaml").write_text(Run(path).config.to_yaml().replace("lr: 0.01", "lr: 0.02"))
    refused(load_config(path / "config.yaml"), r"learner\.lr: 0\.01 -> 0\.02")
    refused_with(data, b'"3 now gold"', b'"3 now blue"', f"the rows of {data} are others")
    weights = (model / "model.safetensors").read_bytes()[-9:]
    refused_with(model / "model.safetensors", weights, bytes(9), f"the model {model} has another model.safetensors")
    refused_with(model / "tokenizer_config.json", b"{", b"{ ", "has another tokenizer_config.json")

    data.touch()
    (model / "README.md").write_text("of no consequence")
    tiny.train(tiny.config(model, data), path, resume=True)
    tiny.assert_same_run(path, tiny_run.undisturbed)


def test_changed_code_of_a_reward_is_said_and_stays_visible(
    tiny_run: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = tmp_path / "shifting_reward.py"
    code.write_text("def score(completions, **columns):\n    return [1.0 for _ in completions]\n")
    monkeypatch.syspath_prepend(tmp_path)
    components = {"match": {"use": "tiny_rewards:match"}, "shifting": {"use": "shifting_reward:score"}}
    config = tiny_run.config(rewards={"components": components})
    with pytest.raises(PulledPlug):
        tiny.train(config, tmp_path / "run", PullPlug(3))
    assert "has changed" not in capsys.readouterr().out
    code.write_text(code.read_text().replace("1.0", "2.0"))
    monkeypatch.delitem(sys.modules, "shifting_reward")
    run = tiny.train(config, tmp_path / "run", resume=True)
    assert "the code of the reward shifting has changed since step-000002" in capsys.readouterr().out
    assert run.metrics["reward/shifting/mean"].tolist() == [1, 1, 2, 2, 2, 2]
    assert [line.get("code_changes/shifting") for line in tiny.metrics(run.path)] == [None, None, 1, 1, 1, 1]
    assert "code_changes/match" not in run.metrics
    assert "The code of the reward shifting changed before step 3." in (run.path / "report.html").read_text()
    tiny.train(tiny_run.config(rewards={"components": components}, trainer={"steps": 7}), run.path, resume=True)
    assert tiny.metrics(run.path)[6]["code_changes/shifting"] == 1  # nothing has changed since


def test_warm_started_model_that_is_another_one_is_refused_where_weights_of_it_stay(
    tiny_run: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RL_LLM_CACHE", str(tmp_path / "cache"))
    sections = {"warm_start": {"supervised_steps": 1, "target": "colour"}, "algorithm": {"kl": {"coef": 0.1}}}
    path = stopped(tiny_run, tmp_path / "run", step=1, **sections)
    [weights] = (tmp_path / "cache").rglob("model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-8] + bytes(8))
    with pytest.raises(UserError, match=f"model.safetensors of the warm-started model {weights.parent}"):
        tiny.train(tiny_run.config(**sections), path, resume=True)


def test_resume_with_a_broken_record_is_refused_before_anything_starts(tiny_run: Tiny, tmp_path: Path) -> None:
    path = stopped(tiny_run, tmp_path / "run")
    (path / "eval.jsonl").write_text("no json\n" + (path / "eval.jsonl").read_text())
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    with pytest.raises(UserError, match=r"eval\.jsonl:1: not valid JSON"):
        tiny.train(tiny_run.config(), path, resume=True)
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before


def test_settings_that_make_no_step_may_change_on_resuming(tiny_run: Tiny, tmp_path: Path) -> None:
    path = stopped(tiny_run, tmp_path / "run")
    config = tiny_run.config(
        policy={"save_dtype": "bf16"},
        evaluation={"every": 3, "samples": 0},
        checkpoint={"every": 3, "keep": 1},
        logging={"rollouts": 3},
        trainer={"steps": 7},
    )
    run = tiny.train(config, path, resume=True)
    assert tiny.metrics(path)[:6] == tiny.metrics(tiny_run.undisturbed)
    assert len(run.metrics) == 7
    validated = [line["step"] for line in run.evaluations if line["label"] == "validation"]
    assert validated == [0, 2, 3, 6, 7]
    assert run.config.trainer.steps == 7


def test_finished_run_goes_on_to_more_steps_and_else_is_left_alone(tiny_run: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "run"
    tiny.train(tiny_run.config(trainer={"steps": 4}), path)
    summary = (path / "summary.json").read_bytes()
    tiny.train(tiny_run.config(trainer={"steps": 4}), path, resume=True)
    assert (path / "summary.json").read_bytes() == summary
    run = tiny.train(tiny_run.config(), path, resume=True)
    assert tiny.metrics(path) == tiny.metrics(tiny_run.undisturbed)
    assert run.summary["after"] == Run(tiny_run.undisturbed).summary["after"]


def test_weights_changed_on_resuming_take_effect(tiny_run: Tiny, tmp_path: Path) -> None:
    path = stopped(tiny_run, tmp_path / "run")
    changed = tiny_run.config()
    changed.rewards.weights["length"] = -2.0
    run = tiny.train(changed, path, resume=True)
    assert run.metrics["weights/length"].tolist() == [1.0] * 2 + [-2.0] * 4
    undisturbed = tiny.metrics(tiny_run.undisturbed)
    assert tiny.metrics(path)[:2] == undisturbed[:2]
    # Step 3 acts with the same weights as before, so its raw rewards are the same and only what they are worth is not.
    third, expected = tiny.metrics(path)[2], undisturbed[2]
    assert third["reward/match/mean"] == expected["reward/match/mean"]
    assert third["share/length"] != expected["share/length"]


class Reweigh(Callback):
    def on_step(self, trainer: Any, metrics: dict[str, Any]) -> None:
        if metrics["step"] == 2:
            trainer.mixture.set_weight("length", 3.0)


def test_weights_changed_while_running_outlive_a_resumption(tiny_run: Tiny, tmp_path: Path) -> None:
    tiny.train(tiny_run.config(), tmp_path / "whole", Reweigh())
    path = tmp_path / "run"
    with pytest.raises(PulledPlug):
        tiny.train(tiny_run.config(), path, Reweigh(), PullPlug(3))
    run = tiny.train(tiny_run.config(), path, resume=True)
    assert run.metrics["weights/length"].tolist() == [1.0] * 2 + [3.0] * 4
    tiny.assert_same_run(path, tmp_path / "whole")


def test_failures_of_repeated_steps_are_written_once(tiny_run: Tiny, tmp_path: Path) -> None:
    def shaky(completions: list[str], **columns: Any) -> list[float]:
        return [float("nan") if "blue" in text else 1.0 for text in completions]

    config = tiny_run.config(
        rewards={
            "components": {
                "match": {"use": "tiny_rewards:match"},
                "shaky": {"use": "function:shaky", "max_failure_rate": 1},
            }
        }
    )
    functions = {"shaky": shaky}
    tiny.train(config, tmp_path / "whole", functions=functions)
    path = tmp_path / "run"
    with pytest.raises(PulledPlug):
        tiny.train(config, path, PullPlug(3), functions=functions)
    tiny.train(config, path, functions=functions, resume=True)
    failures = read_jsonl(path / "failures.jsonl")
    assert failures == read_jsonl(tmp_path / "whole" / "failures.jsonl")
    assert {line["step"] for line in failures} >= {1, 3, 6}
    tiny.assert_same_run(path, tmp_path / "whole")
