"""Who goes on and who is cut, on numbers worked out by hand."""

import itertools

import numpy as np
import pytest
from fake_trials import SIMPLEX, course_of, drive, in_order_of, make_search

from rl_llm.errors import UserError
from rl_llm.search.plan import make_space
from rl_llm.search.schedulers import ASHA, PBT, Decided, Halving, Level, Plain, Standing, make_scheduler, rungs

STEPS = 27
LEVELS = rungs("halving", STEPS)[1]
# Differences that cannot be told from none, and that can.
EVEN, CLEAR = np.array([1.0, -1.0, 1.0, -1.2]), np.full(4, -0.5)


def trial(name: str, utility: np.ndarray, price: float = 10, step: int = 3, ended: bool = False) -> Standing:
    return Standing(name, utility, utility, price, int(price * step), step, {"learner.lr": 1e-4}, ended)


def level(
    waiting: list[Standing],
    number: int = 0,
    slack: float = 0.0,
    coming: int = 0,
    in_tokens: bool = False,
    before: list[Standing] | None = None,
) -> Level:
    return Level(number, waiting, coming, before or [], slack, 270 if in_tokens else STEPS, in_tokens)


def actions(decided: Decided | None) -> dict[str, str]:
    assert decided is not None
    return {name: verdict.action for name, verdict in decided.verdicts.items()}


def test_halving_worked_out_by_hand() -> None:
    """Of 8 the best 3 go on, and of the tied ones those that the slack pays for.

    Plain halving's plan is what all have spent up to here, 3 steps at their prices, and the next 6 steps of the 3 best.
    """
    second = np.array([0.5, 0.5, 0.5, 0.5])
    waiting = [
        trial("far", second + CLEAR),
        trial("dear", second + EVEN * 0.02 - 0.001),
        trial("second", second),
        trial("cheap", second + EVEN * 0.01, price=4),
        trial("best", second + 1),
        trial("cheapest", second + EVEN * 0.04, price=1),
        trial("ended", second + EVEN * 0.06, ended=True),
        trial("dear too", second + EVEN * 0.005),
    ]
    decided = Halving(LEVELS).decide(level(waiting, slack=2.0))
    assert decided is not None
    # The third one, by its mean, is "dear too".
    planned = 6 * 30 + 12 + 3 + (60 + 60 + 60)
    assert [name for name, verdict in decided.verdicts.items() if "among the best 3 of 8" in verdict.reason] == [
        "second",
        "best",
        "dear too",
    ]
    # Then come cheap (-0.0005), dear (-0.002), cheapest (-0.002), ended (-0.003), far (-0.5), each against "dear too".
    slack = 2.0 + 0.1 * planned - 4 * 6
    assert actions(decided) == {
        "far": "stop",
        "dear": "stop",
        "second": "go",
        "cheap": "go",
        "best": "go",
        "cheapest": "stop",
        "ended": "go",
        "dear too": "go",
    }
    assert decided.slack == pytest.approx(slack)
    reasons = {name: verdict.reason for name, verdict in decided.verdicts.items()}
    assert reasons["far"].startswith("below: difference -0.49")
    assert "24 of 40 tokens of slack" in reasons["cheap"]
    assert f"{slack:,.0f} tokens of slack do not pay for 60" in reasons["dear"]
    assert decided.verdicts["cheap"].difference is not None
    low, high = decided.verdicts["cheap"].difference[1:]
    assert low <= 0 <= high


def test_slack_passes_on_and_nothing_is_borrowed() -> None:
    best, tied = np.zeros(4), EVEN * 0.1
    waiting = [trial("best", best, step=9), trial("tied", tied, step=9)]
    # The best one's next 18 steps cost 180, a tenth is 18; the tied one needs 180.
    assert actions(Halving(LEVELS).decide(level(waiting, number=1, slack=161))) == {"best": "go", "tied": "stop"}
    paid = Halving(LEVELS).decide(level(waiting, number=1, slack=162))
    assert actions(paid) == {"best": "go", "tied": "go"}
    assert paid is not None
    assert paid.slack == pytest.approx(0)


def test_a_budget_in_tokens_is_paid_in_tokens() -> None:
    best, tied = np.zeros(4), EVEN * 0.1
    waiting = [trial("best", best, price=10, step=3), trial("tied", tied, price=20, step=3)]
    # The first level is at 30 tokens and the second at 90: the best one needs 60 more, the tied one, at 60 now, 30.
    # The plan is 30 + 60 for the first segment and 60; a tenth of it is 15.
    assert actions(Halving(LEVELS).decide(level(waiting, slack=14, in_tokens=True)))["tied"] == "stop"
    paid = Halving(LEVELS).decide(level(waiting, slack=15, in_tokens=True))
    assert paid is not None
    assert paid.slack == pytest.approx(0)


def test_halving_waits_for_all_and_ends_with_all() -> None:
    waiting = [trial("a", np.zeros(4)), trial("b", np.ones(4))]
    assert Halving(LEVELS).decide(level(waiting, coming=1)) is None
    assert actions(Halving(LEVELS).decide(level(waiting, number=2, slack=5))) == {"a": "go", "b": "go"}
    assert actions(Halving(LEVELS).decide(level(waiting[:1]))) == {"a": "go"}


def test_nothing_but_means_and_the_order_of_asking_ranks() -> None:
    same = [trial(name, np.zeros(4)) for name in "abc"]
    for order in itertools.permutations(same):
        decided = Halving(LEVELS).decide(level(list(order)))
        assert decided is not None
        assert decided.verdicts[order[0].name].reason == "among the best 1 of 3"


def test_asha_lets_the_best_third_of_those_that_have_come_go_on() -> None:
    asha, come = ASHA(LEVELS), list[Standing]()
    went = ""
    for name, value in zip("abcdefg", (0.5, 0.4, 0.6, 0.55, 0.1, 0.7, 0.58), strict=True):
        arrived = trial(name, np.full(4, value))
        if actions(asha.decide(level([arrived], before=come, coming=3)))[name] == "go":
            went += name
        come.append(arrived)
    # 1 of 1, 2 of 2, 1 of 3, 2 of 4, 5 of 5, 1 of 6, 3 of 7.
    assert went == "acdfg"


def test_several_that_arrive_together_are_taken_one_by_one() -> None:
    waiting = [trial("a", np.full(4, 0.5)), trial("b", np.full(4, 0.4)), trial("c", np.full(4, 0.6))]
    assert actions(ASHA(LEVELS).decide(level(waiting))) == {"a": "go", "b": "stop", "c": "go"}


def test_a_population_learns_from_its_best_quarter() -> None:
    space = make_space(make_search(space=SIMPLEX))
    waiting = [trial(f"t{i}", np.full(4, float(value))) for i, value in enumerate((3, 7, 0, 5, 1, 6, 2, 4))]
    pbt = PBT(space.moved, 0, LEVELS)
    decided = pbt.decide(level(waiting, number=1))
    assert decided is not None
    exploits = {name: verdict for name, verdict in decided.verdicts.items() if verdict.action == "exploit"}
    assert set(exploits) == {"t2", "t4"}
    for verdict in exploits.values():
        assert verdict.donor in ("t1", "t5")
        assert verdict.point is not None
        assert sum(verdict.point["rewards.weights"].values()) == pytest.approx(1)
    assert pbt.decide(level(waiting, number=1)) == decided
    assert pbt.decide(level(waiting, number=0)) != decided
    assert pbt.decide(level(waiting, coming=1)) is None
    assert set(actions(pbt.decide(level(waiting, number=2))).values()) == {"go"}


def test_who_has_ended_is_no_donor_and_may_be_replaced() -> None:
    space = make_space(make_search(space=SIMPLEX))
    pbt = PBT(space.moved, 0, LEVELS)
    ended_best = [trial("a", np.ones(4), ended=True), trial("b", np.zeros(4))]
    assert actions(pbt.decide(level(ended_best))) == {"a": "go", "b": "go"}
    ended_worst = [trial("a", np.ones(4)), trial("b", np.zeros(4), ended=True), trial("c", np.zeros(4))]
    assert actions(pbt.decide(level(ended_worst))) == {"a": "go", "b": "go", "c": "exploit"}
    assert actions(pbt.decide(level(ended_worst[:2]))) == {"a": "go", "b": "exploit"}


def test_levels_fall_on_evaluations() -> None:
    for steps in range(9, 200):
        every, levels = rungs("halving", steps)
        assert [round(share * steps, 9) for share in levels] == [every, 3 * every, steps]
        assert abs(every - steps / 9) <= 0.5
        _, generations = rungs("pbt", steps)
        assert all(round(share * steps, 9) % every == 0 for share in generations[:-1])
        assert list(generations) == sorted(set(generations))
        assert generations[-1] == 1
    assert rungs("halving", 60) == (7, (7 / 60, 21 / 60, 1.0))
    assert rungs("none", 4) == (1, (1.0,))
    with pytest.raises(
        UserError, match=r"trainer\.steps 8: scheduler: asha .* run\.trainer\.steps=9, or scheduler: none"
    ):
        rungs("asha", 8)


def test_a_file_names_its_scheduler() -> None:
    kinds = {"halving": Halving, "asha": ASHA, "pbt": PBT, "none": Plain}
    for name, kind in kinds.items():
        search = make_search(scheduler=name)
        assert type(make_scheduler(search, make_space(search), 27)) is kind
    tokens = make_search(tokens=1000, run={"trainer": {"steps": 3}})
    assert make_scheduler(tokens, make_space(tokens), 3).levels == (1 / 9, 1 / 3, 1.0)


@pytest.mark.parametrize("scheduler", ["halving", "asha", "none"])
def test_what_stopping_saves(scheduler: str) -> None:
    search = make_search(scheduler=scheduler, trials=12, controls=False, finalists=0, run={"trainer": {"steps": 27}})
    shares = []
    for order in range(4):
        course = drive(search, course_of(search), in_order_of(np.random.default_rng(order)))
        spent = sum(entry.reports[-1].tokens for entry in course.of("trial"))
        whole = sum(entry.reports[-1].tokens / entry.reports[-1].step * 27 for entry in course.of("trial"))
        shares.append(spent / whole)
    if scheduler == "halving":
        # Plain halving takes 12 x 1/9 + 4 x 2/9 + 2 x 2/3 of 12, which is 30 %; a tenth more is slack.
        assert len(set(shares)) == 1
        assert shares[0] <= 0.34
    else:
        assert max(shares) <= (1.0 if scheduler == "none" else 0.8)
        assert (min(shares) == 1.0) == (scheduler == "none")
