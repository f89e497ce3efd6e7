import shutil
import sys
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from conftest import Command, Tiny, refused
from search_factory import make_search

from rl_llm.config.yaml12 import read_yaml
from rl_llm.runs.jsonl import read_jsonl
from rl_llm.search.config import build_search
from rl_llm.search.pick import PROMPTS, Pair, Picker
from rl_llm.search.preference import bradley_terry, fit, wilson
from rl_llm.search.search import Search
from rl_llm.values import to_json

TRUE = np.array([2.0, -1.0, 0.0])
NAMES = ["chrf", "length", "facts"]


def simulated(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Choices between answers by a known utility, with the noise of a Bradley-Terry model."""
    generator = np.random.default_rng(seed)
    differences = generator.normal(size=(count, 3))
    chance = 1 / (1 + np.exp(-differences @ TRUE))
    return differences, (generator.random(count) < chance).astype(float)


def test_a_known_utility_is_recovered_in_sign_and_ratio() -> None:
    found = fit(*simulated(400, 0), *simulated(200, 1), NAMES)
    weights = found.weights
    assert weights["chrf"] / weights["length"] == pytest.approx(-2, rel=0.3)
    assert abs(weights["facts"]) < 0.1
    assert sum(map(abs, weights.values())) == pytest.approx(1)
    assert found.sure == ["chrf", "length"]
    assert found.confirmed
    assert 0.7 < (found.agreed["mean"] or 0.0) < 0.95


def test_a_coin_says_nothing_and_is_not_confirmed() -> None:
    generator = np.random.default_rng(3)
    sides = [(generator.normal(size=(60, 3)), generator.integers(2, size=60).astype(float)) for _ in range(2)]
    found = fit(*sides[0], *sides[1], NAMES)
    assert found.sure == []
    assert not found.confirmed


def test_few_choices_without_a_fault_stay_finite() -> None:
    # One metric decides all: the ridge holds it where gradient and prior balance, w = sum of 1 / (1 + e^w).
    weight = bradley_terry(np.array([[1.0], [1.0], [-1.0]]), np.array([1.0, 1.0, 0.0]))[0]
    assert weight == pytest.approx(3 / (1 + np.exp(weight)))
    assert bradley_terry(np.ones((2, 1)), np.array([0.5, 0.5]))[0] == 0


def test_no_choices_and_a_metric_that_never_differs() -> None:
    none = fit(np.zeros((0, 3)), np.zeros(0), np.zeros((0, 3)), np.zeros(0), NAMES)
    assert (none.choices, none.agreed["mean"], none.sure) == (0, None, [])
    same = fit(np.array([[1.0, 0.0, 0.0]] * 9), np.ones(9), np.zeros((0, 3)), np.zeros(0), NAMES)
    assert same.weights == {"chrf": 1.0, "length": 0.0, "facts": 0.0}


def test_a_share_has_the_score_interval() -> None:
    # Wilson 1927, 8 of 10: (0.8 + z^2/20 +- z sqrt(0.016 + z^2/400)) / (1 + z^2/10), z = 1.96.
    found = wilson(8, 10)
    assert [found[key] for key in ("mean", "low", "high")] == pytest.approx([0.8, 0.490, 0.943], abs=1e-3)
    assert wilson(5, 5)["low"] == pytest.approx(0.566, abs=1e-3)


# In a terminal.


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search without a utility whose models have answered already."""
    path = tmp_path_factory.mktemp("pick") / "search"
    make_search(path, utility=None, scheduler="none", finalists=0, trials=4, controls=False)
    return with_answers(path)


def with_answers(path: Path) -> Path:
    """The search, with answers of every model of its front."""
    (path / "answers").mkdir()
    for place, one in enumerate(Search(path).front.points):
        for split in ("tune", "test"):
            generator = np.random.default_rng([place, len(split)])
            lines = []
            for prompt in range(PROMPTS):
                chrf, length, facts = generator.normal(0.3, 0.3, size=3)
                rewards = {"chrf": chrf, "length": length, "facts": None if prompt % 9 == 0 else facts}
                lines.append({"prompt": f"prompt {prompt}", "completion": f"chrf is {chrf:.4f}", "rewards": rewards})
            file = path / "answers" / f"{one.name}-{split}.jsonl"
            file.write_text("".join(to_json(line) + "\n" for line in lines))
    return path


def keys(path: Path, pairs: int) -> list[str]:
    """What somebody who wants chrf, and less length, types for the pairs still open."""
    picker = Picker(Search(path), print)

    def worth(pair: Pair, name: str) -> float:
        metrics = picker.answers[pair.split][name][pair.prompt].metrics
        return (metrics["chrf"] or 0.0) - 0.5 * (metrics["length"] or 0.0)

    return ["a" if worth(pair, pair.a) > worth(pair, pair.b) else "b" for pair in picker.pairs(pairs)]


def typed(command: Command, monkeypatch: pytest.MonkeyPatch, path: Path, lines: list[str], pairs: int) -> str:
    monkeypatch.setattr(sys, "stdin", StringIO("".join(f"{line}\n" for line in lines)))
    said = command("pick", path, "--pairs", pairs)
    assert said.code == 0
    return said.out


def test_piped_choices_become_a_utility_that_a_search_file_takes(
    command: Command, monkeypatch: pytest.MonkeyPatch, answered: Path, tmp_path: Path
) -> None:
    path = shutil.copytree(answered, tmp_path / "search")
    out = typed(command, monkeypatch, path, keys(path, 120), 120)
    block = out[out.index("utility:") :].split("\n\n")[0]
    utility = read_yaml(block)["utility"]
    assert utility["chrf"] > 0.4
    assert utility["length"] < -0.1
    assert "facts: " in out
    assert "cannot be told from 0" in out
    assert "of 40 choices on test prompts: better than a coin" in out
    search = Search(path)
    assert (
        build_search({**search.config.model_dump(mode="json"), "recipe": None, **read_yaml(block)}).utility == utility
    )
    ranked = [line.split()[0] for line in out[out.index("the front by it") :].splitlines()[1:]]
    assert sorted(ranked) == sorted(one.name for one in search.front.points)


def test_choices_between_models_of_a_ranked_search_change_nothing_of_what_ranked_them(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = with_answers(make_search(tmp_path / "search", trials=4, scheduler="none", controls=False))
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    out = typed(command, monkeypatch, path, keys(path, 60), 60)
    utility = read_yaml(out[out.index("utility:") :].split("\n\n")[0])["utility"]
    assert utility["chrf"] > 0.4
    after = {file: file.read_bytes() for file in path.rglob("*") if file.is_file() and file.name != "picks.jsonl"}
    assert after == before


def test_choices_are_kept_and_gone_on_with(
    command: Command, monkeypatch: pytest.MonkeyPatch, answered: Path, tmp_path: Path
) -> None:
    path = shutil.copytree(answered, tmp_path / "search")
    script = keys(path, 12)
    first = typed(command, monkeypatch, path, [*script[:4], "what?", "=", "q", "a"], 12)
    assert first.count("a, b, = or q: ") == 7  # what is no answer is asked again
    picks = read_jsonl(path / "picks.jsonl")
    assert [pick["choice"] for pick in picks] == [*script[:4], "="]
    assert {pick["split"] for pick in picks if pick["pair"] % 3 == 2} == {"test"}
    second = typed(command, monkeypatch, path, script[5:], 12)
    assert "pair 6 of 12" in second
    assert "pair 5 of 12" not in second
    assert len(read_jsonl(path / "picks.jsonl")) == 12


def test_pairs_are_blind_and_in_an_order_drawn_by_lot(
    command: Command, monkeypatch: pytest.MonkeyPatch, answered: Path, tmp_path: Path
) -> None:
    path = shutil.copytree(answered, tmp_path / "search")
    shown = typed(command, monkeypatch, path, ["q"], 5)
    shown = shown[: shown.index("a, b, = or q")]
    assert not any(one.name in shown for one in Search(path).front.points)
    assert "weight" not in shown
    pairs = list(Picker(Search(path), print).pairs(60))
    assert pairs == list(Picker(Search(path), print).pairs(60))
    first, second = (sorted({name for pair in pairs for name in [getattr(pair, side)]}) for side in ("a", "b"))
    assert first == second
    assert all(pair.a != pair.b for pair in pairs)


def test_nothing_typed_says_so(
    command: Command, monkeypatch: pytest.MonkeyPatch, answered: Path, tmp_path: Path
) -> None:
    path = shutil.copytree(answered, tmp_path / "search")
    assert "say nothing yet" in typed(command, monkeypatch, path, [], 5)
    assert "say nothing yet" in typed(command, monkeypatch, path, ["="] * 5, 5)


def test_a_front_without_models_is_refused(command: Command, tmp_path: Path) -> None:
    path = make_search(tmp_path / "search", reports=9)
    assert "the front has 0 models in folders, and two are compared" in refused(command, "pick", path)


def test_models_answer_once(tiny_run: Tiny, answered: Path, tmp_path: Path) -> None:
    path = shutil.copytree(answered, tmp_path / "search")
    shutil.rmtree(path / "answers")
    for one in Search(path).front.points:
        folder = path / "trials" / one.name
        (folder / "config.yaml").write_text(tiny_run.config(rollout={"rows_per_request": 4}).to_yaml())
        shutil.copytree(tiny_run.policy, folder / "model", dirs_exist_ok=True)
    said: list[str] = []
    picker = Picker(Search(path), said.append)
    name = picker.models[0].name
    assert len(picker.answers["tune"][name]) == 6  # more than a request has
    answer = picker.answers["tune"][name][-1]
    assert set(answer.metrics) == {"match", "length"}
    assert any(word in answer.prompt for word in ("red", "blue", "green", "gold"))
    assert len(said) == 2 * len(picker.models)
    assert list(picker.pairs(5)) == []  # one policy answers the same everywhere
    said.clear()
    Picker(Search(path), said.append)
    assert said == []
