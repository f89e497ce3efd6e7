"""Which prompts come next, and which are held out."""

import numpy as np
import pyarrow as pa

from rl_llm.rng import Purpose, stream


class PromptSource:
    """The train split without end, a walk through one shuffle of it after another.

    Attributes:
        position: prompts taken so far; may be set to go on from elsewhere.
    """

    def __init__(self, train: pa.Table, seed: int) -> None:
        self.train, self.seed, self.position = train, seed, 0

    def take(self, count: int) -> pa.Table:
        """The next `count` prompts."""
        size = self.train.num_rows
        positions = np.arange(self.position, self.position + count)
        rows = np.empty(count, dtype=np.int64)
        for epoch in np.unique(positions // size):
            shuffle = stream(self.seed, Purpose.SHUFFLE, int(epoch)).permutation(size)
            here = positions // size == epoch
            rows[here] = shuffle[positions[here] % size]
        self.position += count
        return self.train.take(pa.array(rows))


def held_out(split: pa.Table, count: int) -> pa.Table:
    """The same `count` rows of a split each time, drawn from all over it: sources are often sorted."""
    order = stream(0, Purpose.HELD_OUT, split.num_rows).permutation(split.num_rows)
    return split.take(pa.array(np.sort(order[:count])))
