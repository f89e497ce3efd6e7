"""`rl_llm.train` where people call it: in a running event loop, in a thread, with data and rewards at hand."""

import asyncio
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_rewards
from conftest import Tiny

import rl_llm
from rl_llm import cli

SMALL: dict[str, Any] = {
    "task": {"prompt": "{text}", "split": {"by": "id", "tune": 0.2, "test": 0.2}},
    "rollout": {"prompts_per_step": 2, "samples_per_prompt": 4, "max_new_tokens": 4},
    "evaluation": {"prompts": 4, "test_prompts": 4},
    "logging": {"tensorboard": False},
    "steps": 2,
}


class Locked:
    def __init__(self) -> None:
        self.lock = threading.Lock()

    def __call__(self, completions: list[str], **columns: Any) -> list[float]:
        return [1.0] * len(completions)


async def slow_match(completions: list[str], colour: list[str], **columns: Any) -> list[float]:
    await asyncio.sleep(0)
    return tiny_rewards.match(completions, colour, **columns)


def test_a_notebook_cell_trains_with_an_async_reward_on_rows_at_hand(tiny_run: Tiny, tmp_path: Path) -> None:
    async def cell() -> rl_llm.Run:
        return rl_llm.train(tiny_run.policy, tiny.rows(), rewards=[slow_match], output=tmp_path / "run", **SMALL)

    run = asyncio.run(cell())
    assert run.status == "finished"
    assert (run.metrics["failures/slow_match"] == 0).all()
    assert "slow_match" in str(run.table())
    assert "<pre" in run._repr_html_()


def test_another_thread_trains(tiny_run: Tiny, tmp_path: Path) -> None:
    runs: list[rl_llm.Run] = []

    def train() -> None:
        runs.append(
            rl_llm.train(
                tiny_run.policy, tiny_run.data, {"match": tiny_rewards.match}, output=tmp_path / "run", **SMALL
            )
        )

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert runs[0].status == "finished"


def test_two_threads_do_not_train_at_once(tiny_run: Tiny, tmp_path: Path) -> None:
    """The second is refused before anything starts, and the first goes on; a run within a run is none of these."""
    refused: list[str] = []

    def second() -> None:
        try:
            rl_llm.train(tiny_run.policy, tiny_run.data, tiny_rewards.match, output=tmp_path / "second", **SMALL)
        except rl_llm.UserError as error:
            refused.append(str(error))

    class Meanwhile(rl_llm.Callback):
        def on_step(self, trainer: Any, metrics: dict[str, Any]) -> None:
            if metrics["step"] == 1:
                thread = threading.Thread(target=second)
                thread.start()
                thread.join()

    run = rl_llm.train(
        tiny_run.policy, tiny_run.data, tiny_rewards.match, output=tmp_path / "run", callbacks=[Meanwhile()], **SMALL
    )
    assert run.status == "finished"
    [line] = refused
    assert line.startswith("another thread of this process has a run under way; wait for its end")
    assert not (tmp_path / "second").exists()


def test_rows_and_functions_given_in_python_train_as_their_file_and_module_do(tiny_run: Tiny, tmp_path: Path) -> None:
    given = rl_llm.train(
        tiny_run.policy, tiny.rows(), {"match": tiny_rewards.match}, output=tmp_path / "given", **SMALL
    )
    named = rl_llm.train(tiny_run.policy, tiny_run.data, ["tiny_rewards:match"], output=tmp_path / "named", **SMALL)
    assert tiny.metrics(given.path) == tiny.metrics(named.path)


def test_a_dataset_trains(tiny_run: Tiny, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(tiny.rows())
    run = rl_llm.train(tiny_run.policy, data, tiny_rewards.match, output=tmp_path / "run", **SMALL)
    assert run.status == "finished"


def test_arguments_go_over_a_recipe(tiny_run: Tiny, tmp_path: Path) -> None:
    settings = {**SMALL, "task": {**SMALL["task"], "columns": {}, "chat": False}, "learning_rate": 1e-4}
    run = rl_llm.train(
        tiny_run.policy,
        tiny_run.data,
        "tiny_rewards:match",
        {"match": 0.5},
        recipe="synopsis",
        output=tmp_path / "run",
        **settings,
    )
    assert run.config.rewards.weights == {"match": 0.5}
    assert run.config.learner.lr == 1e-4
    assert run.config.learner.warmup_steps == 5
    assert run.config.trainer.steps == 2


def test_the_command_line_says_that_it_lacks_what_python_gave(
    tiny_run: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run"
    rl_llm.train(tiny_run.policy, tiny.rows(), tiny_rewards.match, output=path, **SMALL)
    capsys.readouterr()
    for arguments, expected in (
        ((), "this run's rows were given in Python"),
        ((f"task.data={tiny_run.data}",), "component 'match' was a function given in Python"),
    ):
        monkeypatch.setattr(sys, "argv", ["rl-llm", "evaluate", str(path), *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert caught.value.code == 2
        assert expected in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["rl-llm", "predict", str(path), str(tiny_run.data)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 0


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda **base: rl_llm.train(**base, stepps=5), "there is no 'stepps'; did you mean 'steps'?"),
        (lambda **base: rl_llm.train(**base, rollout=5), "rollout is a section"),
        (lambda **base: rl_llm.train(**base, rollout={"max_tokens": 5}), "did you mean 'max_new_tokens'?"),
        (lambda **base: rl_llm.train(**base, weights={"mach": 1}), "no such component; did you mean 'match'?"),
        (
            lambda **base: rl_llm.train(**{**base, "rewards": [tiny_rewards.match, "a:match"]}),
            "two rewards are called 'match'",
        ),
        (lambda **base: rl_llm.train(**{**base, "rewards": None}), "rewards is missing"),
        (lambda **base: rl_llm.train(**{**base, "dataset": {"train": []}}), "pass one split of it"),
        (lambda **base: rl_llm.train(**{**base, "dataset": []}), "there are no rows"),
        (lambda **base: rl_llm.train(**base, recipe="synopsys"), "did you mean 'synopsis'?"),
        (
            lambda **base: rl_llm.train(
                **{**base, "rewards": Locked()}, task={"prompt": "{text}"}, resources={"num_reward_workers": 1}
            ),
            "component 'Locked' cannot be sent to reward workers (TypeError: cannot pickle '_thread.lock' object): "
            "have it open what it holds in the setup() of a class, or set resources.num_reward_workers=0",
        ),
    ],
)
def test_a_call_that_cannot_be(tiny_run: Tiny, tmp_path: Path, call: Callable[..., Any], expected: str) -> None:
    with pytest.raises(rl_llm.UserError) as caught:
        call(model=tiny_run.policy, dataset=tiny.rows(), rewards=tiny_rewards.match, output=tmp_path / "run")
    assert expected in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_messages_speak_python(tiny_run: Tiny, tmp_path: Path) -> None:
    given = {"model": tiny_run.policy, "dataset": tiny_run.data, "rewards": "tiny_rewards:match", **SMALL}
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.txt").touch()
    for output, expected in (
        (tiny_run.undisturbed, "holds a run already; add resume=True to go on with it, or name another output"),
        (tmp_path / "other", f"output {tmp_path / 'other'} exists and is no run directory"),
    ):
        with pytest.raises(rl_llm.UserError) as caught:
            rl_llm.train(output=output, **given)
        assert expected in str(caught.value)
    with pytest.raises(rl_llm.UserError, match=r"something else.*name another output$"):
        rl_llm.train(output=tiny_run.undisturbed, resume=True, **given)
    with pytest.raises(rl_llm.UserError, match="give the output of a run"):
        rl_llm.load_run(tmp_path)
