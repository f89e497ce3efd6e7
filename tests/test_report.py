import json
import re
from pathlib import Path

import pytest
from run_factory import around, evaluation, finished, make_run, write_rollouts

from rl_llm.errors import UserError
from rl_llm.runs.jsonl import JsonlWriter
from rl_llm.runs.report.charts import POINTS
from rl_llm.runs.run import Run, load_run
from rl_llm.values import to_json


def figures(report: Path) -> list[dict]:
    """The charts' data as the page holds them."""
    found = re.search(r'id="charts">(.*?)</script>', report.read_text(), re.DOTALL)
    assert found
    return json.loads(found[1])


def visible(report: Path) -> str:
    """The page up to the data and the plotting library."""
    return report.read_text().partition('<script type="application/json"')[0]


def test_a_folder_without_a_run_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no run directory.*config\.yaml"):
        load_run(tmp_path)


def test_a_finished_run_reads_back(tmp_path: Path) -> None:
    run = load_run(make_run(tmp_path / "run", steps=40, summary=finished(40)))
    assert run.status == "finished"
    assert run.config.rewards.weights == {"chrf": 1.0, "length": 0.3}
    assert run.metrics["step"].tolist() == list(range(1, 41))
    assert [line["label"] for line in run.evaluations] == ["before", *["validation"] * 5, "after"]
    assert run.failures == []


def test_a_run_killed_while_writing_reads_up_to_its_last_whole_line(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", steps=5, summary=None)
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "loss": 0.')
    run = load_run(path)
    assert run.metrics["step"].tolist() == [1, 2, 3, 4, 5]
    assert run.status == "running or killed"
    assert run.report().is_file()


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", steps=2, summary=None)
    whole = (path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (path / "metrics.jsonl").write_text(whole[0] + "{oops\n" + whole[1])
    with pytest.raises(UserError, match=r"metrics\.jsonl:2"):
        _ = load_run(path).metrics


def test_rollouts_by_step_and_all_together(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", steps=2, summary=None)
    write_rollouts(path, 1, {"chrf": [0.1, 0.2], "length": [1.0, 2.0]}, groups=[0, 0])
    write_rollouts(path, 2, {"chrf": [0.3, None], "length": [1.0, 2.0]}, groups=[1, 1])
    run = load_run(path)
    assert run.rollouts(2)["reward/chrf"].to_pylist() == [pytest.approx(0.3), None]
    assert run.rollouts()["step"].to_pylist() == [1, 1, 2, 2]
    with pytest.raises(UserError, match="step 7; kept: 1 to 2"):
        run.rollouts(7)


def test_a_run_without_rollouts_says_which_setting_keeps_them(tmp_path: Path) -> None:
    run = load_run(make_run(tmp_path / "run", steps=1, summary=None))
    for step in (None, 1):
        with pytest.raises(UserError, match=r"logging\.rollouts"):
            run.rollouts(step)


def test_the_table_marks_metrics_whose_intervals_are_apart(tmp_path: Path) -> None:
    table = load_run(make_run(tmp_path / "run", summary=finished(40))).table()
    assert table.metrics[0] == "utility"
    assert table.apart("chrf")
    assert not table.apart("length")
    lines = str(table).splitlines()
    assert "before" in lines[0]
    assert "supervised" in lines[0]
    assert next(line for line in lines if "0.550 [0.500, 0.600]" in line).startswith("*  chrf")
    assert "0.550" in table._repr_html_()


def test_the_table_of_a_running_run_has_what_was_measured(tmp_path: Path) -> None:
    table = load_run(make_run(tmp_path / "run", steps=5, summary=None)).table()
    assert list(table.columns) == ["before"]
    assert not table.apart("chrf")


def test_an_interval_without_bounds_is_a_bare_mean(tmp_path: Path) -> None:
    odd = {"chrf": {"mean": None, "low": None, "high": None}, "length": {"mean": 1.0, "low": None, "high": None}}
    table = load_run(make_run(tmp_path / "run", summary=finished(40, before=odd))).table()
    cells = {row[0]: row[1] for row in table.cells()}
    assert (cells["chrf"], cells["length"], cells["utility"]) == ("-", "1.000", "-")


def test_the_report_has_its_facts_and_every_kind_of_chart(tmp_path: Path) -> None:
    summary = finished(40, status="stopped_early", reason="no gain since")
    report = Run(make_run(tmp_path / "run", steps=40, summary=summary)).report()
    page = visible(report)
    facts = ["stopped early", "no gain since", "12 min 34 s", "1 chrf + 0.3 length", "40 of 40", "after, step 40"]
    titles = ["Utility", "Weighted reward", "bleu", "Share of the advantage", "Correlation", "KL to the", "Mismatch"]
    assert [part for part in facts + titles if part not in page] == []
    names = {trace.get("name") for figure in figures(report) for trace in figure["data"]}
    assert {"best", "validation", "sampled (mean)", "chrf", "length"} <= names


def test_the_report_needs_no_network(tmp_path: Path) -> None:
    page = Run(make_run(tmp_path / "run", summary=finished(40))).report().read_text()
    assert not re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=", page)


def test_hostile_text_is_shown_and_never_interpreted(tmp_path: Path) -> None:
    evil = "</pre></script><script>alert(1)</script>\x1b[2J"
    path = make_run(tmp_path / "run", summary=finished(40, reason=evil), completion=evil)
    failures = JsonlWriter(path / "failures.jsonl")
    kind = {"component": evil, "status": "error", "outcome": "mask"}
    failures.write({"step": 1, "rows": 2, "message": evil, "prompt_ids": [], **kind})
    page = visible(Run(path).report())
    assert "<script" not in page
    assert "\x1b" not in page
    assert "&lt;script&gt;alert(1)" in page


def test_a_component_name_cannot_leave_the_data_block(tmp_path: Path) -> None:
    report = Run(make_run(tmp_path / "run", components={"</script><b>": 1.0}, summary=finished(40))).report()
    assert len(figures(report)) > 5


@pytest.mark.parametrize("components", [{"chrf": 1.0}, {f"part{i}": 1.0 for i in range(8)}], ids=["one", "eight"])
@pytest.mark.parametrize("steps", [0, 1, 30])
def test_any_run_renders(tmp_path: Path, components: dict[str, float], steps: int) -> None:
    report = Run(make_run(tmp_path / "run", components=components, steps=steps, summary=None)).report()
    assert ("No step has finished" in visible(report)) == (steps == 0)


def test_a_run_that_failed_before_any_number_renders(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", steps=0, summary={"status": "failed", "reason": "no room", "steps": 0})
    (path / "eval.jsonl").unlink()
    (path / "metrics.jsonl").unlink()
    page = visible(Run(path).report())
    assert "no room" in page
    assert "<figure" not in page


def test_missing_values_are_gaps(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", steps=3, summary=None)
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    lines[1]["kl"] = lines[1]["reward/chrf/mean"] = None
    for line in lines:
        line["entropy"] = None
    writer = JsonlWriter(path / "metrics.jsonl")
    for line in lines:
        writer.write(line)
    report = Run(path).report()
    kl = next(figure["data"][0] for figure in figures(report) if figure["data"][0].get("name") == "KL to the reference")
    assert [value is None for value in kl["y"]] == [False, True, False]
    assert "Entropy" not in visible(report)


def test_the_test_split_shows_the_trained_policy_and_not_a_control(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", steps=40, summary=None)
    lines = [evaluation(40, "test", label, ["chrf", "length"], 1.0, label) for label in ("after", "supervised")]
    with (path / "eval.jsonl").open("a") as file:
        file.writelines(to_json(line) + "\n" for line in lines)
    page = visible(Run(path).report())
    assert "after of step 40" in page
    assert "supervised of step 40" not in page


def test_mismatch_and_temperature_are_charted_as_what_they_are(tmp_path: Path) -> None:
    page = visible(Run(make_run(tmp_path / "run", summary=finished(40))).report())
    assert "Mismatch<span>mean absolute difference of log-probs" in page
    assert "Sampling temperature" in page


def test_metrics_of_an_algorithm_are_charted_where_it_has_them(tmp_path: Path) -> None:
    plain = make_run(tmp_path / "plain", summary=finished(40))
    path = make_run(tmp_path / "ppo", summary=None, overrides=("algorithm.name=ppo", "algorithm.kl.coef=0.1"))
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    titles = {
        "completion/distinct": "Distinct completions", "clip_fraction": "Clipped tokens", "kl/coef": "KL coefficient",
        "value/explained": "Explained variance", "value/loss": "Value loss", "groups/drawn": "Groups drawn",
        "correction/kept": "Tokens kept", "correction/weight": "Correction weight",
    }  # fmt: skip
    (path / "metrics.jsonl").write_text(
        "".join(to_json({**line, **dict.fromkeys(titles, 0.5 + line["step"])}) + "\n" for line in lines)
    )
    page, other = visible(Run(path).report()), visible(Run(plain).report())
    assert [title for title in titles.values() if title not in page] == []
    assert [title for title in titles.values() if title in other] == []


def test_what_stays_as_configured_has_no_chart(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", steps=3, summary=None, overrides=("algorithm.kl.coef=0.1",))
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    drawn = {"kl/coef": 0.1, "groups/drawn": 8, "bad_steps": 0}
    (path / "metrics.jsonl").write_text("".join(to_json({**line, **drawn}) + "\n" for line in lines))
    page = visible(Run(path).report())
    assert not any(title in page for title in ("KL coefficient", "Groups drawn", "Skipped steps"))
    assert "KL to the reference" in page


def test_failures_are_grouped_and_counted(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", summary=finished(40))
    writer = JsonlWriter(path / "failures.jsonl")
    for step, message in ((3, "no answer at all"), (9, "a later one")):
        kind = {"component": "chrf", "status": "timeout", "outcome": "impute"}
        writer.write({"step": step, "rows": 4, "message": message, "prompt_ids": [1], **kind})
    page = visible(Run(path).report())
    assert "2 steps, 3 to 9" in page
    assert ">8</td>" in page
    assert "no answer at all" in page
    assert "a later one" not in page


def test_a_long_run_is_thinned_and_keeps_its_mean(tmp_path: Path) -> None:
    steps = 3 * POINTS
    report = Run(make_run(tmp_path / "run", components={"chrf": 1.0}, steps=steps, every=steps, summary=None)).report()
    length = next(f["data"][0] for f in figures(report) if f["data"][0].get("name") == "Completion length")
    assert len(length["y"]) == POINTS
    assert sum(length["y"]) / POINTS == pytest.approx(40 - 7.5, abs=0.01)


def test_a_conversational_prompt_reads_as_roles(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", steps=1, summary=None)
    prompt = json.dumps([{"role": "system", "content": "be short"}, {"role": "user", "content": "hello"}])
    line = {"step": 0, "split": "tune", "label": "validation", "metrics": {"utility": around(0)}}
    JsonlWriter(path / "eval.jsonl").write(
        line | {"samples": [{"prompt": prompt, "completion": "hi", "rewards": {"chrf": 1.0}}]}
    )
    assert "system: be short\nuser: hello" in visible(Run(path).report())
