"""A run directory belongs to one process at a time, and a default name to one run."""

import json
import os
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
from conftest import Tiny

import rl_llm.api
from rl_llm import cli
from rl_llm.errors import UserError
from rl_llm.runs import directory
from rl_llm.runs.directory import LOCK, STALE_S, locked, run_directory


def left(path: Path, content: str | None = None, **holder: Any) -> Path:
    """A directory whose lock another process left: by default this one's parent, which is alive."""
    path.mkdir(exist_ok=True)
    parent = os.getppid()
    here = {**directory._this_process(), "pid": parent, "started": directory._started(parent), **holder}
    (path / LOCK).write_text(json.dumps(here) if content is None else content)
    return path


def age(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


def test_a_second_start_is_refused_before_anything_and_names_the_first(
    tiny_run: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rl_llm.launch.training.connected", None)
    path = left(tmp_path / "run")
    for resume in (False, True):
        with pytest.raises(UserError, match=rf"run is in use by process {os.getppid()} on this machine.*kill"):
            tiny.train(tiny_run.config(), path, resume=resume)
    assert [file.name for file in path.iterdir()] == [LOCK]


def test_a_process_cannot_train_twice_in_one_directory(tmp_path: Path) -> None:
    with locked(tmp_path / "run"):
        with pytest.raises(UserError, match="in use by this process"), locked(tmp_path / "run"):
            pass
        assert (tmp_path / "run" / LOCK).is_file()
    assert not (tmp_path / "run").exists()  # nothing came of it, so nothing is left
    with locked(tmp_path / "run"):
        (tmp_path / "run" / "config.yaml").touch()
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["config.yaml"]


def test_a_lock_whose_process_is_gone_is_taken_over(tmp_path: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    for holder in ({"pid": ended.pid}, {"started": "1"}):  # the id is nobody's, or somebody else's by now
        with locked(left(tmp_path, **holder)):
            assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


def test_a_zombie_is_gone() -> None:
    ended = subprocess.Popen(["true"])
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
    assert directory._started(ended.pid) is None
    ended.wait()


@pytest.mark.parametrize("elsewhere", [{"host": "node-7"}, {"pids": "pid:[1]"}], ids=["host", "container"])
def test_a_lock_of_another_machine_is_stale_once_nobody_touches_it(tmp_path: Path, elsewhere: dict[str, str]) -> None:
    path = left(tmp_path, **elsewhere)
    host = elsewhere.get("host", socket.gethostname())
    age(path / LOCK, STALE_S - 60)
    with pytest.raises(UserError, match=rf"process {os.getppid()} on {host}, last seen 2\d\d s ago"), locked(path):
        pass
    age(path / LOCK, STALE_S + 60)
    with locked(path):
        pass


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": "x"}'])
def test_a_lock_that_says_nothing_counts_for_a_while(tmp_path: Path, content: str) -> None:
    path = left(tmp_path, content)
    with pytest.raises(UserError, match=r"by another process; if there is none, delete .*\.lock"), locked(path):
        pass
    age(path / LOCK, STALE_S + 60)
    with locked(path):
        pass


def test_the_holder_touches_its_lock(tmp_path: Path) -> None:
    path = left(tmp_path)
    age(path / LOCK, 1000)
    over = iter([False, True])
    directory._keep_fresh(path / LOCK, lambda seconds: next(over))
    assert directory._untouched_s(path / LOCK) < 60


def test_of_many_starts_that_find_a_stale_lock_one_gets_the_directory(tmp_path: Path) -> None:
    path, count = left(tmp_path, started="1"), 8
    begin, over, outcomes = threading.Barrier(count), threading.Event(), []

    def note(outcome: str) -> None:
        outcomes.append(outcome)
        if len(outcomes) == count:
            over.set()

    def start() -> None:
        begin.wait()
        try:
            with locked(path):
                note("held")
                over.wait(20)
        except UserError as error:
            note(str(error))

    threads = [threading.Thread(target=start) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(outcomes), outcomes.count("held")) == (count, 1)
    refusals = ("in use", "taken over", "started in")
    assert all(any(text in outcome for text in refusals) for outcome in outcomes if outcome != "held")


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_neither_a_forked_child_nor_who_lost_it_gives_a_lock_back(tmp_path: Path) -> None:
    held = locked(tmp_path)
    held.__enter__()
    child = os.fork()
    if child == 0:
        held.__exit__(None, None, None)
        os._exit(0)
    os.waitpid(child, 0)
    assert (tmp_path / LOCK).exists()
    left(tmp_path, host="node-7")
    held.__exit__(None, None, None)
    assert "node-7" in (tmp_path / LOCK).read_text()


def test_a_directory_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"Not a directory\); name another"), locked(tmp_path / "file" / "run"):
        pass


def test_starts_in_the_same_second_have_directories_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(directory.time, "strftime", lambda form: "now")
    with run_directory(None, "x-") as first, run_directory(None, "x-") as second, run_directory(None) as third:
        assert [str(path) for path in (first, second, third)] == ["runs/x-now", "runs/x-now-2", "runs/now"]
        assert all(path.is_dir() for path in (first, second, third))
        (first / "config.yaml").touch()
    assert [path.name for path in Path("runs").iterdir()] == ["x-now"]


def test_both_faces_start_in_a_directory_of_their_own(
    tiny_run: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    taken = []

    def stop(config: Any, path: Path, **how: Any) -> None:
        taken.append((path.parent.name, path.is_dir()))
        raise UserError("not now")

    for place in ("rl_llm.launch.training", "rl_llm.api"):
        monkeypatch.setattr(f"{place}.run_training", stop)
    (tmp_path / "own.yaml").write_text(tiny_run.config().to_yaml())
    with pytest.raises(UserError, match="not now"):
        rl_llm.api.train(recipe=tmp_path / "own.yaml")
    with pytest.raises(UserError, match="not now"):
        cli.app(["train", "own.yaml"], standalone_mode=False)
    assert taken == [("runs", True)] * 2
    assert not Path("runs").exists()
    with pytest.raises(UserError, match="held is in use by process"):
        cli.app(["train", "own.yaml", "--dry-run", "--output", str(left(tmp_path / "held"))], standalone_mode=False)
