"""Every random stream of a run, by its purpose: no two purposes share one, whatever their counters.

A stream is a counter-based generator (Philox) keyed by the run's seed and a number whose high byte is the purpose. So a
draw depends on what it is for and on nothing else: not on who draws, in which batch, or after what.
"""

from enum import IntEnum

import numpy as np

_COUNTERS = 56  # bits of a key below the purpose


class Purpose(IntEnum):
    """What is drawn, and what the counter beside it counts."""

    SAMPLE = 0  # tokens of a training sample; sample ids
    SHUFFLE = 1  # the order of prompts; epochs
    HELD_OUT = 2  # which rows of a split are measured; rows of the split
    BOOTSTRAP = 3  # resampled means; values
    WEIGHTINGS = 5  # points on a large simplex of reward weights
    POINT = 6  # points of a search; trials
    PERTURBATION = 7  # points that a trial of a population moves to; members, then levels in the upper bits
    PAIR = 8  # answers shown side by side; pairs
    MINIBATCH = 16  # which groups share an update; steps
    EXAMPLES = 32  # supervised examples; 1 for self-supervised ones
    EVALUATION = 64  # tokens of an evaluation's samples; samples
    FORECAST = 65  # tokens of a forecast's samples; samples


def key(purpose: Purpose, counter: int) -> int:
    """The second word of a stream's key; a sample's is its id."""
    if not 0 <= counter < 1 << _COUNTERS:
        raise ValueError(f"{purpose.name}: counter {counter} is outside 0 to 2^{_COUNTERS}")
    return purpose << _COUNTERS | counter


def keyed(seed: int, key: int) -> np.random.Generator:
    """The stream of a key."""
    return np.random.Generator(np.random.Philox(key=[seed, key]))


def stream(seed: int, purpose: Purpose, counter: int = 0) -> np.random.Generator:
    """The stream of a purpose and its counter."""
    return keyed(seed, key(purpose, counter))
