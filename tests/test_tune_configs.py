"""The searches that come with the project: each can start, and says when to use it."""

from pathlib import Path

import pytest

from rl_llm.search.config import load_search
from rl_llm.search.ledger import Ledger
from rl_llm.search.plan import make_course, make_space

FILES = sorted((Path(__file__).parents[1] / "tune_configs").glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_search_that_comes_with_the_project_can_start(file: Path) -> None:
    given = ["run.policy.model=owner/name"] if "run.policy.model=FOLDER" in file.read_text() else []
    search = load_search(file, given)
    course = make_course(search, make_space(search), [], Ledger())
    assert course.of("trial")
    assert all(entry.state == "going" for entry in course.entries.values())


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_it_says_when_to_use_it(file: Path) -> None:
    comments = [line for line in file.read_text().splitlines() if line.startswith("# ")]
    assert len(comments) >= 2
