import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Tiny
from safetensors.torch import load_file
from search_factory import make_search, search_config

from rl_llm.runs import checkpoint
from rl_llm.search.course import Course, Report
from rl_llm.search.export import export_model, export_models, weights_of
from rl_llm.search.following import Endings
from rl_llm.search.front import Candidate, candidates, directions, in_conflict, make_front, objectives
from rl_llm.search.ledger import DECISIONS, Ledger
from rl_llm.search.plan import make_course, make_space
from rl_llm.search.report.charts import coordinates
from rl_llm.search.search import Search

BASE = {"x": np.array([-1.0, 1.0, -1.0, 1.0]), "y": np.array([2.0, -2.0, 2.0, -2.0])}  # spreads 1 and 2


def at(name: str, x: float, y: float, **more: np.ndarray) -> Candidate:
    """A policy that is above the base by as much on every prompt."""
    return Candidate(name, "trial", {}, name, 9, {"x": BASE["x"] + x, "y": BASE["y"] + y, **more}, None)


def names(found: list[Candidate]) -> list[str]:
    return [one.name for one in found]


def test_the_front_is_what_nothing_is_better_than() -> None:
    found = [at("a", 3, 2), at("b", 1, 4), at("c", 1, 2), at("d", 3, 1.9), at("again", 1, 4)]
    front = make_front(found, BASE, {"x": 1, "y": 1})
    assert names(front.points) == ["a", "b", "again"]
    assert set(names(front.behind)) == {"c", "d"}


def test_lower_is_better_where_the_sign_says_so() -> None:
    found = [at("a", 3, -2), at("b", 1, -4), at("c", 1, 5)]
    assert names(make_front(found, BASE, {"x": 1, "y": -1}).points) == ["a", "b"]
    assert names(make_front(found, BASE, {"x": 1, "y": 1}).points) == ["a", "c"]


def test_the_hypervolume_is_worked_out_by_hand() -> None:
    # In spreads: (3, 1) and (1, 2) over (0, 0), 3 x 1 and 1 x 1 more; the same in every resample of prompts.
    found = [at("a", 3, 2), at("b", 1, 4), at("worse", -1, 9)]
    volume = make_front(found, BASE, {"x": 1, "y": 1}).hypervolume
    assert [volume[key] for key in ("mean", "low", "high")] == pytest.approx([4.0, 4.0, 4.0])
    assert make_front([at("worse", -1, 9)], BASE, {"x": 1, "y": 1}).hypervolume["mean"] == 0.0
    assert make_front([], BASE, {"x": 1, "y": 1}).hypervolume["mean"] is None


def test_the_hypervolume_is_as_sure_as_the_prompts_make_it() -> None:
    generator = np.random.default_rng(0)
    base = {name: generator.normal(size=200) for name in ("x", "y")}
    noisy = Candidate("a", "trial", {}, "a", 1, {name: generator.normal(1, 1, size=200) for name in base}, None)
    volume = make_front([noisy], base, {"x": 1, "y": 1}).hypervolume
    low, mean, high = (float(volume[key] or 0.0) for key in ("low", "mean", "high"))
    assert 0.5 < low < mean < high < 1.6


def test_a_candidate_without_a_value_is_not_on_the_front_of_that_metric() -> None:
    gone = Candidate("gone", "trial", {}, "gone", 1, {"x": BASE["x"] + 9, "y": np.full(4, np.nan)}, None)
    assert names(make_front([gone, at("a", 1, 1)], BASE, {"x": 1, "y": 1}).points) == ["a"]
    assert names(make_front([gone, at("a", 1, 1)], BASE, {"x": 1}).points) == ["gone"]


def test_the_metrics_in_conflict_are_those_that_oppose_each_other() -> None:
    base = {**BASE, "z": BASE["x"]}
    found = [at(str(k), k, -k, z=BASE["x"] + k * (-1) ** k) for k in range(5)]
    assert in_conflict(found, base, {"x": 1, "y": 1, "z": 1}) == ("x", "y")
    assert in_conflict(found, base, {"x": 1, "y": -1, "z": 1}) != ("x", "y")
    assert in_conflict(found, base, {"x": 1}) is None


def test_which_way_is_up_is_said_by_utility_objectives_and_mixture(tmp_path: Path) -> None:
    lowered = {"utility": {"chrf": 1.0, "length": -0.5}}
    search = Search(make_search(tmp_path / "utility", reports=1, **lowered))
    assert directions(search) == {"chrf": 1, "length": -1, "facts": 1}
    assert objectives(search) == {"chrf": 1, "length": -1}
    free = {"utility": None, "scheduler": "none", "finalists": 0, "searcher": "optuna", "controls": False}
    search = Search(make_search(tmp_path / "free", reports=1, objectives={"facts": "max", "tokens": "min"}, **free))
    assert objectives(search) == {"facts": 1, "tokens": -1}


def test_policies_of_every_role_are_candidates_at_their_best(finished_search: Path) -> None:
    search = Search(finished_search)
    found = {one.name: one for one in candidates(search)}
    assert {"soup-00", "equal-s1", "single-chrf", "t00"} <= set(found)
    assert {entry.name for entry in search.course.of("finalist")} <= set(found)
    stopped = next(entry for entry in search.course.of("trial") if entry.state == "stopped")
    assert found[stopped.name].step == stopped.reports[-1].step
    assert found[stopped.name].model is None
    assert found["single-chrf"].model == finished_search / "trials" / "single-chrf" / "model"


def gone_on(path: Path) -> Course:
    """The course of a search that was killed, as its next start has it."""
    config = search_config()
    return make_course(config, make_space(config), [], Ledger(path / DECISIONS))


def test_a_trial_that_failed_before_it_had_written_anything_is_in_nobodys_way(tmp_path: Path) -> None:
    path = make_search(tmp_path / "search", reports=4)
    course = gone_on(path)
    name = course.going[0].name
    course.report(name, Report(0, 0, 0.0, [], {}, failed="reward chrf takes no argument 'nothing'"))
    Endings().on_start(course, path)
    search = Search(path)
    assert [file.name for file in search.folder(name).iterdir()] == ["summary.json"]
    assert "takes no argument" in search.report().read_text()
    assert len(names(search.candidates)) == 4
    assert name not in names(search.candidates)
    assert search.trials.set_index("name").loc[name, "state"] == "failed"


def test_a_trial_that_failed_after_an_evaluation_is_in_no_comparison(tmp_path: Path) -> None:
    path = make_search(tmp_path / "search", reports=5)
    best = Search(path).front.points[0].name
    gone_on(path).fail(best, "its process has ended", again=False)
    search = Search(path)
    assert best not in names([*search.candidates, *search.front.points])
    assert len(names(search.candidates)) == 4
    chart = coordinates(search)
    assert chart is not None
    assert len(chart.data[0]["dimensions"][0]["values"]) == 4


def test_a_control_that_failed_when_it_was_tested_is_in_no_table(finished_search: Path, tmp_path: Path) -> None:
    path = shutil.copytree(finished_search, tmp_path / "search")
    assert "chrf alone" in str(Search(path).table())
    gone_on(path).fail("single-chrf", "disk full", again=False)
    assert "chrf alone" not in str(Search(path).table())


def test_a_model_is_exported_from_the_weights_of_a_run(tiny_run: Tiny, tmp_path: Path) -> None:
    run = tiny_run.undisturbed
    best = max(checkpoint.by_step(run / "checkpoints"))
    weights = weights_of(run, best)
    assert weights is not None
    export_model(tiny_run.config(), str(tiny_run.policy), weights, tmp_path / "model")
    saved, kept = load_file(tmp_path / "model" / "model.safetensors"), load_file(weights)
    assert all(torch.equal(saved[name], kept[name]) for name in saved)
    assert weights_of(run, 999) is None


def test_every_point_of_the_front_gets_its_model(tiny_run: Tiny, finished_search: Path, tmp_path: Path) -> None:
    path = shutil.copytree(finished_search, tmp_path / "search")
    search, folder = Search(path), path / "trials" / "t00"
    shutil.rmtree(folder)
    shutil.copytree(tiny_run.undisturbed, folder, ignore=shutil.ignore_patterns("model"))
    kept = max(checkpoint.by_step(folder / "checkpoints"))
    points = [Candidate("t00", "trial", {}, "t00", step, {}, None) for step in (999, kept)]
    said: list[str] = []
    export_models(search, points, str(tiny_run.policy), said.append)
    assert said == ["t00: its weights of step 999 are gone, so it has no model/"]
    assert (folder / "model" / "model.safetensors").is_file()
