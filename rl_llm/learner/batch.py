"""A step's rows on their way through the updates they are used for."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from rl_llm.algorithms.losses import Divisor
from rl_llm.config import RunConfig
from rl_llm.policies import PackedBatch, PackedRow
from rl_llm.policies.packing import cut_row, make_rows, microbatches
from rl_llm.rng import Purpose, stream
from rl_llm.table import ragged


@dataclass
class Minibatch:
    """The rows of one update: this learner's micro-batches, and the counts over those of all learners."""

    microbatches: list[PackedBatch]
    divisor: Divisor


@dataclass
class Batch:
    """N rows with completions of up to T tokens.

    Attributes:
        temperature: float64 [N], what each row was sampled at; 1 where that was greedy.
        groups: int64 [N].
        advantages: float64 [N], of each row in its group.
        outcomes: float64 [N], what advantages of tokens are made of; None where the algorithm makes none.
        mask: bool [N, T], the tokens the policy chose.
        mine: bool [N], rows that this learner computes.
        minibatches: the updates of a pass over the rows.
        tokens: [N, T] tables by name, float32: `engine_logprobs`, `advantages`, and what the learner adds. In that,
            rows of other learners stay 0.
    """

    temperature: Tensor
    groups: Tensor
    advantages: Tensor
    outcomes: Tensor | None
    mask: Tensor
    mine: Tensor
    minibatches: list[Minibatch]
    tokens: dict[str, Tensor] = field(default_factory=dict)

    def put(self, name: str, part: PackedBatch, values: Tensor) -> None:
        """Note values [R, t] of a micro-batch's rows in the table `name`."""
        self.tokens[name][part.rows, : values.shape[1]] = values.detach().float().cpu()

    def take(self, name: str, part: PackedBatch, device: torch.device) -> Tensor:
        """The rows of a micro-batch, [R, t]; `name` is of a table or "mask"."""
        table = self.mask if name == "mask" else self.tokens[name]
        return table[part.rows, : part.mask.shape[1]].to(device)

    def microbatches(self) -> Iterator[PackedBatch]:
        for minibatch in self.minibatches:
            yield from minibatch.microbatches


def make_batch(
    table: pa.Table,
    config: RunConfig,
    step: int,
    pack: Callable[[Sequence[PackedRow]], PackedBatch],
    rank: int = 0,
    learners: int = 1,
) -> Batch:
    """Lay out the rows of a rollout table.

    Minibatches are drawn once a step, by whole groups; which rows share an update does not depend on the learners. Each
    learner takes whole packed groups, so that all have about the same number of tokens. Groups are cut only where an
    update has fewer of them than there are learners, at the price of reading their prompt again.

    Args:
        table: [N] rows, all of them to be trained on.
        step: from 0; keys the draw.
        pack: the policy's.
    """
    chosen, completions = ragged(table["action_mask"]), ragged(table["completion_ids"])
    group_ids = table["group"].to_numpy()
    budget = config.learner.tokens_per_microbatch
    groups = make_rows(group_ids.tolist(), ragged(table["prompt_ids"]), completions, budget)
    mask = torch.from_numpy(_padded(chosen, bool))
    temperature, outcomes = table["temperature"].to_numpy().astype(np.float64), "outcome" in table.column_names
    batch = Batch(
        temperature=torch.from_numpy(np.where(temperature == 0, 1.0, temperature)),
        groups=torch.from_numpy(group_ids.copy()),
        advantages=torch.tensor(table["advantage"].to_numpy(), dtype=torch.float64),
        outcomes=torch.tensor(table["outcome"].to_numpy(), dtype=torch.float64) if outcomes else None,
        mask=mask,
        mine=torch.zeros(len(chosen), dtype=torch.bool),
        minibatches=[],
        tokens={"engine_logprobs": torch.from_numpy(_padded(ragged(table["logprobs"]), np.float32))},
    )
    for ids in _draw(np.unique(group_ids), config.learner.minibatches, config.trainer.seed, step):
        rows = np.isin(group_ids, ids)
        mine = _assign([group for group in groups if rows[group.rows[0]]], rank, learners)
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
    order = stream(seed, Purpose.MINIBATCH, step).permutation(ids)
    return np.array_split(order, min(count, len(ids)))


def _assign(groups: list[PackedRow], rank: int, learners: int) -> list[PackedRow]:
    """This learner's groups: the largest first, each to whoever has the fewest tokens so far.

    Fewer groups than learners are cut into as many parts as give everybody one.
    """
    if 0 < len(groups) < learners:
        parts = -(-learners // len(groups))
        groups = [
            part
            for group in groups
            for part in cut_row(group, len(group.prompt) + -(-(group.tokens - len(group.prompt)) // parts))
        ]
    shares: list[list[PackedRow]] = [[] for _ in range(learners)]
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
