import io

import pytest
from rich.console import Console
from search_factory import Pretender, search_config

from rl_llm.search.console import LiveSearchConsole, SearchConsole, make_search_console
from rl_llm.search.course import Course
from rl_llm.search.following import Followers
from rl_llm.search.ledger import Ledger
from rl_llm.search.plan import make_course, make_space


def follow(tmp_path_factory: pytest.TempPathFactory, console: SearchConsole, reports: int) -> Course:
    """A search of so many reports, as the console is told of it."""
    path = tmp_path_factory.mktemp("search")
    config = search_config(controls=False)
    course = make_course(config, make_space(config), [], Ledger())
    pretender, followers = (
        Pretender(path, config, lambda weights: {"chrf": 0.1 + weights["chrf"]}),
        Followers([console], path),
    )
    followers.start(course)
    course.fail("t03", "no\x1broom", again=False)
    followers.message("3 rows were \x1b[2Jbad")
    for _ in range(reports):
        entry = course.going[0]
        course.report(entry.name, pretender.advance(entry))
        followers.look()
    followers.end({})
    return course


def test_plain_lines_for_every_report_and_decision(
    tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    course = follow(tmp_path_factory, SearchConsole(), reports=9)
    lines = capsys.readouterr().out.splitlines()
    assert "t00 (equal): chrf 0.333, length 0.333, facts 0.333, lr 1e-05" in lines
    assert "t03 failed, given up: no\ufffdroom" in lines
    assert "3 rows were \ufffd[2Jbad" in lines
    reported = next(line for line in lines if line.startswith("t00 step 2  utility "))
    assert "2k tokens" in reported
    assert "tokens 12" not in reported
    stopped = [entry.name for entry in course.of("trial") if entry.state == "stopped"]
    assert stopped
    assert all(any(line.startswith(f"{name}: stopped, below: ") for line in lines) for name in stopped)


def test_the_live_table_has_a_row_a_trial(tmp_path_factory: pytest.TempPathFactory) -> None:
    out = io.StringIO()
    console = LiveSearchConsole(Console(file=out, force_terminal=True, width=150, height=40, color_system=None))
    course = follow(tmp_path_factory, console, reports=8)
    last = out.getvalue().rpartition("trial  role")[2]
    rows = {line.split()[0]: line for line in last.splitlines()[1:] if line.startswith("t0")}
    assert set(rows) == {entry.name for entry in course.of("trial")}
    assert "failed" in rows["t03"]
    stopped = next(entry for entry in course.of("trial") if entry.state == "stopped")
    assert "stopped" in rows[stopped.name]
    assert "[" in rows[stopped.name]  # the utility's interval
    assert "\x1b[2Jbad" not in out.getvalue()
    assert not any("…" in line.partition("stopped")[0] for line in rows.values())
    console.close()


def test_who_goes_has_a_row_where_not_all_have_room(tmp_path_factory: pytest.TempPathFactory) -> None:
    out = io.StringIO()
    console = LiveSearchConsole(Console(file=out, force_terminal=True, width=150, height=8, color_system=None))
    course = follow(tmp_path_factory, console, reports=8)
    last = out.getvalue().rpartition("trial  role")[2]
    going = [entry.name for entry in course.entries.values() if entry.state == "going"]
    assert all(f"{name} " in last for name in going[:4])
    assert f"and {len(course.entries) - 4} more" in last


def test_a_pipe_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    assert type(make_search_console(Console(file=io.StringIO()))) is SearchConsole
    terminal = Console(file=io.StringIO(), force_terminal=True, force_jupyter=False)
    assert type(make_search_console(terminal)) is LiveSearchConsole
    monkeypatch.setenv("RL_LLM_PLAIN", "1")
    assert type(make_search_console(terminal)) is SearchConsole
