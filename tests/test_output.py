"""What a run prints is a view of it: losing the console costs nothing else."""

import errno
import io
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import rich.console
import tiny
import tiny_rewards
from conftest import Tiny
from run_factory import evaluation, make_config

from rl_llm.launch.training import run_training
from rl_llm.runs.checkpoint import by_step
from rl_llm.runs.console import Console, LiveConsole
from rl_llm.runs.output import shielded


class Lost(io.StringIO):
    """A stream whose reader is gone."""

    encoding = "utf-8"

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        raise self.error

    def flush(self) -> None:
        raise self.error


LOSSES = [BrokenPipeError(errno.EPIPE, "Broken pipe"), OSError(errno.EIO, "I/O error"), ValueError("closed file")]


@pytest.mark.parametrize("error", LOSSES, ids=["pipe", "terminal", "closed"])
def test_whoever_prints_to_a_lost_stream_goes_on(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    lost = Lost(error)
    monkeypatch.setattr(sys, "stdout", lost)
    with shielded():
        print("a reward that prints", flush=True)
        sys.stdout.writelines(["a", "b"])
        rich.print("a table")
    assert sys.stdout is lost  # what a script does with its own output afterwards is its own affair
    with pytest.raises(type(error)):
        print("x")


def test_a_stream_that_is_not_there_stays_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    with shielded():
        print("x")
    assert sys.stdout is None


def test_what_an_encoding_lacks_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", ascii_only)
    with shielded():
        Console().on_message("an é and ⏎")
    assert ascii_only.buffer.getvalue() == b"an \\xe9 and \\u23ce\n"  # type: ignore[attr-defined]


def test_a_live_display_goes_on_in_a_lost_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer: Any = type("Trainer", (), {"config": make_config({"chrf": 1.0}), "steps_done": 0})
    monkeypatch.setattr(sys, "stdout", Lost(OSError(errno.EIO, "I/O error")))
    with shielded():
        console = LiveConsole(rich.console.Console(force_terminal=True))
        console.on_start(trainer)
        console.on_step(trainer, {"step": 1, "reward/mean": 0.5})
        console.on_evaluation(trainer, evaluation(1, "tune", "validation", ["chrf"], 0.5, "text"))
        console.on_recorded(trainer)
        console.close()


def test_a_run_without_a_console_is_the_same_run_and_a_step_is_saved_before_it_is_shown(
    tiny_run: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, shown = tmp_path / "run", []

    class Looks(Console):
        def _print(self, text: str) -> None:
            if found := re.match(r"step (\d)/6", text):
                shown.append((int(found[1]), len(tiny.metrics(path)), max(by_step(path / "checkpoints"))))
            super()._print(text)

    def match(completions: list[str], colour: list[str], **columns: Any) -> list[float]:
        print("scoring", flush=True)
        return tiny_rewards.match(completions, colour, **columns)

    components = {
        "match": {"use": "function:match"},
        "length": {"args": {"mode": "target", "target": 3}, "scale": 0.2},
    }
    monkeypatch.setattr(sys, "stdout", Lost(LOSSES[0]))
    config = tiny_run.config(rewards={"components": components})
    run = run_training(config, path, console=Looks(), functions={"match": match})
    assert run.status == "finished"
    tiny.assert_same_run(path, tiny_run.undisturbed)
    assert shown == [(1, 1, 0), (2, 2, 2), (3, 3, 2), (4, 4, 4), (5, 5, 4), (6, 6, 6)]


PRINTS = """
import sys
from rl_llm.runs.output import shielded
sys.stdin.read()  # until the reader of what follows is gone
with shielded():
    print("lost", flush=True)
    print("lost", file=sys.stderr)
sys.exit(3)
"""


def test_a_lost_console_does_not_change_the_exit_code() -> None:
    piped: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-c", PRINTS], **piped) as process:
        for stream in (process.stdout, process.stderr, process.stdin):
            assert stream is not None
            stream.close()
        assert process.wait() == 3


CLOSED = """
import os, sys
for number in (0, 1, 2):
    os.close(number)
sys.argv = ["rl-llm", "report", "nowhere"]
from rl_llm import cli
try:
    cli.main()
except SystemExit as exit:
    os._exit(int(exit.code) + 10 * (os.open(os.devnull, os.O_RDONLY) < 3))
"""


def test_no_file_takes_the_place_of_a_closed_stream() -> None:
    """What a library prints to it would go into that file."""
    assert subprocess.run([sys.executable, "-c", CLOSED]).returncode == 2
