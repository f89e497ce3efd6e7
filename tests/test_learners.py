"""Several learners over torch.distributed: the same update as one, whoever computes which rows."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from conftest import Tiny
from safetensors.torch import load_file

from rl_llm.errors import RunFailed
from rl_llm.learner.group import LearnerGroup
from rl_llm.learner.learner import Learner
from rl_llm.learner.parallel import DataParallel
from rl_llm.runs.callbacks import Callback
from rl_llm.runs.run import Run

SHARE = {"num_cpus_per_learner": 0.3}
# One plain step of gradient descent: weights differ as gradients do.
PLAIN = {"optimizer": "sgd", "lr": 1.0, "max_grad_norm": 1e9}


def first_step(tiny_run: Tiny, path: Path, learners: int, **sections: Any) -> tuple[dict[str, torch.Tensor], Any]:
    """The weights after one step, and its metrics."""
    config = tiny_run.config(
        trainer={"steps": 1},
        learner=PLAIN | sections.pop("learner", {}),
        checkpoint={"every": 1},
        resources={"num_learners": learners, **SHARE},
        **sections,
    )
    tiny.train(config, path)
    folder = path / "checkpoints" / "step-000001"
    values = {k: v for k, v in load_file(folder / "optimizer.safetensors").items() if k.startswith("value.")}
    return load_file(folder / "weights.safetensors") | values, Run(path).metrics.iloc[0]


@pytest.mark.parametrize(
    ("algorithm", "learners"),
    [
        ({"name": "grpo", "kl": {"coef": 0.1}}, 2),
        ({"name": "rloo", "kl": {"coef": 0.1}}, 3),
        ({"name": "ppo", "value": {"model": "own"}}, 2),
    ],
)
def test_first_gradients_are_those_of_a_single_learner(
    tiny_run: Tiny, ray_session: None, tmp_path: Path, algorithm: dict[str, Any], learners: int
) -> None:
    start = load_file(tiny_run.policy / "model.safetensors")
    # A value model of its own begins as the policy, its head at 0 but for a bias that does not learn of the first step.
    start |= {f"value.trunk.{name}": weight for name, weight in start.items()}
    start["value.head.weight"] = torch.zeros(1, start["model.norm.weight"].shape[0])
    alone, one = first_step(tiny_run, tmp_path / "one", 0, algorithm=algorithm)
    together, several = first_step(tiny_run, tmp_path / "several", learners, algorithm=algorithm)
    names = [name for name in alone if name in start]
    assert ("value.trunk.model.norm.weight" in names) == (algorithm["name"] == "ppo")
    a, b = (torch.cat([(w[n] - start[n]).flatten() for n in names]).double() for w in (together, alone))
    assert b.norm() > 1e-3
    assert float((a - b).norm() / b.norm()) < 1e-5
    for key in ("loss", "grad_norm", "entropy", "mismatch", "tokens/trained"):
        assert several[key] == pytest.approx(one[key], rel=1e-4, abs=1e-6)


def test_minibatches_and_epochs_are_those_of_a_single_learner(
    tiny_run: Tiny, ray_session: None, tmp_path: Path
) -> None:
    learner = {"epochs": 2, "minibatches": 3, "lr": 0.1}
    alone, one = first_step(tiny_run, tmp_path / "one", 0, learner=learner)
    together, several = first_step(tiny_run, tmp_path / "several", 2, learner=learner)
    assert one["clip_fraction"] == pytest.approx(several["clip_fraction"], abs=1e-6)
    for name, weight in alone.items():
        torch.testing.assert_close(together[name], weight, rtol=1e-4, atol=1e-5)


def test_run_of_two_learners_goes_on_from_its_checkpoint_as_if_never_stopped(
    tiny_run: Tiny, ray_session: None, tmp_path: Path
) -> None:
    sections = {"algorithm": {"name": "ppo"}, "resources": {"num_learners": 2, **SHARE}}
    whole = tiny.train(tiny_run.config(**sections), tmp_path / "whole")
    tiny.train(tiny_run.config(**sections, trainer={"steps": 4}), tmp_path / "parts")
    parts = tiny.train(tiny_run.config(**sections), tmp_path / "parts", resume=True)
    assert tiny.metrics(whole.path)[4:] == tiny.metrics(parts.path)[4:]


def test_learner_that_dies_ends_the_run_instead_of_leaving_the_others_waiting(
    tiny_run: Tiny, ray_session: None, tmp_path: Path
) -> None:
    class Kill(Callback):
        def on_step(self, trainer: Any, metrics: dict[str, Any]) -> None:
            if metrics["step"] == 2:
                trainer.learner.kill(rank=1)

    config = tiny_run.config(resources={"num_learners": 2, **SHARE})
    with pytest.raises(RunFailed, match="rank 1"):
        tiny.train(config, tmp_path / "run", Kill())
    assert np.isin([1, 2], Run(tmp_path / "run").metrics["step"]).all()


def test_nobody_waits_for_the_learner_that_trains_the_supervised_control(tiny_run: Tiny) -> None:
    config = tiny_run.config(warm_start={"target": "demonstration"}, resources={"num_learners": 2})
    happened: list[tuple[str, int]] = []

    class Noting(DataParallel):
        def scatter(self, named: Any) -> Any:
            happened.append(("meets the others", self.rank))
            return iter(named)

    class InTurn:
        """A pool that asks one learner after the other, as if each took hours."""

        def call(self, method: str, *args: Any) -> Any:
            for learner in learners:
                answer = getattr(learner, method)(*args)
                happened.append((method, learner.parallel.rank))
            return answer

    learners = [Learner(config, str(tiny_run.policy), rank, parallel=Noting) for rank in (1, 0)]
    prompts = [np.array(ids) for ids in learners[0].policy.tokenizer(["1 please red", "2 now blue"])["input_ids"]]
    trained = LearnerGroup(InTurn(), config).supervise(prompts, [["red"], ["blue"]], tokens=32)  # type: ignore[arg-type]
    assert trained >= 32
    assert happened[:2] == [("supervise", 1), ("supervise", 0)]
    assert sorted(happened[2:]) == [("follow", 0), ("follow", 1), ("meets the others", 0), ("meets the others", 1)]


def test_learner_without_rows_takes_part_in_the_update(tiny_run: Tiny, ray_session: None, tmp_path: Path) -> None:
    def seldom(completions: list[str], **columns: Any) -> list[float | None]:
        return [float(len(text)) if i < 2 else None for i, text in enumerate(completions)]

    config = tiny_run.config(
        trainer={"steps": 1},
        algorithm={"name": "ppo"},
        rollout={"prompts_per_step": 1, "samples_per_prompt": 4, "rows_per_request": 4},
        rewards={"components": {"seldom": {"use": "function:seldom"}}},
        resources={"num_learners": 3, **SHARE},
    )
    run = tiny.train(config, tmp_path / "run", functions={"seldom": seldom})
    assert run.metrics["grad_norm"].iloc[0] > 0
