"""A step's rows on their way through the updates they are used for."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from rl_llm.algorithms.losses import Divisor
from rl_llm.config import RunConfig
from rl_llm.policies.packing import Group, GroupBatch, cut, make_groups, microbatches, pack
from rl_llm.table import REF_LOGPROBS, ragged

# Second word of the key of the draw of minibatches, above any sample's id.
MINIBATCHES = 1 << 60


@dataclass
class Minibatch:
    """The rows of one update: this learner's micro-batches, and the counts over those of all learners."""

    parts: list[GroupBatch]
    divisor: Divisor


@dataclass
class Batch:
    """N rows with completions of up to T tokens.

    Attributes:
        temperature: they were sampled at.
        groups: int64 [N].
        weights: float64 [N], the advantage, or where the learner makes advantages the outcome, of each row.
        mask: bool [N, T], the tokens the policy chose.
        mine: bool [N], rows that this learner computes.
        minibatches: the updates of a pass over the rows.
        tokens: [N, T] tables by name, float32: `engine_logprobs`, `advantages`, and what the learner adds. In that,
            rows of other learners stay 0.
    """

    temperature: float
    groups: Tensor
    weights: Tensor
    mask: Tensor
    mine: Tensor
    minibatches: list[Minibatch]
    tokens: dict[str, Tensor] = field(default_factory=dict)

    def put(self, name: str, part: GroupBatch, values: Tensor) -> None:
        """Note values [R, t] of a micro-batch's rows in the table `name`."""
        self.tokens[name][part.rows, : values.shape[1]] = values.detach().float().cpu()

    def take(self, name: str, part: GroupBatch, device: torch.device) -> Tensor:
        """The rows of a micro-batch, [R, t]; `name` is of a table or "mask"."""
        table = self.mask if name == "mask" else self.tokens[name]
        return table[part.rows, : part.mask.shape[1]].to(device)

    def parts(self) -> Iterator[GroupBatch]:
        for minibatch in self.minibatches:
            yield from minibatch.parts


def make_batch(table: pa.Table, weights: str, config: RunConfig, step: int, rank: int, learners: int) -> Batch:
    """Lay out the rows of a rollout table.

    Minibatches are drawn once a step, by whole groups; which rows share an update does not depend on the learners. Each
    learner takes whole packed groups, so that all have about the same number of tokens. Groups are cut only where an
    update has fewer of them than there are learners, at the price of reading their prompt again.

    Args:
        table: [N] rows, all of them to be trained on.
        weights: the column that `Batch.weights` is.
        step: from 0; keys the draw.
    """
    chosen, completions = ragged(table["action_mask"]), ragged(table["completion_ids"])
    group_ids = table["group"].to_numpy()
    budget = config.learner.tokens_per_microbatch
    groups = make_groups(group_ids.tolist(), ragged(table["prompt_ids"]), completions, budget)
    mask = torch.from_numpy(_padded(chosen, bool))
    batch = Batch(
        temperature=float(table["temperature"][0].as_py()) or 1.0,
        groups=torch.from_numpy(group_ids.copy()),
        weights=torch.tensor(table[weights].to_numpy(), dtype=torch.float64),
        mask=mask,
        mine=torch.zeros(len(chosen), dtype=torch.bool),
        minibatches=[],
        tokens={"engine_logprobs": torch.from_numpy(_padded(ragged(table["logprobs"]), np.float32))},
    )
    if REF_LOGPROBS in table.column_names:
        batch.tokens[REF_LOGPROBS] = torch.from_numpy(_padded(ragged(table[REF_LOGPROBS]), np.float32))
    for ids in _draw(np.unique(group_ids), config.learner.minibatches, config.trainer.seed, step):
        rows = np.isin(group_ids, ids)
        mine = _share([group for group in groups if rows[group.rows[0]]], rank, learners)
        divisor = Divisor(
            tokens=int(mask[torch.from_numpy(rows)].sum()),
            sequences=int(rows.sum()),
            max_length=config.rollout.max_new_tokens,
        )
        batch.minibatches.append(Minibatch([pack(part) for part in microbatches(mine, budget)], divisor))
        batch.mine[[row for group in mine for row in group.rows]] = True
    return batch


def _draw(ids: np.ndarray, count: int, seed: int, step: int) -> list[np.ndarray]:
    """The groups of each minibatch: `count` of them, or as many as there are groups."""
    if count == 1:
        return [ids]
    order = np.random.Generator(np.random.Philox(key=[seed, MINIBATCHES + step])).permutation(ids)
    return np.array_split(order, min(count, len(ids)))


def _share(groups: list[Group], rank: int, learners: int) -> list[Group]:
    """This learner's groups: the largest first, each to whoever has the fewest tokens so far.

    Fewer groups than learners are cut into as many parts as give everybody one.
    """
    if 0 < len(groups) < learners:
        parts = -(-learners // len(groups))
        groups = [
            part
            for group in groups
            for part in cut(group, len(group.prompt) + -(-(group.tokens - len(group.prompt)) // parts))
        ]
    shares: list[list[Group]] = [[] for _ in range(learners)]
    load = [0] * learners
    for group in sorted(groups, key=lambda g: (-g.tokens, g.rows)):
        least = load.index(min(load))
        shares[least].append(group)
        load[least] += group.tokens
    return shares[rank]


def _padded(rows: list[np.ndarray], dtype: type) -> np.ndarray:
    """Ragged rows as one table [N, T], zeros behind their ends."""
    out: np.ndarray = np.zeros((len(rows), max(map(len, rows))), dtype=dtype)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out
