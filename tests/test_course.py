"""The course of a search: whatever the order of reports and wherever it is cut, the same decisions."""

from typing import Any

import numpy as np
import pytest
from fake_trials import SIMPLEX, course_of, decisions, drive, in_order_of, make_search

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
    whole = drive(search, course_of(search)).ledger.lines
    for cut in range(len(whole)):
        again = drive(search, course_of(search, whole[:cut]))
        assert again.ledger.lines == whole


@pytest.mark.parametrize("name", ["halving", "brackets of optuna", "population"])
def test_the_order_of_reports_changes_no_decision(name: str) -> None:
    search = make_search(**SEARCHES[name])
    expected = decisions(drive(search, course_of(search)))
    for order in range(8):
        assert decisions(drive(search, course_of(search), in_order_of(np.random.default_rng(order)))) == expected
