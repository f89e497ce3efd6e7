"""The course of a search: whatever the order of reports and wherever it is cut, the same decisions."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_trials import SIMPLEX, course_of, decisions, drive, in_order_of, make_search, next_report

from rl_llm.errors import UserError
from rl_llm.runs.jsonl import read_jsonl
from rl_llm.search.course import Report
from rl_llm.search.ledger import Ledger
from rl_llm.search.plan import make_course, make_space
from rl_llm.values import to_json

LR = {"learner.lr": {"loguniform": [1e-5, 1e-3]}}
SEARCHES: dict[str, dict[str, Any]] = {
    "halving": {},
    "brackets of optuna": {"searcher": "optuna", "trials": 9, "controls": False, "finalists": 0},
    "asha": {"scheduler": "asha", "controls": False},
    "population": {"scheduler": "pbt", "space": {**SIMPLEX, **LR}, "controls": False, "finalists": 0},
    "grid": {"searcher": "grid", "space": {"learner.lr": {"grid": [1e-4, 1e-3]}}, "trials": 2, "scheduler": "none"},
    "tokens": {"tokens": 900, "controls": False},
}


@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_cut_after_any_line_ends_as_the_unbroken_one(name: str) -> None:
    search = make_search(**SEARCHES[name])
    space = make_space(search)
    whole = drive(search, course_of(search, space=space)).ledger.lines
    for cut in range(len(whole)):
        # After each line the next ones are the same; that the end is, follows, and is seen of some.
        again = drive(search, course_of(search, whole[:cut], space), reports=1000 if cut % 20 == 5 else 1)
        assert again.ledger.lines == whole[: len(again.ledger.lines)]
        assert len(again.ledger.lines) > cut
        assert again.over == (again.ledger.lines == whole)


@pytest.mark.parametrize("name", ["halving", "brackets of optuna", "population"])
def test_the_order_of_reports_changes_no_decision(name: str) -> None:
    search = make_search(**SEARCHES[name])
    space = make_space(search)
    expected = decisions(drive(search, course_of(search, space=space)))
    for order in range(8):
        course = drive(search, course_of(search, space=space), in_order_of(np.random.default_rng(order)))
        assert decisions(course) == expected


def test_a_course_goes_on_from_its_file(tmp_path: Path) -> None:
    search = make_search(controls=False)
    whole = drive(search, course_of(search)).ledger.lines
    path = tmp_path / "decisions.jsonl"
    path.write_text("".join(to_json(line) + "\n" for line in whole[:20]) + '{"report": "t0')
    course = make_course(search, make_space(search), [], Ledger(path))
    assert len(path.read_text().splitlines()) == 20  # what a kill cut short was not acted on
    drive(search, course)
    assert read_jsonl(path) == whole
    path.write_text("{\n{}\n")
    with pytest.raises(UserError, match=r"decisions\.jsonl:1: not valid JSON"):
        Ledger(path)


def test_a_line_is_on_disk_before_it_counts(tmp_path: Path) -> None:
    search = make_search(controls=False)
    course = make_course(search, make_space(search), [], Ledger(tmp_path / "decisions.jsonl"))
    asked = [line["ask"] for line in read_jsonl(tmp_path / "decisions.jsonl")]
    assert asked == list(course.entries)


def failed(report: Report) -> Report:
    return dataclasses.replace(report, failed="reward chrf failed")


def without_value(report: Report) -> Report:
    return dataclasses.replace(report, utility=[None] * len(report.utility))


def not_a_number(report: Report) -> Report:
    return dataclasses.replace(report, utility=[float("nan")] * len(report.utility))


@pytest.mark.parametrize("scheduler", ["halving", "asha", "pbt", "none"])
@pytest.mark.parametrize(
    ("change", "reason"),
    [(failed, "reward chrf failed"), (without_value, "no utility at step 1"), (not_a_number, "no utility at step 1")],
)
def test_a_trial_that_fails_holds_nobody_up(scheduler: str, change: Any, reason: str) -> None:
    search = make_search(scheduler=scheduler, controls=False)
    course = drive(search, course_of(search), changes={"t02": change})
    broken = course.entries["t02"]
    assert broken.state == "failed"
    assert reason in broken.reason
    assert len(broken.reports) == 1
    assert course.finalists
    assert "t02" not in course.finalists
    assert all(entry.told for entry in course.of("trial"))


def test_a_trial_that_crashes_is_tried_again_and_then_has_failed() -> None:
    search = make_search(controls=False)
    course = course_of(search)
    course.fail("t01", "worker died", again=True)
    assert course.entries["t01"].state == "going"
    course.fail("t01", "worker died again", again=False)
    drive(search, course)
    assert (course.entries["t01"].state, course.entries["t01"].reason) == ("failed", "worker died again")
    assert course.entries["t01"].failures == 2
    again = course_of(search, course.ledger.lines)
    assert again.entries == course.entries


def test_all_trials_may_fail() -> None:
    search = make_search(controls=False)
    course = drive(search, course_of(search), changes={f"t{i:02d}": failed for i in range(6)})
    assert course.over
    assert course.finalists == []


def test_what_a_killed_trial_repeats_counts_once() -> None:
    search = make_search(scheduler="none", controls=False)
    course = course_of(search)
    entry = course.entries["t00"]
    reports = []
    for _ in range(3):
        reports.append(next_report(search, entry))
        course.report("t00", reports[-1])
    course.report("t00", reports[1])
    assert [report.step for report in entry.reports] == [1, 2]
    course.report("t00", reports[2])
    assert entry.reports == reports


def test_a_trial_that_ends_by_itself_stands_with_its_best() -> None:
    def peaks_early(report: Report) -> Report:
        return dataclasses.replace(report, utility=[5.0] * len(report.utility), ended="stopped_early")

    search = make_search(controls=False)
    course = drive(search, course_of(search), changes={"t03": peaks_early})
    early = course.entries["t03"]
    assert (early.state, early.reason, len(early.reports)) == ("done", "stopped_early", 1)
    assert course.finalists == ["t03"]


def test_reward_up_and_utility_down_ends_a_trial() -> None:
    def course_with(utility: list[float], reward: list[float], span: int = 3) -> Any:
        search = make_search(scheduler="none", controls=False, overoptimized=span)
        course = course_of(search)
        for step, (value, mean) in enumerate(zip(utility, reward, strict=True), start=1):
            prompts = [value + 0.01 * i for i in range(16)]
            course.report("t00", Report(step, step, 1.0, prompts, {}, [mean - 0.1, mean, mean + 0.1]))
        return course.entries["t00"]

    falling, rising = [0.5, 0.9, 0.6, 0.4], [1.0, 2.0, 3.0, 4.0]
    hacked = course_with(falling, rising)
    assert (hacked.state, hacked.reason) == ("done", "its reward rose while its utility fell")
    assert hacked.best.step == 2  # what it is worth is its best evaluation
    assert course_with(falling[:3], rising[:3]).state == "going"  # not over three evaluations yet
    assert course_with(falling, rising[::-1]).state == "going"  # both fell
    assert course_with(falling[::-1], rising).state == "going"  # both rose
    assert course_with(falling, [1.0] * 4).state == "going"  # within its noise
    assert course_with(falling, rising, span=0).state == "going"


def test_after_an_exploit_only_reports_of_the_new_point_count() -> None:
    search = make_search(**SEARCHES["population"])
    course = course_of(search)
    while not any(entry.donor for entry in course.entries.values()):
        entry = course.going[0]
        course.report(entry.name, next_report(search, entry))
    [taken] = [entry for entry in course.entries.values() if entry.donor]
    donor, step = taken.donor or ("", 0)
    assert taken.best is None
    assert course.going[0] is taken  # before its donor saves again
    assert [report.step for report in taken.reports] == [1] == [step]
    assert donor in course.entries
    report = next_report(search, taken)
    assert report.step == step + 1
    course.report(taken.name, report)
    assert taken.donor is None
    assert taken.own == [report]
    for entry in drive(search, course).of("trial"):
        assert sum(entry.point["rewards.weights"].values()) == pytest.approx(1)


def test_brackets_of_optuna_are_told_before_the_next_is_asked() -> None:
    search = make_search(searcher="optuna", trials=12, finalists=2, seeds=2)
    course = drive(search, course_of(search), in_order_of(np.random.default_rng(5)))
    trials = [line for line in course.ledger.lines if re.match(r"t\d", str(line.get("ask", line.get("tell", ""))))]
    kinds = ["ask" if "ask" in line else "tell" for line in trials]
    assert kinds == (["ask"] * 4 + ["tell"] * 4) * 3
    assert [course.entries[line["ask"]].bracket for line in trials if "ask" in line] == [0] * 4 + [1] * 4 + [2] * 4
    states = [entry.state for entry in course.of("trial")]
    assert states.count("done") >= 3
    assert set(states) == {"done", "stopped"}


def test_asha_with_one_slot_runs_whatever_comes_in_rising_order() -> None:
    search = make_search(scheduler="asha", controls=False, finalists=0, trials=3)

    def worth(value: float) -> Any:
        return lambda report: dataclasses.replace(report, utility=[value] * len(report.utility))

    def states(values: list[float]) -> list[str]:
        changes = {f"t{i:02d}": worth(value) for i, value in enumerate(values)}
        return [entry.state for entry in drive(search, course_of(search), changes=changes).of("trial")]

    assert states([0.1, 0.2, 0.3]) == ["done", "done", "done"]
    assert states([0.3, 0.2, 0.1]) == ["done", "stopped", "stopped"]


def test_asha_compares_with_trials_as_they_were_at_the_level() -> None:
    search = make_search(scheduler="asha", searcher="optuna", controls=False, finalists=0, trials=5)
    course = course_of(search)

    def grows(report: Report) -> Report:
        return dataclasses.replace(report, utility=[float(report.step)] * len(report.utility))

    drive(search, course, changes=dict.fromkeys(("t00", "t01", "t02", "t03", "t04"), grows))
    # All have the same at each level, the fifth in a bracket of its own too, and nobody is below a third of equals.
    assert [entry.state for entry in course.of("trial")] == ["done"] * 5


def test_the_best_are_run_again_on_fresh_seeds() -> None:
    search = make_search(scheduler="none", finalists=2, seeds=2, run={"trainer": {"steps": 9, "seed": 7}})
    course = drive(search, course_of(search))
    ranked = sorted(course.of("trial"), key=lambda entry: -float(entry.utility.mean()))
    best = [entry.name for entry in ranked[:2]]
    assert course.finalists == best
    finalists = [(entry.name, entry.seed, entry.point) for entry in course.of("finalist")]
    points = {name: course.entries[name].point for name in best}
    assert finalists == [(f"final-{name}-s{seed}", seed, points[name]) for seed in (8, 9) for name in best]


def test_where_halving_leaves_one_trial_the_next_finalists_are_those_that_came_furthest() -> None:
    search = make_search(trials=8, finalists=3, controls=False)
    course = drive(search, course_of(search))
    first, *others = [course.entries[name] for name in course.finalists or []]
    assert (first.state, [entry.state for entry in others]) == ("done", ["stopped", "stopped"])
    furthest = max(len(entry.stood) for entry in course.of("trial") if entry.state == "stopped")
    rivals = [entry for entry in course.of("trial") if entry.state == "stopped" and len(entry.stood) == furthest]
    assert others == sorted(rivals, key=lambda entry: -float(entry.utility.mean()))[:2]


def test_the_search_goes_before_its_result_and_that_before_its_controls() -> None:
    search = make_search(finalists=1, seeds=1)
    ended: list[str] = []
    course = course_of(search)
    while course.going:
        entry = course.going[0]
        course.report(entry.name, next_report(search, entry))
        if entry.state == "done":
            ended.append(entry.role)
    roles = list(dict.fromkeys(ended))
    assert roles == ["trial", "finalist", "control", "soup"]
    assert ended.count("soup") == 7
    assert list(course.entries)[:4] == ["equal-s1", "single-chrf", "single-length", "single-vocab"]


def test_soups_are_of_the_singles_that_came_to_their_end() -> None:
    search = make_search(finalists=0, scheduler="none", trials=1)
    course = drive(search, course_of(search), changes={"single-length": failed})
    assert [(entry.name, entry.point) for entry in course.of("soup")] == [
        ("soup-00", {"single-chrf": 0.75, "single-vocab": 0.25}),
        ("soup-01", {"single-chrf": 0.5, "single-vocab": 0.5}),
        ("soup-02", {"single-chrf": 0.25, "single-vocab": 0.75}),
    ]


def test_without_a_utility_nobody_is_chosen() -> None:
    search = make_search(utility=None, scheduler="none", finalists=0, controls=False)
    course = drive(search, course_of(search), changes={"t00": lambda report: dataclasses.replace(report, utility=[])})
    assert {entry.state for entry in course.of("trial")} == {"done"}
    assert course.finalists == []


def test_trials_whose_steps_are_over_before_their_tokens_stand_at_every_level() -> None:
    """Of 9 steps at 100 to 150 tokens each, the first ninth is 1000 tokens, the first third is 3000."""
    search = make_search(tokens=9000, controls=False, finalists=0)
    course = drive(search, course_of(search))
    states = [entry.state for entry in course.of("trial")]
    assert set(states) == {"done", "stopped"}
    assert all(entry.reports[-1].step == 9 for entry in course.of("trial") if entry.state == "done")


def test_a_budget_in_tokens_ends_trials_by_what_they_generate() -> None:
    search = make_search(tokens=500, scheduler="none", controls=False, finalists=0)
    for entry in drive(search, course_of(search)).of("trial"):
        price = entry.reports[-1].tokens / entry.reports[-1].step
        assert 500 <= entry.reports[-1].tokens < 500 + price
