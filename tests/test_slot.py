"""What the process of a slot does with the trials that it is given, one after the other."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conftest import Tiny
from safetensors.torch import load_file
from searches import EQUAL, search, shared
from test_trainer import assert_same_record, opened

from rl_llm.runs.run import Run
from rl_llm.search.course import Report
from rl_llm.search.slot import INTERRUPTED, REPORT, STOP, TRIALS, Shared, Slot, config_of
from rl_llm.trainer.beginning import Beginning

OTHER = {"rewards.weights": {"match": 0.1, "length": 0.9}}


@pytest.fixture(scope="module")
def common(tiny_run: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Shared:
    return shared(search(tiny_run), tmp_path_factory.mktemp("search"))


@pytest.fixture
def here(common: Shared, tmp_path: Path) -> Shared:
    """A search of its own, with the same base policy."""
    (tmp_path / "base").symlink_to(common.path / "base")
    return replace(common, path=tmp_path)


@pytest.fixture
def slot(here: Shared) -> Iterator[Slot]:
    slot = Slot(here)
    yield slot
    slot.close()


def asked(slot: Slot, name: str | None = None, point: dict[str, Any] | None = None, **more: Any) -> Report:
    """What a trial tells at its next evaluation: of a trial that is assigned, or of the one that is in the slot."""
    assigned = None if name is None else {"name": name, "role": "trial", "point": point or EQUAL, **more}
    return Report(**json.loads(slot.advance(assigned)[REPORT]))


def alone(settings: dict[str, Any], base: Path, path: Path, point: dict[str, Any], seed: int | None = None) -> Path:
    """A single run with the settings of a trial, left alone."""
    with opened(config_of(settings, point, seed), path, beginning=Beginning.of(base)) as trainer:
        while trainer.advance():
            pass
        trainer.export_best()
    return path


def test_a_trial_that_shares_its_slot_is_the_run_left_alone(slot: Slot, here: Shared, tmp_path: Path) -> None:
    first = asked(slot, "a")
    asked(slot, "b", OTHER)
    told = [first, asked(slot, "a", reported=1), asked(slot)]
    asked(slot, "b", OTHER, reported=1)
    slot.close()  # the rest in another process
    slot = Slot(here)
    told += [asked(slot, "a", reported=3), *(asked(slot) for _ in range(5))]
    slot.close()
    assert [report.step for report in told] == list(range(1, 10))
    assert [report.ended for report in told] == [""] * 8 + ["finished"]

    path, run = alone(here.settings, here.path / "base", tmp_path / "alone", EQUAL), Run(here.path / TRIALS / "a")
    assert_same_record(run.path, path)
    tiny.assert_same_weights(run.model, path / "model")
    assert run.summary["status"] == "finished"
    assert "after" not in run.summary  # the test split is for finalists
    for report in told:
        values = run.evaluated("validation", report.step)
        assert report.utility == values["utility"].to_pylist()
        assert report.metrics["match"] == pytest.approx(values["match"].to_numpy().mean())
        assert report.reward == [tiny.metrics(path)[report.step - 1]["reward/mean"]]
    tokens = [report.tokens for report in told]
    assert tokens == sorted(tokens)
    state = json.loads((path / "checkpoints/step-000009/state.json").read_text())
    assert tokens[-1] == state["tokens_generated"]


def test_an_evaluation_that_was_not_told_is_told_and_not_made_again(slot: Slot, here: Shared) -> None:
    asked(slot, "a")
    told = asked(slot)
    again = asked(slot, "a", reported=1)
    assert replace(again, seconds=0) == replace(told, seconds=0)
    assert asked(slot).step == 3
    assert len(tiny.metrics(here.path / TRIALS / "a")) == 3


def test_an_exploit_goes_on_from_the_donors_policy_at_its_own_point(slot: Slot, here: Shared) -> None:
    space = {**OTHER, "learner.lr": 3e-2}
    for name, point in (("good", EQUAL), ("bad", space)):
        asked(slot, name, point)
        asked(slot)
    donor = here.path / TRIALS / "good" / "checkpoints" / "step-000002"
    moved = {"rewards.weights": {"match": 0.3, "length": 0.7}, "learner.lr": 5e-3}

    def weights(name: str) -> dict[str, torch.Tensor]:
        return load_file(here.path / TRIALS / "bad" / "checkpoints" / name / "weights.safetensors")

    before = weights("step-000002")
    told = asked(slot, "bad", moved, reported=2, donor=["good", 2])
    assert told.step == 3
    theirs, taken = load_file(donor / "weights.safetensors"), weights("step-000002")
    assert all(torch.equal(taken[key], theirs[key]) for key in theirs)
    assert not all(torch.equal(before[key], theirs[key]) for key in theirs)
    moments = [folder / "optimizer.safetensors" for folder in (donor, donor.parents[2] / "bad/checkpoints/step-000002")]
    assert moments[0].read_bytes() == moments[1].read_bytes()
    line = tiny.metrics(here.path / TRIALS / "bad")[2]
    assert (line["lr"], line["weights/match"], line["weights/length"]) == (5e-3, 0.3, 0.7)

    # Killed after it was made, and told again: the donor's checkpoint is gone, and not needed any more.
    for _ in range(3):
        asked(slot, "good", EQUAL, reported=2)
    third = weights("step-000003")
    slot.close()
    asked(Slot(here), "bad", moved, reported=3, donor=["good", 2])
    assert all(torch.equal(weights("step-000003")[key], third[key]) for key in third)


def test_a_trial_that_is_asked_to_stop_has_saved_and_goes_on_between_two_evaluations(
    tiny_run: Tiny, here: Shared, tmp_path: Path
) -> None:
    settings = json.loads(json.dumps(here.settings))
    settings["evaluation"]["every"] = 3
    slow = replace(here, settings=settings)
    slot = Slot(slow)
    watch = slot.silent.heard

    def ask_to_stop() -> None:
        watch()
        if slot._trainer is not None and slot._trainer.steps_done == 2:
            (slow.path / STOP).touch()

    slot.silent.heard = ask_to_stop  # type: ignore[method-assign]
    assert slot.advance({"name": "a", "role": "trial", "point": EQUAL}) == {INTERRUPTED: True}
    assert slot.advance(None) == {INTERRUPTED: True}
    assert len(tiny.metrics(slow.path / TRIALS / "a")) == 2
    (slow.path / STOP).unlink()
    slot.close()
    report = asked(Slot(slow), "a")
    assert (report.step, len(report.reward)) == (3, 3)
    run = alone(settings, here.path / "base", tmp_path / "alone", EQUAL)
    assert tiny.metrics(slow.path / TRIALS / "a") == tiny.metrics(run)[:3]


def test_finalists_look_at_the_test_split_and_tokens_can_end_a_trial(here: Shared) -> None:
    slot = Slot(replace(here, tokens=300))
    reports = [asked(slot, "f", role="finalist", seed=7)]
    while not reports[-1].ended:
        reports.append(asked(slot))
    slot.close()
    run = Run(here.path / TRIALS / "f")
    assert run.config.trainer.seed == 7
    assert reports[-2].tokens < 300 <= reports[-1].tokens
    assert (run.summary["status"], run.summary["steps"]) == ("finished", reports[-1].step)
    assert run.summary["after"].keys() == run.summary["before"].keys()


def test_a_trial_whose_steps_are_over_before_its_tokens_has_finished(here: Shared) -> None:
    settings = json.loads(json.dumps(here.settings))
    settings["trainer"]["steps"], settings["evaluation"]["every"] = 3, 2
    slot = Slot(replace(here, settings=settings, tokens=10**6))
    reports = [asked(slot, "few"), asked(slot)]
    slot.close()
    assert [(report.step, report.ended) for report in reports] == [(2, ""), (3, "finished")]
    assert Run(here.path / TRIALS / "few").summary["status"] == "finished"


def test_a_soup_lies_between_the_policies_it_is_made_of(slot: Slot, here: Shared) -> None:
    short = Slot(replace(here, tokens=1))
    parts = {"single-match": 0.25, "single-length": 0.75}
    for name in parts:
        weights = {"match": 0.0, "length": 0.0, name.removeprefix("single-"): 1.0}
        asked(short, name, {"rewards.weights": weights}, role="control")
    short.close()
    told = asked(slot, "soup-00", parts, role="soup")
    assert (told.step, told.ended) == (0, "finished")
    found, bests = tiny.weights(here.path / TRIALS / "soup-00" / "model"), []
    for name in parts:
        run = Run(here.path / TRIALS / name)
        bests.append(tiny.weights(run.model))
    for key, value in found.items():
        expected = 0.25 * bests[0][key] + 0.75 * bests[1][key]
        torch.testing.assert_close(value, expected)
    values = Run(here.path / TRIALS / "soup-00").evaluated("soup")
    assert told.utility == values["utility"].to_pylist()


def test_a_trial_that_fails_says_why_and_the_next_one_is_well(slot: Slot, here: Shared) -> None:
    asked(slot, "first")
    failed = asked(slot, "bad", {"rewards.components.match.args": {"nothing": 1}})
    assert "nothing" in failed.failed
    assert (failed.step, failed.tokens) == (0, 0)  # not those of the one before
    assert asked(slot, "good").failed == ""
