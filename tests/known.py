"""Inputs of the known answers: four samples of two groups, up to five tokens long, in float64.

The answers to them were worked out from the formulas of each paper, apart from the code under test.
"""

import torch
from torch import Tensor

from rl_llm.algorithms.losses import Divisor


def f64(values: object) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64)


def close(actual: object, expected: object, rel: float = 1e-10) -> None:
    torch.testing.assert_close(f64(actual), f64(expected), rtol=rel, atol=rel)


MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0]], dtype=torch.bool)
OLD = f64(
    [[-1.0, -0.5, -2.0, 0, 0], [-0.7, -1.2, -0.3, -0.9, -1.5], [-0.4, -2.5, 0, 0, 0], [-1.1, -0.6, -0.8, -1.9, 0]]
)
NEW = OLD + f64(
    [[0.1, 0.3, -0.4, 0, 0], [0.05, -0.25, 0, 0.2, -0.1], [-0.3, 1.2, 0, 0, 0], [0.15, -0.05, 0.35, -0.6, 0]]
)
REF = OLD + f64([[-0.05, 0.1, 0.2, 0, 0], [0, 0.15, -0.1, 0.05, 0.25], [0.2, -0.3, 0, 0, 0], [0.1, 0, -0.2, 0.3, 0]])
ENGINE = OLD - f64(
    [[0.02, -0.01, 0.9, 0, 0], [-0.03, 0, 0.05, -0.02, 0.01], [0, 0.04, 0, 0, 0], [-0.8, 0.03, -0.02, 0.06, 0]]
)
VALUES = f64([[0.2, 0.4, 0.6, 0, 0], [0.1, 0.1, 0.2, 0, -0.1], [0.3, 0.5, 0, 0, 0], [0.9, 1.1, 1.3, 1.6, 0]])
REWARDS = f64([1, 0, 0.5, 2])
GROUPS = torch.tensor([0, 0, 1, 1])
ALL = torch.ones(4, dtype=torch.bool)
DIVISOR = Divisor(tokens=int(MASK.sum()), sequences=4, max_length=5)
