"""Searches on Ray Tune, whole, broken and stopped; nothing is left of them in a Ray that is somebody else's."""

import asyncio
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from conftest import Tiny
from searches import search
from test_slot import alone
from test_trainer import assert_same_record

import rl_llm
from rl_llm.config.yaml12 import write_yaml
from rl_llm.errors import Interrupted, RunFailed, UserError
from rl_llm.runs.jsonl import read_jsonl
from rl_llm.runs.run import Run
from rl_llm.search.config import SearchConfig
from rl_llm.search.course import Course, Report
from rl_llm.search.following import Follower
from rl_llm.search.launching import plan_search, resolved, run_search
from rl_llm.search.ledger import DECISIONS, Ledger
from rl_llm.search.plan import make_course
from rl_llm.search.reader import BASE, SEARCH, TRIALS


def left() -> list[Any]:
    """Placement groups and actors that are there."""
    import ray
    from ray._private.state import state

    groups = [group for group in ray.util.placement_group_table().values() if group["state"] != "REMOVED"]
    actors = [actor for actor in state.actor_table(None, None, None).values() if actor["State"] != "DEAD"]
    return [*groups, *actors]


@pytest.fixture(autouse=True)
def nothing_is_left(ray_session: None) -> Iterator[None]:
    before = len(left())
    yield
    until = time.monotonic() + 60
    while len(found := left()) > before:
        assert time.monotonic() < until, found
        time.sleep(0.1)


class At(Follower):
    """Does something when so many reports are in."""

    def __init__(self, reports: int, act: Callable[[], None]) -> None:
        self._wait, self._act = reports, act

    def on_line(self, course: Course, line: dict[str, Any]) -> None:
        self._wait -= "report" in line
        if self._wait == 0 and "report" in line:
            self._act()


def lines(path: Path) -> list[dict[str, Any]]:
    return read_jsonl(path / DECISIONS)


def decided(path: Path) -> list[dict[str, Any]]:
    """What was decided, without who reported when."""
    return [line for line in lines(path) if "report" not in line and "fail" not in line]


def assert_same_search(path: Path, other: Path) -> None:
    assert decided(path) == decided(other)
    names = {folder.name for folder in (other / TRIALS).iterdir()}
    assert {folder.name for folder in (path / TRIALS).iterdir()} == names
    for name in names:
        assert_same_record(path / TRIALS / name, other / TRIALS / name)
        told, expected = (
            [(line["step"], line["utility"], line["tokens"]) for line in lines(of) if line.get("report") == name]
            for of in (path, other)
        )
        assert told == expected


def begun(config: SearchConfig, whole: Path, path: Path) -> Path:
    """The directory of a search that was killed when it had measured the base policy."""
    path.mkdir()
    (path / SEARCH).write_text(write_yaml(resolved(config, *plan_search(config, {}))))
    shutil.copytree(whole / BASE, path / BASE)
    return path


def pids(path: Path) -> set[str]:
    """Of other processes that a reward has been in."""
    return set((path / "pids").read_text().split()) - {str(os.getpid())}


@pytest.fixture(scope="module")
def config(tiny_run: Tiny, tmp_path_factory: pytest.TempPathFactory) -> SearchConfig:
    """Three trials, halved, and a finalist; on what it takes two at once."""
    folder = tmp_path_factory.mktemp("pids")
    moody = {"use": "tiny_rewards:moody", "args": {"folder": str(folder)}}
    return search(tiny_run, {"evaluation": {"metrics": {"moody": moody}, "utility": {"match": 1, "length": 1}}})


@pytest.fixture(scope="module")
def cell(
    config: SearchConfig, ray_session: None, tmp_path_factory: pytest.TempPathFactory
) -> tuple[rl_llm.Search, str]:
    """What a notebook's cell makes of it, where an event loop runs and the output is no file; and what it prints."""
    settings = config.model_copy(update={"concurrent": 1}).model_dump(mode="json", exclude_none=True)

    async def run() -> rl_llm.Search:
        return rl_llm.search(output=tmp_path_factory.mktemp("whole") / "search", **settings)

    with redirect_stdout(StringIO()) as said:
        return asyncio.run(run()), said.getvalue()


@pytest.fixture(scope="module")
def whole(cell: tuple[rl_llm.Search, str]) -> Path:
    return cell[0].path


def test_a_notebook_cell_searches(cell: tuple[rl_llm.Search, str]) -> None:
    search, said = cell
    assert search.status == "finished"
    assert "<pre" in search._repr_html_()
    told = [line.split()[0] for line in said.splitlines() if " utility " in line]
    assert told == [line["report"] for line in lines(search.path) if "report" in line]
    assert "\x1b" not in said


def test_a_search_decides_as_its_complete_runs_say(whole: Path, config: SearchConfig, tmp_path: Path) -> None:
    """Each trial is run to its end by itself; a course that is fed with these is the one that was."""
    space, plan = plan_search(config, {})
    course = make_course(config, space, [], Ledger())
    while not course.over:
        entry = course.going[0]
        path = tmp_path / entry.name
        if not path.exists():
            alone(plan.config.to_dict(), whole / BASE, path, entry.point, entry.seed)
        step = entry.reports[-1].step + 1 if entry.reports else 1
        values = tiny.evaluations(path)[f"validation-tune-{step:06d}.parquet"]
        live = next(line for line in lines(whole) if line.get("report") == entry.name and line["step"] == step)
        assert live["utility"] == values["utility"].to_pylist()
        course.report(entry.name, Report(**{key: live[key] for key in live if key != "report"}))
        if entry.state == "done":
            tiny.assert_same_weights(path / "model", whole / TRIALS / entry.name / "model")
    assert [line for line in course.ledger.lines if "report" not in line] == decided(whole)
    stopped = [entry for entry in course.of("trial") if entry.state == "stopped"]
    assert len(stopped) == 2
    for entry in stopped:
        assert Run(whole / TRIALS / entry.name).summary["status"] == "stopped"
        steps = entry.reports[-1].step
        assert tiny.metrics(whole / TRIALS / entry.name) == tiny.metrics(tmp_path / entry.name)[:steps]


def test_a_slot_takes_the_next_trial_in_its_process(whole: Path, config: SearchConfig) -> None:
    folder = Path(config.run["evaluation"]["metrics"]["moody"]["args"]["folder"])
    # That which measured the base policy, and that of all trials.
    assert len(pids(folder)) == 2


def test_a_search_that_is_killed_and_asked_to_stop_is_the_one_left_alone(
    whole: Path, config: SearchConfig, tmp_path: Path
) -> None:
    import ray

    path, file = begun(config, whole, tmp_path / "search"), tmp_path / "search.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_none=True), sort_keys=False))
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    command = [sys.executable, "-m", "rl_llm.cli", "search", str(file), "--output", str(path), "--resume"]
    process = subprocess.Popen(
        command, env=environment, cwd=Path(__file__).parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    while sum("report" in line for line in lines(path)) < 4:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    process.kill()
    process.wait()

    before = len(lines(path))
    stop = At(3, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Interrupted, match="stopped and saved"):
        run_search(config, path, resume=True, followers=[stop])
    assert 3 <= sum("report" in line for line in lines(path)[before:]) <= 7
    assert sorted(entry.name for entry in path.iterdir() if entry.name.startswith(".")) == []
    run_search(config, path, resume=True, followers=())
    assert_same_search(path, whole)
    told = len(lines(path))
    run_search(config, path, resume=True, followers=())  # nothing is left to be done
    assert len(lines(path)) == told


def test_a_second_signal_ends_it_at_once(whole: Path, config: SearchConfig, tmp_path: Path) -> None:
    def insist() -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    path = begun(config, whole, tmp_path / "search")
    with pytest.raises(Interrupted, match="at once"):
        run_search(config, path, resume=True, followers=[At(1, insist)])


def test_a_slot_that_has_come_to_a_halt_gives_its_room_to_one_that_waits_for_it(
    tiny_run: Tiny, whole: Path, config: SearchConfig, tmp_path: Path
) -> None:
    """Two at once are asked for, and there is room for one; the first waits for the second at its level."""
    run = {**config.run, "resources": {"num_cpus_per_learner": 3, "wait_s": 1}}
    tight = config.model_copy(update={"run": run, "concurrent": 2, "trials": 2, "finalists": 0})
    found = run_search(tight, begun(tight, whole, tmp_path / "search"), resume=True, followers=())
    assert sorted(found.summary["trials"].values()) == ["done", "stopped"]


def moods(tiny_run: Tiny, folder: Path, modes: list[str]) -> SearchConfig:
    """A trial for each mode of a reward."""
    moody = {"use": "tiny_rewards:moody", "args": {"folder": str(folder)}}
    components = {"match": {"use": "tiny_rewards:match"}, "moody": moody}
    return search(
        tiny_run,
        {"rewards": {"components": components}, "trainer": {"steps": 1}, "evaluation": {"utility": {"match": 1}}},
        space={"rewards.components.moody.args.mode": {"grid": modes}},
        searcher="grid", scheduler="none", trials=len(modes), finalists=0, silent_s=15, concurrent=2,
    )  # fmt: skip


def test_trials_that_die_hang_or_raise_are_tried_again_or_recorded_and_the_others_go_on(
    tiny_run: Tiny, whole: Path, tmp_path: Path
) -> None:
    config = moods(tiny_run, tmp_path, ["", "die once", "die", "hang once", "raise", "nan"])
    path = begun(config, whole, tmp_path / "search")
    found = run_search(config, path, resume=True, followers=())
    states = found.summary["trials"]
    assert list(states.values()) == ["done", "done", "failed", "done", "failed", "failed"]
    summaries = [Run(found.path / TRIALS / name).summary for name in states]
    assert [summary["status"] for summary in summaries] == [
        {"done": "finished"}.get(state, state) for state in states.values()
    ]
    assert "out of mood" in summaries[4]["reason"]
    assert "moody" in summaries[5]["reason"]
    failures = [(line["fail"], line["again"]) for line in lines(found.path) if "fail" in line]
    assert sorted(failures) == [("t01", True), ("t02", False), ("t02", True), ("t03", True)]
    hung = next(line["reason"] for line in lines(found.path) if line.get("fail") == "t03")
    assert "silent_s" in hung
    assert "moody" in Path(hung.rpartition(" ")[2]).read_text()


def test_a_search_of_which_every_trial_fails_has_failed_in_a_thread_too(
    tiny_run: Tiny, whole: Path, tmp_path: Path
) -> None:
    config = moods(tiny_run, tmp_path, ["raise"])
    path = begun(config, whole, tmp_path / "search")
    raised: list[Exception] = []

    def run() -> None:
        try:
            run_search(config, path, resume=True, followers=())
        except RunFailed as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert re.search(r"every trial has failed; the first, t00: .*out of mood", str(raised[0]))


def test_a_search_that_no_trial_has_room_for_is_refused_before_anything_is_made(tiny_run: Tiny, tmp_path: Path) -> None:
    resources = {"num_learners": 1, "num_gpus_per_learner": 64, "wait_s": 0.1}
    config = search(tiny_run, {"resources": resources})
    with pytest.raises(UserError, match=r"within 0.1 s: .* missing GPU: 64\. Lower resources.num_learners"):
        run_search(config, tmp_path / "search")
    assert list(tmp_path.iterdir()) == []


def test_a_directory_with_another_search_is_refused_with_the_difference(
    whole: Path, config: SearchConfig, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"holds a search already; add resume=True"):
        run_search(config, whole)
    other = config.model_copy(update={"trials": 4, "concurrent": 2})
    with pytest.raises(UserError, match=r"cannot be resumed with these: trials: 3 -> 4\. Take the change back"):
        run_search(other, whole, resume=True)
    (tmp_path / "mine").touch()
    with pytest.raises(UserError, match="is no search directory"):
        run_search(config, tmp_path)
