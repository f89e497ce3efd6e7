"""The component `facts`: known values, what counts as wrong, and what is refused before the start."""

from typing import Any

import pytest
from test_rewards import rows

from rl_llm.config import ComponentConfig, build_config
from rl_llm.errors import UserError
from rl_llm.launch.preflight import check_components
from rl_llm.rewards import Component, Facts
from rl_llm.tasks import task_from_rows

ADA = {"name": "Ada", "job": "baker", "city": "New York", "born": 1987}
CITIES = ["York", "New York", "Rome", "The Hague"]


def score(text: str, row: dict[str, Any] = ADA, **args: Any) -> float | None:
    [value] = Facts(columns=list(row), **args)([text], **{name: [value] for name, value in row.items()})
    return value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Ada is a baker in New York, born in 1987.", 1),
        ("ADA THE BAKER: new  york (1987)", 1),
        ("Ada is a baker in New York.", 3 / 4),
        ("Ada is a baker in York, born in 1987.", 3 / 4),  # the value as a whole
        ("Adam is a bakery in New Yorker style, born in 19875", 0),  # whole words
        ("Ada is a baker in York New, born in 87, 19.", 2 / 4),  # in their order
        ("", 0),
    ],
)
def test_facts_are_the_share_of_the_values_that_are_stated(text: str, value: float) -> None:
    assert score(text) == pytest.approx(value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Ada, New York, born in 1986", 2 / 3),
        ("Ada, New York, born in 1986 or 1987", (2 + 1 / 2) / 3),
        ("Ada, New York, born in 1986, 1987, 1987 or 1988", (2 + 1 / 3) / 3),
        ("Ada, New York, Rome, 1987", (2 + 1 / 2) / 3),
        ("Ada, York, Rome, the Hague, New York, 1987", (2 + 1 / 4) / 3),  # all of them
        ("Ada, Rome, 1987", 2 / 3),
        ("Ada, New York, New York, 1987, yes 1987", 1),  # said again
    ],
)
def test_a_wrong_value_beside_the_right_one_costs(text: str, value: float) -> None:
    row = {name: ADA[name] for name in ("name", "city", "born")}
    assert score(text, row, choices={"city": CITIES}) == pytest.approx(value)


def test_choices_take_the_place_of_every_number() -> None:
    assert score("on floor 3, flat 12", {"floor": 3}) == 1 / 2
    assert score("on floor 3, flat 12", {"floor": 3}, choices={"floor": [1, 2, 3]}) == 1
    assert score("on floor 3 or 2, flat 12", {"floor": 3}, choices={"floor": [1, 2, 3]}) == 1 / 2
    assert score("route 66, floor 3", {"floor": 3, "way": "route 66"}) == 1  # part of another value


def test_facts_of_the_row_are_wrong_in_no_column() -> None:
    assert score("35, born in 1987", {"age": 35, "born": 1987}) == 1
    towns = {"home": "Rome", "work": "York"}
    assert score("from Rome to York", towns, choices={"home": CITIES, "work": CITIES}) == 1


def test_values_are_read_as_references_are() -> None:
    assert score("born in 12", {"n": 12.0}) == score("born in 12.0", {"n": 12.0}) == 1
    assert score("from NYC", {"city": ["New York", "NYC", None]}) == 1
    assert score("1,987 and -5", {"n": 1987, "m": -5}) == 1
    assert score("5", {"m": -5}) == 0
    assert score("在北京工作", {"city": "北京"}) == 1
    assert score("Ada", {"name": "Ada", "born": None}) == 1  # judged by what there is
    assert score("Ada", {"born": None, "name": ""}) is None


def test_a_column_may_be_called_like_an_argument() -> None:
    row = {"language": "Latin", "columns": 7}
    config = ComponentConfig(use="facts", args={"columns": list(row)})
    table = rows(["Latin in 7"], **{name: [value] for name, value in row.items()})
    assert Component("facts", config).score(table).values == [1]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({}, "component 'facts' needs args.columns"),
        ({"columns": []}, "component 'facts': columns: name at least one"),
        ({"columns": ["town"]}, "component 'facts' needs a column 'town'; map it with task.columns.town: <one of born"),
        ({"columns": ["city"], "choices": {"town": []}}, "choices.town: 'town' is not among the columns"),
        ({"columns": ["born"]}, "component 'facts' cannot read the column 'born': an object"),
    ],
)
def test_what_is_refused_before_the_start(args: dict[str, Any], message: str) -> None:
    settings = {
        "task": {"data": "-", "prompt": "{city}"},
        "policy": {"model": "-"},
        "rewards": {"components": {"facts": {"args": args}}},
    }
    config = build_config(settings)
    data = [{"city": f"town {i}", "born": {"year": 1987}} for i in range(100)]
    with pytest.raises(UserError) as refused:
        check_components(config, {}, task_from_rows(data, config.task))
    assert message in str(refused.value)
