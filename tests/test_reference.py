"""The reference policy over a whole run: refreshed at its steps, also in actors and after a resume."""

from pathlib import Path
from typing import Any

import tiny
from conftest import Tiny

ACTORS = {
    "num_rollout_workers": 1, "num_cpus_per_rollout_worker": 0.3, "num_learners": 1, "num_cpus_per_learner": 0.3,
}  # fmt: skip


def test_reference_in_actors_is_that_of_one_process_and_survives_a_resume(
    tiny_run: Tiny, ray_session: None, tmp_path: Path
) -> None:
    sections: dict[str, Any] = {
        "algorithm": {"kl": {"coef": 0.05}, "reference": {"refresh_every": 3}}, "policy": {"trainable": "lora"},
    }  # fmt: skip
    here = tiny.train(tiny_run.config(**sections), tmp_path / "here")
    tiny.train(tiny_run.config(**sections, resources=ACTORS, trainer={"steps": 4}), tmp_path / "actors")
    actors = tiny.train(tiny_run.config(**sections, resources=ACTORS), tmp_path / "actors", resume=True)
    assert tiny.metrics(actors.path) == tiny.metrics(here.path)
    # Nothing has moved before the first step, nor after the refresh that follows the third.
    distances = here.metrics["kl"].tolist()
    assert [abs(distance) < 1e-6 for distance in distances] == [True, False, False, True, False, False]
