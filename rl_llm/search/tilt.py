"""The base policy, tilted: what the optimum of a KL-regularised reward makes of its samples.

Of all policies at the same KL from the base, the one with the highest expected reward A is p(y) exp(A(y) / tau) up to a
constant (arXiv 2305.18290, equation 4). Over n samples of the base it is a weight a sample, softmax(A / tau) in each
group, and every expectation under it is a weighted mean. The KL of such weights q is sum q log(n q), from 0 to log n.
"""

from dataclasses import dataclass

import numpy as np

_ITERATIONS = 60
_TIE = 1e-9  # advantages nearer than this, in spreads, are equal
_REACHED = 0.95  # of the highest KL: at 1 the best sample of a group has all the weight


@dataclass(frozen=True)
class Tilted:
    """W weightings' weights of the samples of P prompts.

    Attributes:
        q: float64 [W, P, n], each group's adding up to 1.
        tau: float64 [W], infinite where a weighting has no signal.
        kl: float64 [W], mean over prompts, nats a completion.
        ess: float64 [W], effective samples a group 1 / sum q^2 (Kish 1965), mean over prompts.
    """

    q: np.ndarray
    tau: np.ndarray
    kl: np.ndarray
    ess: np.ndarray


def reach(advantages: np.ndarray) -> np.ndarray:
    """The highest mean KL that comes out of advantages [W, P, n] without resting on ties, [W].

    As tau goes to 0 a group's weight spreads evenly over its m best samples, whose KL is log(n / m).
    """
    best = advantages.max(axis=2, keepdims=True)
    ties = (advantages >= best - _TIE * _spread(advantages)[:, None, None]).sum(axis=2)
    highest: np.ndarray = _REACHED * np.log(advantages.shape[2] / ties).mean(axis=1)
    return highest


def tilt(advantages: np.ndarray, kl: float) -> Tilted:
    """Weights whose mean KL is `kl`, or what can be reached where that is less, from advantages [W, P, n].

    tau is one number a weighting, so groups that differ more move more. It is solved by Newton's method on
    log KL over log tau, whose derivative is -Var_q(A / tau) / KL, kept within a bracket by bisection.
    """
    spread = _spread(advantages)
    live = spread > 0
    shifted = advantages - advantages.max(axis=2, keepdims=True)
    shifted = shifted / np.where(live, spread, 1.0)[:, None, None]
    goal = np.minimum(kl, reach(advantages))
    solved = live & (goal > 0)
    x, low, high = np.zeros(len(spread)), np.full(len(spread), -20.0), np.full(len(spread), 20.0)
    q, found = _softmax(shifted, x)
    for _ in range(_ITERATIONS):
        wrong = solved & (np.abs(found - goal) > 1e-10 * goal)
        if not wrong.any():
            break
        rows = shifted[wrong]
        low = np.where(found > goal, x, low)
        high = np.where(found > goal, high, x)
        scaled = rows / np.exp(x[wrong])[:, None, None]
        mean = (q[wrong] * scaled).sum(axis=2, keepdims=True)
        variance = np.maximum((q[wrong] * (scaled - mean) ** 2).sum(axis=2).mean(axis=1), 1e-300)
        now, aim = np.maximum(found[wrong], 1e-300), goal[wrong]
        step = x[wrong] + np.log(now / aim) * now / variance
        inside = (step > low[wrong]) & (step < high[wrong])
        x[wrong] = np.where(inside, step, (low[wrong] + high[wrong]) / 2)
        q[wrong], found[wrong] = _softmax(rows, x[wrong])
    q[~solved], found[~solved] = 1 / advantages.shape[2], 0.0
    tau = np.where(solved, np.exp(x) * spread, np.inf)
    return Tilted(q, tau, found, (1 / (q**2).sum(axis=2)).mean(axis=1))


def _spread(advantages: np.ndarray) -> np.ndarray:
    """Root mean square of the deviations from the groups' means, [W]; exactly 0 where all samples of a group tie."""
    ranges = advantages.max(axis=2) - advantages.min(axis=2)
    deviations = advantages - advantages.mean(axis=2, keepdims=True)
    return np.where((ranges > 0).any(axis=1), np.sqrt((deviations**2).mean(axis=(1, 2))), 0.0)


def _softmax(shifted: np.ndarray, log_tau: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights [W, P, n] and their mean KL [W] of advantages whose highest is 0 in each group."""
    scaled = shifted / np.exp(log_tau)[:, None, None]
    q = np.exp(scaled)
    total = q.sum(axis=2, keepdims=True)
    q /= total
    kl = (q * scaled).sum(axis=2) - np.log(total[:, :, 0] / shifted.shape[2])
    return q, kl.mean(axis=1)
