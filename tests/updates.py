"""Updates of a tiny policy on fixed samples, and ways to compare their gradients."""

from typing import Any

import numpy as np
import pyarrow as pa
import tiny
import torch
from conftest import Tiny

from rl_llm.learner.learner import Learner
from rl_llm.policies import CausalLM
from rl_llm.policies.packing import GroupBatch, make_rows, pack
from rl_llm.table import ragged

TEXTS = ["red", "3 please blue", "17 there again now green", "gold gold gold gold gold", "5 then red", "here blue"]
SAMPLES = 4
COUNT = len(TEXTS) * SAMPLES
TEMPERATURE = 0.9
# One step of gradient descent, whatever its size.
PLAIN = {"optimizer": "sgd", "lr": 0.1, "max_grad_norm": 1e9}


def make_shard(policy: CausalLM) -> pa.Table:
    """Six groups of four samples; prompts and completions differ in length."""
    groups = np.repeat(np.arange(len(TEXTS)), SAMPLES)
    params = tiny.greedy(samples_per_prompt=SAMPLES, temperature=TEMPERATURE)
    return tiny.generate(policy, tiny.prompt_table(policy, TEXTS), np.arange(COUNT), groups, params)


def packed(shard: pa.Table) -> GroupBatch:
    """All samples as one batch."""
    completions = ragged(shard["completion_ids"])
    return pack(make_rows(shard["group"].to_pylist(), ragged(shard["prompt_ids"]), completions, 10**6))


def columns(shard: pa.Table, values: np.ndarray | None = None) -> pa.Table:
    """Reward columns with a value for each sample; as they are, a different one each that goes by its id."""
    if values is None:
        values = np.sin(3.0 * shard["sample_id"].to_numpy() + 1)
    column = pa.array(values.astype(np.float32))
    trained = pa.array(np.ones(shard.num_rows, dtype=bool))
    return pa.table({"reward": column, "advantage": column, "outcome": column, "trained": trained})


def update(learner: Learner, columns: pa.Table, step: int, *shards: pa.Table) -> dict[str, float]:
    return learner.update(columns, step, learner.config.learner.lr, None, *shards)


def train(learner: Learner, shard: pa.Table, step: int = 0, values: np.ndarray | None = None) -> dict[str, float]:
    return update(learner, columns(shard, values), step, shard)


def replace(shard: pa.Table, name: str, rows: list[np.ndarray]) -> pa.Table:
    at = shard.column_names.index(name)
    return shard.set_column(at, name, pa.array(rows, shard.schema.field(name).type))


class Spy(Learner):
    """A learner that keeps the gradients of its updates instead of applying them."""

    def apply(self, *args: float) -> None:
        self.gradients = {name: p.grad.clone() for name, p in self.learning.items() if p.grad is not None}
        self.optimizer.zero_grad(set_to_none=True)


def moved(learner: Learner, factor: float = 1.05) -> Learner:
    """The policy away from its reference, and a value head that tells states apart."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in learner.policy.trainable.values():
            p.mul_(factor)
        for name, p in learner.values.items():
            if "head" in name:
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return learner


def spied(tiny_run: Tiny, *shards: pa.Table, away: float = 1.05, **sections: Any) -> tuple[dict, dict]:
    """Gradients and metrics of one update by a learner that is `away` from the base policy."""
    learner = moved(Spy(tiny_run.config(**sections), str(tiny_run.policy)), away)
    metrics = update(learner, pa.concat_tables(columns(shard) for shard in shards), 0, *shards)
    return learner.gradients, metrics


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Relative; of all gradients taken together."""
    assert found.keys() == expected.keys()
    a, b = (torch.cat([g.flatten() for g in side.values()]).double() for side in (found, expected))
    assert b.norm() > 0.01
    return float((a - b).norm() / b.norm())


def snapshot(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in learner.learning.items()}


def gradients_of(parameters: dict[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in parameters.items() if p.grad is not None}
