import json
import re
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from conftest import Command, refused
from run_factory import finished, make_run
from search_factory import STEPS, make_search

from rl_llm.search.report.svg import Axis, Place, picture
from rl_llm.search.search import Search

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def page(finished_search: Path) -> str:
    return Search(finished_search).report().read_text()


def data(page: str, name: str) -> Any:
    """What the page's script draws from."""
    found = re.search(rf'id="{name}">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1])


def visible(page: str) -> str:
    return page.partition('<script type="application/json"')[0]


def test_the_report_opens_with_the_answer_and_has_every_section(page: str, finished_search: Path) -> None:
    search = Search(finished_search)
    shown = visible(page)
    assert search.headline[1:] in shown
    assert str(search.cost)[1:] in shown
    headings = re.findall(r"<h2>(.*?)</h2>", shown)
    wanted = ["Result", "Front", "Forecast", "Trials", "All trials", "Failures", "Decisions", "Configuration"]
    assert [name for name in wanted if name not in headings] == []
    facts = ["1 chrf + 1 length + 0.5 facts", "halving", f"{STEPS} steps", "simplex chrf, length, facts", "12 min 34 s"]
    assert [fact for fact in facts if fact not in shown] == []


def test_the_report_needs_no_network(page: str) -> None:
    assert not re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=", page)


def test_the_front_can_be_drawn_over_any_two_metrics(page: str, finished_search: Path) -> None:
    front = data(page, "front")
    names = [axis["name"] for axis in front["axes"]]
    assert names == ["chrf", "length", "facts", "utility"]
    assert set(front["pairs"]) == {f"{i},{j}" for i in range(4) for j in range(i + 1, 4)}
    for pair in front["pairs"].values():
        assert pair["front"]
        assert re.fullmatch(r"\d+\.\d+ \[\d+\.\d+, \d+\.\d+\]", pair["hypervolume"])
    assert names[front["x"]], names[front["y"]] == ("chrf", "length")
    found = Search(finished_search).candidates
    first = front["points"][0]
    assert first["at"][0][0] == pytest.approx(found[0].mean("chrf"))
    assert {point["kind"] for point in front["points"]} == {"trial", "finalist", "control", "soup"}
    assert len(front["forecast"]["at"]) == len(front["forecast"]["text"])
    assert "0,1" in front["forecast"]["fronts"]


def test_a_curve_ends_where_its_trial_was_stopped_and_says_why(page: str, finished_search: Path) -> None:
    curves = next(figure for figure in data(page, "charts") if "updatemenus" in figure["layout"])
    stopped = next(entry for entry in Search(finished_search).course.of("trial") if entry.state == "stopped")
    line = next(trace for trace in curves["data"] if trace["name"] == stopped.name)
    assert line["x"][-1] == stopped.reports[-1].step < STEPS
    assert line["marker"]["symbol"][-1] == "x"
    assert stopped.reason in line["text"][-1].replace("&#x27;", "'")
    names = [button["label"] for menu in curves["layout"]["updatemenus"] for button in menu["buttons"]]
    assert names == ["utility", "chrf", "length", "facts", "steps", "tokens"]


def test_parallel_coordinates_have_knobs_and_results_of_every_trial(page: str) -> None:
    chart = next(f["data"][0] for f in data(page, "charts") if f["data"][0].get("type") == "parcoords")
    labels = [dimension["label"] for dimension in chart["dimensions"]]
    assert labels == ["weight chrf", "weight length", "weight facts", "lr", "chrf", "length", "facts", "utility"]
    assert {len(dimension["values"]) for dimension in chart["dimensions"]} == {8}  # one trial of nine failed at once


def test_what_varies_by_choice_has_a_place_a_value(tmp_path: Path) -> None:
    space = {"rewards.weights": {"simplex": ["chrf", "length"]}, "algorithm.name": {"choice": ["grpo", "rloo"]}}
    page = Search(make_search(tmp_path / "search", reports=6, space=space)).report().read_text()
    chart = next(f["data"][0] for f in data(page, "charts") if f["data"][0].get("type") == "parcoords")
    named = next(dimension for dimension in chart["dimensions"] if dimension["label"] == "name")
    assert set(named["ticktext"]) <= {"grpo", "rloo"}
    assert set(named["values"]) <= set(named["tickvals"])


def test_hostile_text_is_shown_and_never_interpreted(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script>\x1b[2J"
    path = make_search(tmp_path / "search", reports=12, fails=("t01",))
    text = (path / "decisions.jsonl").read_text().replace("it crashed: <b>no room</b>", json.dumps(evil)[1:-1])
    (path / "decisions.jsonl").write_text(text)
    (path / "summary.json").write_text(json.dumps({"status": "failed", "reason": evil}))
    page = Search(path).report().read_text()
    assert "<script>alert" not in page
    assert "\x1b" not in page
    assert visible(page).count("&lt;/script&gt;&lt;script&gt;alert(1)") >= 3  # reason, failure, decision


def test_a_report_comes_of_a_search_that_has_only_begun(tmp_path: Path) -> None:
    path = make_search(tmp_path / "search", reports=0)
    page = visible(Search(path).report().read_text())
    assert "0 of 9 trials are over" in page
    shutil.rmtree(path / "base")
    shutil.rmtree(path / "trials", ignore_errors=True)
    (path / "decisions.jsonl").unlink()
    page = visible(Search(path).report().read_text())
    assert "none yet" in page
    assert "<h2>Front" not in page


def test_the_picture_shows_forecast_and_front(page: str, finished_search: Path) -> None:
    root = ET.parse(finished_search / "front.svg").getroot()
    assert [line.get("class") for line in root.iter(f"{SVG}polyline")] == ["forecast", "front"]
    words = [text.text for text in root.iter(f"{SVG}text")]
    assert {"equal weights", "best finalist", "base policy", "chrf", "length", "forecast"} <= set(words)
    stars = [mark for mark in root.iter(f"{SVG}polygon") if mark.get("class") == "finalist"]
    assert len(stars) == 1 + len(Search(finished_search).course.of("finalist"))  # and the legend's
    assert "prefers-color-scheme: dark" in (finished_search / "front.svg").read_text()


def test_the_picture_escapes_and_stays_within_its_frame() -> None:
    places = [Place("base", 0.0, 0.0, "<base>"), Place("trial", 1.0, 2.0), Place("finalist", 1.0, 2.0, "a & b")]
    root = ET.fromstring(picture("<x>", "y", places, [(1.0, 2.0)], []))
    assert "<base>" in [text.text for text in root.iter(f"{SVG}text")]
    for circle in root.iter(f"{SVG}circle"):
        assert 0 < float(circle.get("cx", 0)) < 720
        assert 0 < float(circle.get("cy", 0)) < 440
    assert [line.get("class") for line in root.iter(f"{SVG}polyline")] == ["front"]


def test_an_axis_has_round_ticks() -> None:
    axis = Axis.over([0.0, 1.0], 0, 100)
    assert axis.ticks == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert Axis.over([3.0, 3.0], 0, 100).at(3.0) == pytest.approx(50)


def test_the_command_reports_on_runs_and_searches(command: Command, finished_search: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", summary=finished(40))
    assert command("report", run).out.strip() == str(run / "report.html")
    assert command("report", finished_search).out.strip() == str(finished_search / "report.html")
    left = {path.name for path in finished_search.iterdir()}
    assert {"report.html", "front.svg", "trials.parquet", "pareto.json"} <= left
    points = json.loads((finished_search / "pareto.json").read_text())
    assert points["metrics"] == {"chrf": "max", "length": "max", "facts": "max"}
    for point in points["points"]:
        assert point["model"] is None or (finished_search / point["model"]).is_dir()
    assert "no run directory" in refused(command, "report", "task.jsonl")
