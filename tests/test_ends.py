"""However and wherever a run ends, its directory says the truth and can be gone on with."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from conftest import Tiny

from rl_llm.errors import Interrupted, RunFailed, UserError
from rl_llm.learner.learner import Learner
from rl_llm.runs import checkpoint
from rl_llm.runs.callbacks import Callback
from rl_llm.runs.run import Run
from rl_llm.trainer.utility import Utility
from rl_llm.trainer.workers import Workers


class RaiseAt(Callback):
    """Raises `error` in the evaluation called `label`."""

    def __init__(self, label: str, error: type[BaseException]) -> None:
        self.label, self.error = label, error

    def on_evaluation(self, trainer: Any, evaluation: dict[str, Any]) -> None:
        if evaluation["label"] == self.label:
            raise self.error


@pytest.mark.parametrize(("error", "status"), [(OSError, "failed"), (KeyboardInterrupt, "interrupted")])
def test_run_that_ends_after_its_last_step_is_not_finished(
    tiny_run: Tiny, tmp_path: Path, error: type[BaseException], status: str
) -> None:
    with pytest.raises(Interrupted if error is KeyboardInterrupt else error):
        tiny.train(tiny_run.config(), tmp_path / "run", RaiseAt("after", error))
    assert Run(tmp_path / "run").summary["status"] == status

    run = tiny.train(tiny_run.config(), tmp_path / "run", resume=True)
    assert run.status == "finished"
    tiny.assert_same_run(run.path, tiny_run.undisturbed)
    assert [line["label"] for line in run.evaluations].count("after") == 1


def test_no_summary_of_an_earlier_end_stands_while_a_run_goes_on(tiny_run: Tiny, tmp_path: Path) -> None:
    tiny.train(tiny_run.config(trainer={"steps": 2}), tmp_path / "run")
    first = Run(tmp_path / "run").summary

    class Look(Callback):
        def on_step(self, trainer: Any, metrics: dict[str, Any]) -> None:
            assert Run(trainer.path).status == "running or killed"

    run = tiny.train(tiny_run.config(), tmp_path / "run", Look(), resume=True)
    assert run.summary["steps"] == 6
    assert run.summary["seconds"] > first["seconds"]


def test_run_goes_on_where_every_checkpoint_is_damaged(tiny_run: Tiny, tmp_path: Path) -> None:
    path = tiny.train(tiny_run.config(), tmp_path / "run").path
    for folder in (path / "checkpoints").glob("step-*"):
        (folder / "state.json").write_text("{")
    run = tiny.train(tiny_run.config(trainer={"steps": 7}), path, resume=True)
    assert (run.status, len(run.metrics)) == ("finished", 7)
    assert tiny.metrics(path)[:6] == tiny.metrics(tiny_run.undisturbed)
    assert checkpoint.find(path / "checkpoints")[0] == path / "checkpoints" / "step-000007"


def test_damaged_best_policy_is_refused(tiny_run: Tiny, tmp_path: Path) -> None:
    class Damage(Callback):
        def on_checkpoint(self, trainer: Any, path: Path) -> None:
            for weights in trainer.path.glob("checkpoints/best/*/weights.safetensors"):
                weights.write_bytes(weights.read_bytes()[:-1] + b"x")

    with pytest.raises(RunFailed, match=r"best policy.* is damaged"):
        tiny.train(tiny_run.config(), tmp_path / "run", Damage())


def test_callbacks_that_never_began_hear_of_no_end_and_workers_end_all_the_same(
    tiny_run: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[str] = []
    monkeypatch.setattr(Workers, "close", lambda workers: heard.append("workers"))

    class Breaks(Callback):
        def on_start(self, trainer: Any) -> None:
            raise OSError("no room")

    class Listens(Callback):
        def on_end(self, trainer: Any, summary: dict[str, Any]) -> None:
            heard.append(summary["status"])

    with pytest.raises(OSError, match="no room"):
        tiny.train(tiny_run.config(), tmp_path / "run", Breaks(), Listens())
    assert heard == ["workers"]
    assert Run(tmp_path / "run").summary["reason"] == "OSError: no room"


def test_learner_that_does_not_see_the_run_directory_is_refused(
    tiny_run: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    see = Learner.see
    other = tmp_path / "a folder of the same name on another node"
    monkeypatch.setattr(Learner, "see", lambda learner, mark: see(learner, other / mark.name))
    with pytest.raises(UserError, match=r"does not see .*another node.*name an output on storage that all nodes share"):
        tiny.train(tiny_run.config(), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_utility_of_a_metric_that_never_differed_counts_in_its_own_units() -> None:
    utility = Utility({"flat": 1.0}, {})
    utility.measure_base({"flat": np.full(128, 0.1)})
    assert utility.per_prompt({"flat": np.array([0.1, 0.3])}) == pytest.approx([0.0, 0.2])
