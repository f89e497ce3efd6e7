"""Components whose values are kept: who is asked, who is not, and that the values are the same."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import tiny
from conftest import Tiny
from searches import search, shared

from rl_llm.config import ComponentConfig
from rl_llm.config.yaml12 import write_yaml
from rl_llm.errors import UserError
from rl_llm.launch.origin import origin_of
from rl_llm.launch.preflight import make_plan
from rl_llm.rewards import SCORES, Cache, Component, RewardWorker, Scores, cache_folders
from rl_llm.runs.jsonl import read_jsonl
from rl_llm.search.launching import find_search, plan_search, resolved
from rl_llm.search.reader import BASE, SEARCH
from rl_llm.search.slot import REPORT, TRIALS, Slot
from rl_llm.table import mark_conversational
from rl_llm.trainer.beginning import measures

CODE = {"mine": "a digest"}


def table(completions: list[str], prompts: list[str] | None = None, **columns: list[Any]) -> pa.Table:
    """Rows as a reward worker gets them; `completion_ids` are tokens, and all else is columns of the data."""
    ids = columns.pop("completion_ids", [[0]] * len(completions))
    return pa.table(
        {
            "prompt": prompts or ["?"] * len(completions),
            "completion": completions,
            "completion_ids": pa.array(ids, pa.list_(pa.int32())),
            **{f"field/{name}": values for name, values in columns.items()},
        }
    )


class Judge:
    """Remembers the completions that it is asked for; some have no value, and some fail until it is mended."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.mended = False

    def __call__(self, completions: list[str]) -> list[float | None]:
        self.asked += completions
        if "raise" in completions and not self.mended:
            raise ValueError("no answer")
        return [None if text == "none" else float("nan") if text == "nan" else len(text) / 7 for text in completions]


def worker(fn: Any, folder: Path, code: str = "a digest", cache: bool = True, **settings: Any) -> RewardWorker:
    """A worker of a run whose caches lie in a folder."""
    configs = {"mine": ComponentConfig(use="function:mine", cache=cache, **settings)}
    return RewardWorker(configs, {"mine": fn}, caches=cache_folders(folder, configs, {"mine": code}))


def shares(scores: Scores) -> float:
    total, count = scores.logged["cached"]
    return total / count


# Who is asked.


def test_rows_are_asked_once_by_all_workers_of_a_folder(tmp_path: Path) -> None:
    first, second, third = Judge(), Judge(), Judge()
    one, other = worker(first, tmp_path), worker(second, tmp_path)
    given = table(["a", "bb", "a", "none", "a"])
    plain = RewardWorker({"mine": ComponentConfig(use="function:mine")}, {"mine": Judge()}).score("mine", given)
    scores = one.score("mine", given)
    assert (scores.values, scores.status) == (plain.values, plain.status)
    assert first.asked == ["a", "bb", "none"]
    assert shares(scores) == 2 / 5

    again = one.score("mine", table(["ccc", "none", "bb"]))
    assert (again.values, again.status) == ([3 / 7, None, 2 / 7], ["ok", "not_applicable", "ok"])
    assert first.asked == ["a", "bb", "none", "ccc"]
    assert other.score("mine", table(["none", "ccc", "dddd"])).values == [None, 3 / 7, 4 / 7]
    assert second.asked == ["dddd"]
    assert one.score("mine", given, row=1).values == [2 / 7]
    assert one.score("mine", table(["dddd", "a"])).values == [4 / 7, 1 / 7]
    assert first.asked == ["a", "bb", "none", "ccc"]
    known = worker(third, tmp_path).score_all(["mine"], table(["dddd", "a", "dddd"]))["mine"]
    assert (known.values, third.asked, shares(known)) == ([4 / 7, 1 / 7, 4 / 7], [], 1)


def test_values_come_back_bit_for_bit(tmp_path: Path) -> None:
    numbers = np.frombuffer(np.random.default_rng(0).bytes(8 * 2000))
    numbers = [*numbers[np.isfinite(numbers)].tolist(), -0.0, 5e-324, 1e22, 3.0, 0.1 + 0.2]

    def mine(completions: list[str]) -> list[float]:
        return [numbers[int(text)] for text in completions]

    given = table([str(number) for number in range(len(numbers))])
    worker(mine, tmp_path).score("mine", given)
    again = worker(lambda completions: [], tmp_path).score("mine", given)
    assert np.array(again.values).tobytes() == np.array(numbers).tobytes()


def test_what_a_killed_worker_left_half_written_waits_and_costs_no_other_value(tmp_path: Path) -> None:
    worker(Judge(), tmp_path).score("mine", table(["a", "bb", "ccc"]))
    [file] = tmp_path.rglob("*.jsonl")
    whole = file.read_bytes()
    file.write_bytes(whole[:-4])
    judge = Judge()
    other = worker(judge, tmp_path)
    assert other.score("mine", table(["a", "bb"])).values == [1 / 7, 2 / 7]
    assert judge.asked == []
    # The writer was only slow: the rest of the line comes, and a whole one behind it.
    file.write_bytes(whole)
    assert other.score("mine", table(["ccc"])).values == [3 / 7]
    assert judge.asked == []
    # Storage may also lose a part in the middle.
    lines = whole.splitlines()
    file.write_bytes(b"\n".join([lines[0], bytes(len(lines[1])), b"{}", b'["00", "text"]', lines[2], b""]))
    last = Judge()
    assert worker(last, tmp_path).score("mine", table(["a", "bb", "ccc"])).values == [1 / 7, 2 / 7, 3 / 7]
    assert last.asked == ["bb"]


@pytest.mark.parametrize(
    "other",
    [
        table(["a"], ["another prompt"], reference=["r"]),
        table(["a"], reference=["another reference"]),
        table(["a"], reference=[None]),
        table(["a "], reference=["r"]),
        mark_conversational(table(["a"], ['[{"role": "user", "content": "?"}]'], reference=["r"])),
    ],
)
def test_another_prompt_completion_or_column_is_another_row(tmp_path: Path, other: pa.Table) -> None:
    calls = []

    def mine(completions: list[Any], prompts: list[Any], reference: list[Any]) -> list[float]:
        calls.append(len(completions))
        return [0.0] * len(completions)

    same = table(["a"], reference=["r"], other=["not read"], completion_ids=[[3]])
    asked = worker(mine, tmp_path)
    for given in (table(["a"], reference=["r"], other=["x"]), same, other, other):
        asked.score("mine", given)
    assert calls == [1, 1]


def test_with_any_columns_a_row_is_all_that_may_be_read(tmp_path: Path) -> None:
    def mine(completions: list[str], **columns: Any) -> list[float]:
        return [float(len(ids)) + value for ids, value in zip(columns["completion_ids"], columns["value"], strict=True)]

    given = table(["a", "a", "a", "a"], completion_ids=[[1], [1, 2], [1], [1]], value=[0, 0, 10, 0])
    scores = worker(mine, tmp_path).score("mine", given)
    assert (scores.values, shares(scores)) == ([1, 2, 11, 1], 1 / 4)


def test_other_arguments_and_other_code_are_asked_again(tmp_path: Path) -> None:
    judges = [Judge() for _ in range(4)]

    def mine(judge: Judge) -> Any:
        def scored(completions: list[str], *, limit: int = 0) -> list[float | None]:
            return judge(completions)

        return scored

    given = table(["a"])
    worker(mine(judges[0]), tmp_path, args={"limit": 1}).score("mine", given)
    worker(mine(judges[1]), tmp_path, args={"limit": 2}).score("mine", given)
    worker(mine(judges[2]), tmp_path, args={"limit": 1}, code="another digest").score("mine", given)
    worker(mine(judges[3]), tmp_path, args={"limit": 1}, timeout_s=9, scale=2).score("mine", given)
    assert [judge.asked for judge in judges] == [["a"], ["a"], ["a"], []]


def test_folders_are_of_components_that_ask_for_one_and_whose_code_is_known(tmp_path: Path) -> None:
    cached = ComponentConfig(use="chrf", cache=True)
    components = {"../a b/" + "é" * 300: cached, "without": ComponentConfig(use="chrf"), "unknown": cached}
    folders = cache_folders(tmp_path / "scores", components, dict.fromkeys(components, "code") | {"unknown": ""})
    [folder] = folders.values()
    assert folder.parent == tmp_path / "scores"
    folder.mkdir(parents=True)  # a name that a disk takes


# Failures.


def test_failures_are_asked_again_and_told_of_every_equal_row(tmp_path: Path) -> None:
    judge = Judge()
    asked = worker(judge, tmp_path)
    scores = asked.score("mine", table(["raise", "a", "raise", "nan"]))
    assert scores.status == ["error", "ok", "error", "error"]
    assert scores.values == [None, 1 / 7, None, None]
    assert scores.errors == ["ValueError: no answer", "returned the value nan"]
    assert scores.retried == {}
    judge.asked, judge.mended = [], True
    assert worker(judge, tmp_path).score("mine", table(["a", "raise"])).values == [1 / 7, 5 / 7]
    assert judge.asked == ["raise"]


def test_rows_that_succeed_when_they_are_tried_again_are_told_by_their_own_places(tmp_path: Path) -> None:
    def mine(completions: list[str]) -> list[float]:
        if len(completions) > 1:
            raise ValueError("one at a time")
        return [float(len(completions[0]))]

    asked = worker(mine, tmp_path)
    asked.score("mine", table(["known"]))
    scores = asked.score("mine", table(["a", "known", "bb", "a"]))
    assert scores.values == [1, 5, 2, 1]
    assert scores.retried == {0: "error", 2: "error", 3: "error"}
    assert scores.errors == ["ValueError: one at a time"]


def test_where_nothing_can_be_written_values_are_kept_in_memory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "scores").touch()  # a file, so no folder can be made in it
    judge = Judge()
    asked = worker(judge, tmp_path / "scores")
    for completions in (["a", "bb"], ["a", "ccc"]):
        asked.score("mine", table(completions))
    assert judge.asked == ["a", "bb", "ccc"]
    assert caplog.text.count("scores are no longer kept in") == 1


def test_a_disk_that_fills_up_ends_the_writing_and_not_the_scoring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "mine"
    component, judge = Component("mine", ComponentConfig(use="function:mine", cache=True), Judge()), Judge()
    cache = Cache(folder)
    cache.score(component, table(["a"]))
    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", _full)
        assert cache.score(component, table(["bb"])).values == [2 / 7]
    assert cache.score(component, table(["ccc"])).values == [3 / 7]
    assert "No space left" in caplog.text
    other = Component("mine", component.config, judge)
    assert Cache(folder).score(other, table(["a", "bb", "ccc"])).values == [1 / 7, 2 / 7, 3 / 7]
    assert judge.asked == ["bb", "ccc"]


def _full(*_: Any) -> Any:
    raise OSError(28, "No space left on device")


# Components that cannot have one.


@pytest.mark.parametrize("hook", ["trainer_state", "log_extra", "log_metric"])
def test_a_component_that_logs_or_knows_the_step_is_refused(tiny_run: Tiny, hook: str) -> None:
    namespace: dict[str, Any] = {}
    exec(f"def mine(completions, {hook}, **columns): return [0.0] * len(completions)", namespace)
    components = {"mine": {"use": "function:mine", "cache": True}}
    with pytest.raises(UserError, match=rf"component 'mine' takes {hook}, .*leave out its `cache`"):
        make_plan(tiny_run.config(rewards={"components": components}), {"mine": namespace["mine"]})


def test_nothing_that_changes_with_the_step_is_passed_among_any_columns() -> None:
    def mine(completions: list[str], **columns: Any) -> list[float]:
        return [float(len(columns.keys() & {"trainer_state", "log_extra", "log_metric"}))]

    for cache, passed in ((True, 0), (False, 3)):
        component = Component("mine", ComponentConfig(use="function:mine", cache=cache), mine)
        assert component.score(table(["a"])).values == [passed]


# Runs and searches.


def noted(folder: Path, cache: bool) -> dict[str, Any]:
    """The section `rewards` of a run whose component notes what it is asked."""
    args = {"notes": str(folder / "notes")}
    length = {"args": {"mode": "target", "target": 3}, "scale": 0.2}
    return {"components": {"noted": {"use": "tiny_rewards:noted", "args": args, "cache": cache}, "length": length}}


def notes(folder: Path) -> Iterator[str]:
    """What was asked since the last look."""
    file = folder / "notes"
    lines = file.read_text().splitlines() if file.exists() else []
    file.unlink(missing_ok=True)
    return iter(lines)


def test_a_run_with_a_cache_is_the_run_without_one(tiny_run: Tiny, ray_session: None, tmp_path: Path) -> None:
    plain, cached = (tiny_run.config(rewards=noted(tmp_path, cache)) for cache in (False, True))
    tiny.train(plain, tmp_path / "plain")
    asked = list(notes(tmp_path))
    tiny.train(cached, tmp_path / "here")
    distinct = list(notes(tmp_path))
    assert len(distinct) == len(set(distinct)) < len(asked)
    assert set(distinct) == set(asked)

    actors = {
        "num_rollout_workers": 1, "num_cpus_per_rollout_worker": 0.4,
        "num_reward_workers": 2, "num_cpus_per_reward_worker": 0.4,
    }  # fmt: skip
    tiny.train(tiny_run.config(rewards=noted(tmp_path, True), resources=actors), tmp_path / "actors")
    assert set(notes(tmp_path)) == set(asked)
    for run in ("here", "actors"):
        tiny.assert_same_run(tmp_path / run, tmp_path / "plain")
    lines = read_jsonl(tmp_path / "here" / "metrics.jsonl")
    assert all(0 <= line["reward/noted/extra/cached"] <= 1 for line in lines)
    assert any(line["reward/noted/extra/cached"] > 0 for line in lines)

    # Switched on or off where a run goes on: nobody is asked again who was asked there.
    more = tiny_run.config(rewards=noted(tmp_path, False), trainer={"steps": 7})
    tiny.train(more, tmp_path / "here", resume=True)
    list(notes(tmp_path))
    more = tiny_run.config(rewards=noted(tmp_path, True), trainer={"steps": 8})
    tiny.train(more, tmp_path / "here", resume=True)
    assert not set(notes(tmp_path)) & set(distinct)


def test_trials_of_a_search_share_their_values(tiny_run: Tiny, tmp_path: Path) -> None:
    run = {"rewards": noted(tmp_path, True), "evaluation": {"utility": {"noted": 1, "length": 1}}}
    space = {"rewards.weights": {"simplex": ["noted", "length"]}}
    common = shared(search(tiny_run, run, space=space), tmp_path / "search")
    assert list(notes(tmp_path)) != []
    slot, told = Slot(common), []
    for name in ("a", "b"):  # with the same weights, so the second has nothing to ask
        point = {"rewards.weights": {"noted": 0.5, "length": 0.5}}
        told.append(json.loads(slot.advance({"name": name, "role": "trial", "point": point})[REPORT])["utility"])
        assert (list(notes(tmp_path)) == []) == (name == "b")
    slot.close()
    assert told[0] == told[1]
    assert [folder.name.split("-")[0] for folder in (common.path / SCORES).iterdir()] == ["noted"]
    assert not any((common.path / TRIALS / name / SCORES).exists() for name in ("a", "b"))
    assert not (common.path / BASE / SCORES).exists()


def test_a_search_may_be_resumed_with_another_cache_and_with_nothing_that_is_only_called_so(
    tiny_run: Tiny, tmp_path: Path
) -> None:
    def searched(cache: bool, **args: Any) -> Any:
        metric = {"use": "tiny_rewards:moody", "args": {"folder": "here", **args}, "cache": cache}
        return search(tiny_run, {"evaluation": {"metrics": {"moody": metric}, "utility": {"match": 1}}})

    before, after = searched(False), searched(True)
    planned = plan_search(before, {})
    (tmp_path / SEARCH).write_text(write_yaml(resolved(before, *planned)))
    find_search(after, *plan_search(after, {}), tmp_path, resume=True)
    assert measures(planned[1].config) == measures(plan_search(after, {})[1].config)

    raw = resolved(before, *planned)
    raw["run"]["evaluation"]["metrics"]["moody"]["args"]["cache"] = "its own"
    (tmp_path / SEARCH).write_text(write_yaml(raw))
    with pytest.raises(UserError, match=r"run\.evaluation\.metrics\.moody\.args\.cache: its own -> None"):
        find_search(before, *planned, tmp_path, resume=True)


def test_code_of_a_component_given_in_python_decides_its_folder(tiny_run: Tiny, tmp_path: Path) -> None:
    config = tiny_run.config(rewards={"components": {"mine": {"use": "function:mine", "cache": True}}})

    def one(completions: list[str]) -> list[float]:
        return [1.0] * len(completions)

    def two(completions: list[str]) -> list[float]:
        return [2.0] * len(completions)

    task = make_plan(config, {"mine": one}).task
    codes = [origin_of(config, task, {"mine": fn}).code for fn in (one, two, one)]
    folders = [cache_folders(tmp_path, config.measured, code)["mine"] for code in codes]
    assert folders[0] == folders[2] != folders[1]
