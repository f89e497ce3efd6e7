import io
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from search_factory import STEPS, TEST, TOKENS_A_STEP, make_search, search_config, write_evaluation

import rl_llm
from rl_llm.errors import UserError
from rl_llm.runs.jsonl import read_jsonl
from rl_llm.search.compare import RESAMPLES, holm, over_seeds, p_value, paired
from rl_llm.search.search import Search, load_search
from rl_llm.search.wording import decision_lines, point_text
from rl_llm.values import to_json


def test_holm_corrects_step_by_step() -> None:
    # Sorted: 0.01 x 3, 0.03 x 2, then 0.04 x 1, which may not be below the one before.
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_a_difference_that_every_resample_sees_has_the_least_p_there_is() -> None:
    ours, theirs = np.full((2, 20), 1.0), np.zeros((3, 20))
    assert p_value(ours, theirs) == pytest.approx(2 / (RESAMPLES + 1))
    assert p_value(theirs, theirs) == 1.0
    assert np.isnan(p_value(np.full(3, np.nan), np.zeros(3)))


def test_p_agrees_with_the_interval() -> None:
    generator = np.random.default_rng(0)
    for shift in (0.0, 0.3, 0.6):
        ours, theirs = generator.normal(shift, 1, size=(2, 40)), generator.normal(0, 1, size=(2, 40))
        _, low, high = paired(ours, theirs)
        assert (p_value(ours, theirs) < 0.05) == (low > 0 or high < 0)


def test_an_interval_over_seeds_is_wider_than_that_of_their_mean() -> None:
    prompts = np.random.default_rng(1).normal(0, 0.1, size=30)
    apart = np.stack([prompts - 1, prompts + 1])
    mean, low, high = over_seeds(apart)
    alone = over_seeds(apart.mean(axis=0))
    assert mean == pytest.approx(prompts.mean())
    assert high - low > 5 * (alone[2] - alone[1])


def test_the_finalist_is_compared_with_equal_weights_on_the_test_split(finished_search: Path) -> None:
    search = load_search(finished_search)
    table = search.table()
    first = table.tested[0]
    assert (first.role, first.seeds, table.control) == ("finalist", 2, "equal")
    ours = [search.run(f"final-{first.policy}-s{seed}").evaluated("after")["utility"].to_numpy() for seed in (1, 2)]
    theirs = [search.run(f"equal-s{seed}").evaluated("after")["utility"].to_numpy() for seed in (1, 2)]
    assert first.over is not None
    assert first.over["mean"] == pytest.approx(np.mean(ours) - np.mean(theirs))
    assert first.beats
    assert len(ours[0]) == TEST
    titles = [one.title for one in table.tested]
    assert set(titles[:2]) == set(search.course.finalists or [])
    assert titles[2:] == ["equal weights", "chrf alone", "length alone", "facts alone", "base policy"]


def test_the_answer_is_a_sentence_with_its_numbers(finished_search: Path) -> None:
    search = Search(finished_search)
    best, over = search.table().tested[0], search.table().tested[0].over
    assert over is not None
    said = f"trial {best.policy} ({point_text(best.point)}) beat equal weights by {over['mean']:.3f} ["
    assert search.headline.startswith(said)
    assert "in test utility (2 seeds, p 0.00" in search.headline


def test_the_table_fits_a_terminal_and_a_notebook(finished_search: Path) -> None:
    table = Search(finished_search).table()
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(table)
    shown = console.export_text()
    assert re.search(r"\d\.\d{3}, p 0\.00\d", shown)
    assert "0.333" in shown
    lines = str(table).splitlines()
    assert lines[0].split()[:4] == ["policy", "point", "seeds", "utility"]
    assert "over equal weights" in lines[0]
    assert "equal weights" in table._repr_html_()


def test_the_best_finalist_is_chosen_on_the_tune_split(tmp_path: Path, finished_search: Path) -> None:
    path = shutil.copytree(finished_search, tmp_path / "search")
    before = Search(path).best
    for run in before.runs:  # however bad its tests are
        write_evaluation(run.path, "after", "test", STEPS, {"utility": np.full(TEST, -9.0), "chrf": np.zeros(TEST)})
    search = Search(path)
    assert search.best.trial == before.trial
    utilities = [search.course.entries[run.path.name].utility.mean() for run in search.best.runs]
    assert utilities == sorted(utilities, reverse=True)
    assert search.model == search.best.runs[0].path / "model"
    assert "is below equal weights" in search.headline


def test_what_cannot_be_told_apart_is_not_called_better(tmp_path: Path) -> None:
    search = Search(make_search(tmp_path / "search", gain=lambda weights: {"chrf": 0.1}, trials=3))
    assert not any(one.beats for one in search.table().tested)
    assert "cannot be told from equal weights" in search.headline


def test_cost_is_told_against_running_every_trial_to_the_end(finished_search: Path) -> None:
    search = Search(finished_search)
    last = [entry.reports[-1] for entry in search.course.of("trial") if entry.reports]
    assert search.cost.trials == (sum(r.tokens for r in last), pytest.approx(sum(r.seconds for r in last)))
    # One trial failed before it told anything, and would have cost what the others do.
    assert search.cost.whole == (9 * STEPS * TOKENS_A_STEP, pytest.approx(9 * STEPS * 1.5))
    assert search.cost.finalists[0] == 2 * 2 * STEPS * TOKENS_A_STEP
    assert search.cost.controls[0] == (5 + 7) * STEPS * TOKENS_A_STEP  # seven soups beside
    share = sum(r.tokens for r in last) / (9 * STEPS * TOKENS_A_STEP)
    assert f"({share:.0%})" in str(search.cost)


def test_the_whole_of_a_trial_ends_with_its_steps_or_its_tokens_whichever_come_first(tmp_path: Path) -> None:
    """Evaluations come every 4 steps: the first past 10 000 tokens is after 12 of the 18 steps."""
    run = search_config().run
    run["evaluation"]["every"] = 4
    for tokens, steps in ((10_000, 12), (60_000, STEPS)):
        plain = {"run": run, "tokens": tokens, "scheduler": "none", "finalists": 0, "controls": False}
        whole = Search(make_search(tmp_path / f"{tokens}", **plain))
        assert {entry.reports[-1].step for entry in whole.course.of("trial")} == {steps}
        assert whole.cost.whole[0] == 9 * steps * TOKENS_A_STEP
        cut = Search(make_search(tmp_path / f"{tokens} cut", reports=2, **plain))
        assert cut.cost.whole[0] == 9 * min(tokens, STEPS * TOKENS_A_STEP)


def test_reading_a_search_needs_no_torch(finished_search: Path, tmp_path: Path) -> None:
    shutil.copytree(finished_search, tmp_path / "search")
    read = "found = rl_llm.load_search(sys.argv[1]); found.table(); found.best; found.trials; found.report()"
    code = f"import sys, rl_llm; {read}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code, tmp_path / "search"], timeout=120).returncode == 0


def test_trials_are_a_table_with_a_row_a_trial(finished_search: Path) -> None:
    search = Search(finished_search)
    search.report()
    frame = pd.read_parquet(finished_search / "trials.parquet").set_index("name")
    assert set(frame.index) == set(search.course.entries)
    failed = frame.loc["t04"]
    assert (failed["state"], failed["reason"]) == ("failed", "it crashed: <b>no room</b>")
    best = frame.loc[search.best.runs[0].path.name]
    assert best["test/utility"] == pytest.approx(search.run(best.name).evaluated("after")["utility"].to_numpy().mean())
    assert best["tune/utility/low"] < best["tune/utility"] < best["tune/utility/high"]
    assert frame.loc["t00", "point/rewards.weights.chrf"] == pytest.approx(1 / 3)
    assert frame.loc["t05", "point/learner.lr"] > 0


def test_a_killed_search_reads_up_to_its_last_decision(tmp_path: Path) -> None:
    path = make_search(tmp_path / "search", reports=20)
    with (path / "decisions.jsonl").open("a") as file:
        file.write('{"report": "t0')
    before = (path / "decisions.jsonl").read_bytes()
    search = Search(path)
    assert search.status == "running or killed"
    assert "no finalist has been tested yet" in search.headline
    with pytest.raises(UserError, match="no finalist has finished yet"):
        _ = search.best
    assert search.report().is_file()
    assert (path / "decisions.jsonl").read_bytes() == before


def test_reading_decides_nothing(tmp_path: Path) -> None:
    path = make_search(tmp_path / "search", reports=9)
    states = {name: entry.state for name, entry in Search(path).course.entries.items()}
    lines = read_jsonl(path / "decisions.jsonl")
    while "report" not in lines[-1]:
        lines.pop()  # killed between a report and what follows from it
    (path / "decisions.jsonl").write_text("".join(f"{to_json(line)}\n" for line in lines))
    assert len(Search(path).decisions) == len(lines)
    assert [entry.state for entry in Search(path).course.of("trial")].count("waiting") == 9
    assert "stopped" in states.values()


def test_a_search_without_a_utility_is_unranked(tmp_path: Path) -> None:
    path = make_search(tmp_path / "search", utility=None, scheduler="none", finalists=0, trials=3, controls=False)
    search = Search(path)
    assert "nothing is ranked" in search.headline
    with pytest.raises(UserError, match="without a utility nothing is the best"):
        _ = search.best
    assert set(search.front.metrics) == {"chrf", "length", "facts"}
    assert search.front.points
    assert "utility" not in search.table().metrics
    assert search.report().is_file()


def test_a_folder_without_a_search_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no search directory.*search\.yaml"):
        rl_llm.load_search(tmp_path)


def test_decisions_read_as_sentences() -> None:
    asked = {
        "ask": "t03",
        "role": "trial",
        "point": {"rewards.weights": {"chrf": 0.25}},
        "seed": None,
        "source": "equal",
    }
    assert decision_lines(asked) == ["t03 (equal): chrf 0.25"]
    verdict = {"action": "stop", "reason": "below: it", "donor": None, "point": None, "difference": [-0.1, -0.2, -0.05]}
    moved = {**verdict, "action": "exploit", "reason": "", "donor": "t01", "point": {"learner.lr": 1e-4}}
    lines = decision_lines({"level": 0, "bracket": 0, "slack": 0, "verdicts": {"t00": verdict, "t02": moved}})
    assert lines == ["t00: stopped, below: it", "t02: goes on as t01 with lr 0.0001"]
    assert decision_lines({"fail": "t02", "reason": "hangs", "again": True}) == ["t02 failed, tried again: hangs"]
    assert decision_lines({"finalists": ["t02"]}) == ["finalists: t02"]
    assert decision_lines({"tell": "t02", "state": "done", "metrics": {}}) == []
