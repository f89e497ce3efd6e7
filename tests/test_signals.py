"""A run is asked to stop by signals, in its own process and between two steps."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
from conftest import Tiny

from rl_llm.errors import Interrupted
from rl_llm.launch.signals import stop_between_steps, terminable
from rl_llm.runs.checkpoint import by_step
from rl_llm.runs.run import Run
from rl_llm.runtime.actor import _Host
from rl_llm.runtime.cluster import outliving_the_terminal
from rl_llm.trainer.trainer import Trainer

HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in HANDLED}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def asked(*numbers: int) -> Any:
    """A trainer in whose loop these signals arrived."""
    trainer: Any = SimpleNamespace(stopping=False)
    with stop_between_steps(trainer):
        for number in numbers:
            os.kill(os.getpid(), number)
    return trainer


@pytest.mark.parametrize("number", HANDLED)
def test_a_signal_stops_between_steps(number: signal.Signals) -> None:
    before = [signal.getsignal(n) for n in HANDLED if n != number]
    assert asked(number).stopping
    assert [signal.getsignal(n) for n in HANDLED if n != number] == before


def test_a_second_one_insists_but_a_terminal_that_closes_says_it_twice() -> None:
    with pytest.raises(KeyboardInterrupt):
        asked(signal.SIGTERM, signal.SIGINT)
    assert asked(signal.SIGHUP, signal.SIGHUP).stopping
    with terminable():
        assert asked(signal.SIGTERM, signal.SIGHUP).stopping
        os.kill(os.getpid(), signal.SIGHUP)  # after the loop too, while the best policy is saved


def test_a_closed_terminal_ends_what_is_outside_the_loop_in_order() -> None:
    with pytest.raises(KeyboardInterrupt), terminable():
        os.kill(os.getpid(), signal.SIGHUP)


def test_nohup_is_respected() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with terminable():
        assert not asked(signal.SIGHUP).stopping
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_a_signal_is_taken_where_nothing_can_be_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*args: Any) -> int:
        raise OSError("I/O error")

    monkeypatch.setattr(os, "write", lost)
    assert asked(signal.SIGINT).stopping


def test_what_is_started_for_a_run_outlives_its_terminal() -> None:
    with outliving_the_terminal():
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL


def ended_child() -> int | None:
    """The exit code of a forked child that was asked to end; None where it goes on."""
    fork = multiprocessing.get_context("fork")
    ready = fork.Event()

    def idle() -> None:
        ready.set()
        threading.Event().wait()

    child = fork.Process(target=idle)
    child.start()
    ready.wait()
    child.terminate()
    child.join(10)
    child.kill()
    return child.exitcode


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_children_of_a_reward_in_this_process_end_as_they_are_told() -> None:
    trainer: Any = SimpleNamespace(stopping=False)
    with terminable(), stop_between_steps(trainer):
        assert ended_child() == -signal.SIGTERM
    assert not trainer.stopping


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_children_of_a_reward_worker_end_as_they_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def rays_own(number: int, frame: object) -> None:
        """Ends a worker in order, by an exception that any reward may catch."""

    monkeypatch.setattr("rl_llm.runtime.actor.send_tables_as_ipc", lambda: None)
    signal.signal(signal.SIGTERM, rays_own)
    _Host([])
    assert ended_child() == -signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is rays_own


@pytest.mark.parametrize("when", [1, 2])
def test_a_run_asked_to_stop_at_any_moment_between_two_steps_saves(
    tiny_run: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: int
) -> None:
    """The signal arrives right after the loop has looked, for the `when`-th time, whether it is over."""
    looked, look = [0], Trainer.over.fget
    assert look is not None

    def over(trainer: Trainer) -> bool:
        found = look(trainer)
        if trainer.steps_done:
            looked[0] += 1
            if looked[0] == when:
                trainer.stopping = True
        return found

    monkeypatch.setattr(Trainer, "over", property(over))
    settings: dict[str, Any] = {"evaluation": {"every": 1, "prompts": 2, "test_prompts": 2}, "checkpoint": {"every": 6}}
    with pytest.raises(Interrupted, match="stopped and saved"):
        tiny.train(tiny_run.config(**settings), tmp_path / "run")
    assert list(by_step(tmp_path / "run" / "checkpoints")) == [0, Run(tmp_path / "run").summary["steps"]]
