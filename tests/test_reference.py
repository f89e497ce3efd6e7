"""The reference policy, wherever it is: the same distances, refreshed at the same steps, also after a resume."""

from pathlib import Path
from typing import Any

import pytest
import tiny
from conftest import Tiny

from rl_llm.runs.run import Run

KL = {"coef": 0.05}
ACTORS = {
    "num_rollout_workers": 1, "num_cpus_per_rollout_worker": 0.3, "num_learners": 1, "num_cpus_per_learner": 0.3,
}  # fmt: skip


def kl(run: Run) -> list[float]:
    return run.metrics["kl"].tolist()


@pytest.mark.parametrize("trainable", ["all", "lora"])
def test_rollout_workers_and_learner_find_the_same_distances(tiny_run: Tiny, tmp_path: Path, trainable: str) -> None:
    def run(place: str) -> Run:
        algorithm = {"kl": KL, "reference": {"place": place, "refresh_every": 3}}
        return tiny.train(tiny_run.config(algorithm=algorithm, policy={"trainable": trainable}), tmp_path / place)

    learner, rollout = run("learner"), run("rollout")
    assert kl(rollout) == pytest.approx(kl(learner), rel=1e-3, abs=1e-6)
    # Nothing has moved before the first step, nor after the refresh that follows the third.
    assert [abs(distance) < 1e-6 for distance in kl(learner)] == [True, False, False, True, False, False]
    assert "ref_logprobs" in rollout.rollouts(1).column_names


def test_reference_in_actors_is_that_of_one_process_and_survives_a_resume(
    tiny_run: Tiny, ray_session: None, tmp_path: Path
) -> None:
    sections: dict[str, Any] = {"algorithm": {"kl": KL, "reference": {"place": "rollout", "refresh_every": 3}}}
    here = tiny.train(tiny_run.config(**sections), tmp_path / "here")
    tiny.train(tiny_run.config(**sections, resources=ACTORS, trainer={"steps": 4}), tmp_path / "actors")
    actors = tiny.train(tiny_run.config(**sections, resources=ACTORS), tmp_path / "actors", resume=True)
    assert tiny.metrics(actors.path) == tiny.metrics(here.path)
