"""Weights that move by a rule, a function each: what a step shows decides the weights it is mixed with.

A rule is `(settings, state, statistics) -> Decision`, pure and in numpy. It is asked once a step, sets out from the
weights that are configured (or set since), and keeps between steps only what is in its state, plain JSON by component.
Settings never go into the state, so one that is changed on going on holds from then on.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import moocore
import numpy as np

from rl_llm.config import ControllerConfig
from rl_llm.groups import Grouped

_EPS = 1e-8
_MOMENTUM, _LONGEST = 0.1, 0.5  # of the multipliers' gradient, as in the authors' code


@dataclass(frozen=True)
class Statistics:
    """What a step offers a rule: float64 [K] in the order of `names`, over rows with a value, NaN where none has one.

    Attributes:
        names: the components.
        weights: before the rule.
        raw_mean, raw_std: of the raw values, as they are logged.
        mean, lowest: of the values to be weighed, after gate, clip and scale.
        std: of these, unbiased; 0 for a single row.
        floor: what `clip` and `scale` let none of them fall below; NaN where nothing does.
        group_std: [G, K], within groups, unbiased; 0 where a group has less than two values.
    """

    names: list[str]
    weights: np.ndarray
    raw_mean: np.ndarray
    raw_std: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    lowest: np.ndarray
    floor: np.ndarray
    group_std: np.ndarray

    @classmethod
    def of(
        cls, names: list[str], weights: np.ndarray, floor: np.ndarray, raw: np.ndarray, batch: Grouped
    ) -> "Statistics":
        """Of raw values [N, K], NaN for none, and those to be weighed, in their groups."""
        columns = [batch.filled[there, k] for k, there in enumerate(batch.present.T)]
        raws = [raw[there, k] for k, there in enumerate(~np.isnan(raw).T)]

        def each(columns: list[np.ndarray], reduce: Callable[[np.ndarray], float]) -> np.ndarray:
            return np.array([reduce(column) if len(column) else np.nan for column in columns])

        return cls(
            names=names,
            weights=weights,
            raw_mean=each(raws, np.mean),
            raw_std=each(raws, np.std),
            mean=each(columns, np.mean),
            std=each(columns, lambda column: column.std(ddof=1) if len(column) > 1 else 0.0),
            lowest=each(columns, np.min),
            floor=floor,
            group_std=batch.std,
        )


class Decision(NamedTuple):
    """What a rule says: the weights of this step [K], its state for the next, and numbers for `metrics.jsonl`."""

    weights: np.ndarray
    state: dict[str, Any]
    diagnostics: dict[str, float]


def constraint(settings: ControllerConfig, state: dict[str, Any], seen: Statistics) -> Decision:
    """Maximise the other components while each constrained one keeps its bound: Lagrange multipliers.

    Moskovitz et al., arXiv 2310.04373: max over policies, min over mu of v_0 + sum_i s(mu_i) (v_i - t_i), with s the
    logistic function, N constraints, and the policy following (N - sum_i s(mu_i)) A_0 + sum_i s(mu_i) A_i. Here, with a
    and b_i the configured weights,

        weight of a component to be maximised:  a 2 (1 - mean_i s(mu_i))
        weight of a constrained one:            b_i 2 s(mu_i)
        mu_i <- mu_i - lr m_i,  m_i <- 0.1 m_i + g_i,  g_i = s'(mu_i) (v_i - t_i) / spread_i   (t_i - v_i for `at_most`)

    from mu_i = 0, so the run begins with the configured weights. v_i is the mean of a step's raw values; the norm of g
    is held to 0.5 and the momentum is low, as in the authors' code. A step is mixed with the multipliers of the steps
    before it.

    Other than there: what is maximised is the other components, not minus the KL; its factor is a mean over the
    constraints, not a sum; all is doubled; and the distance from the bound is divided by the component's spread over
    the rows of the first step where it has one, so that `lr` means the same for words and for shares.
    """
    multipliers, momenta, spreads = (
        {name: value for name, value in state.get(key, {}).items() if name in settings.constraints}
        for key in ("multipliers", "momenta", "spreads")
    )
    pressure = {name: float(_logistic(multipliers.get(name, 0.0))) for name in settings.constraints}
    others = 2 * (1 - float(np.mean(list(pressure.values()))))
    weights = seen.weights * [2 * pressure[name] if name in pressure else others for name in seen.names]
    gradients, diagnostics = {}, {}
    for name, bound in settings.constraints.items():
        k = seen.names.index(name)
        diagnostics[f"controller/multiplier/{name}"] = pressure[name]
        if np.isnan(seen.raw_mean[k]):
            continue
        slack = float(seen.raw_mean[k] - bound.at_least if bound.at_most is None else bound.at_most - seen.raw_mean[k])
        diagnostics[f"controller/violation/{name}"] = max(-slack, 0.0)
        if name not in spreads and seen.raw_std[k] > 0:
            spreads[name] = float(seen.raw_std[k])
        gradients[name] = pressure[name] * (1 - pressure[name]) * slack / spreads.get(name, 1.0)
    norm = float(np.linalg.norm(list(gradients.values())))
    for name, gradient in gradients.items():
        momenta[name] = _MOMENTUM * momenta.get(name, 0.0) + gradient * min(1.0, _LONGEST / max(norm, _EPS))
        multipliers[name] = multipliers.get(name, 0.0) - settings.lr * momenta[name]
    return Decision(weights, {"multipliers": multipliers, "momenta": momenta, "spreads": spreads}, diagnostics)


def variation(settings: ControllerConfig, state: dict[str, Any], seen: Statistics) -> Decision:
    """What still varies counts for more: the coefficient of variation, SAW (He et al., arXiv 2606.07705).

    cv_k = std_k / (mean_k - lowest_k + 1e-8) over the rows of this very step, and w_k = a_k n cv_k / sum_l cv_l with
    the configured weights a and n components that have a weight and a value. Where none varies the weights are the
    configured ones. The paper takes the theoretically lowest value of a component; that is known here where it has a
    `clip`, else it is the lowest seen so far, at most 0. The factor n is the paper's for components normalised first;
    for the sum of rewards it has none, which makes no difference to an advantage that is divided by its spread.
    """
    least = np.fmin(seen.lowest, [state.get(name, 0.0) for name in seen.names])
    lowest = np.where(np.isnan(seen.floor), np.fmin(least, 0.0), seen.floor)
    taking_part = ~np.isnan(seen.mean) & (seen.weights != 0)
    cv = np.where(taking_part, seen.std / (np.abs(seen.mean - lowest) + _EPS), 0.0)
    total = cv.sum()
    factors = np.where(taking_part, taking_part.sum() * cv / total, 1.0) if total > _EPS else np.ones(len(cv))
    state = {name: float(lowest[k]) for k, name in enumerate(seen.names) if np.isnan(seen.floor[k])}
    return Decision(seen.weights * factors, state, _named("controller/variation", seen.names, cv))


def variance(settings: ControllerConfig, state: dict[str, Any], seen: Statistics) -> Decision:
    """What tells the samples of a group apart counts for more: DVAO (Jiang et al., arXiv 2605.25604).

    In a group with standard deviations s_k the paper weighs the normalised advantages of the components by
    a_k s_k / sum_l a_l s_l, with configured weights a. A weight here is one for the whole step: the mean of that over
    the step's groups with any spread, times sum_l |a_l|, so that equal spreads leave the weights as they are. It is
    made of this very step's rows. Where no group has a spread the weights are the configured ones. The sum is divided
    by its spread over the batch, as everywhere with `normalize_then_sum`; the paper leaves it as it is.
    """
    sizes = np.abs(seen.weights)
    spread = seen.group_std * sizes
    informative = spread[spread.sum(axis=1) > 0]
    weights = seen.weights
    if len(informative):
        shares = (informative / informative.sum(axis=1, keepdims=True)).mean(axis=0)
        weights = np.sign(seen.weights) * shares * sizes.sum()
    return Decision(weights, {}, _named("controller/spread", seen.names, seen.group_std.mean(axis=0)))


def hypervolume(settings: ControllerConfig, state: dict[str, Any], seen: Statistics) -> Decision:
    """A step that widens the front of what the run has reached counts for more (Lu et al., arXiv 2509.11452).

    All weights are multiplied by 0.5 + 1.5 tanh(HV(front + point) - HV(front)), which moves none against another. The
    point is the mean of each component, its sign turned where its weight is negative; the reference point is the first
    policy's, whose step has the factor 1. A point that adds to the hypervolume joins the front.

    The paper measures the point after each update on validation prompts. Here it is this step's batch, sampled by the
    policy after that update, so it is as noisy as a batch, and a step is mixed with its own factor. Means are divided
    by the spread of the first step's rows, or the factor would hang on the components' units. Where a component has no
    value in a step the factor stays what it was.
    """
    signs = np.sign(seen.weights)
    if np.isnan(seen.mean).any():
        factor, volume = state.get("factor", 1.0), state.get("volume", 0.0)
    elif not state:
        factor, volume = 1.0, 0.0
        spread = np.where(seen.std > 0, seen.std, 1.0)
        state = {
            "reference": dict(zip(seen.names, seen.mean.tolist(), strict=True)),
            "spread": dict(zip(seen.names, spread.tolist(), strict=True)),
            "front": {name: [] for name in seen.names},
            "factor": factor,
            "volume": volume,
        }
    else:
        reference, spread, front = (
            np.array([state[key][name] for name in seen.names]) for key in ("reference", "spread", "front")
        )
        points = np.vstack([front.T, (seen.mean - reference) / spread])
        seen_as = (points * signs)[:, signs != 0]
        volume = _volume(seen_as)
        gain = max(volume - _volume(seen_as[:-1]), 0.0)
        factor = 0.5 + 1.5 * float(np.tanh(gain))
        if gain > 0:
            front = points[moocore.is_nondominated(seen_as, maximise=True)].T
        columns = dict(zip(seen.names, front.tolist(), strict=True))
        state = {**state, "front": columns, "factor": factor, "volume": volume}
    return Decision(seen.weights * factor, state, {"controller/factor": factor, "controller/hypervolume": volume})


Rule = Callable[[ControllerConfig, dict[str, Any], Statistics], Decision]

RULES: dict[str, Rule] = {
    "constraint": constraint,
    "variation": variation,
    "variance": variance,
    "hypervolume": hypervolume,
}


def _logistic(x: float) -> float:
    return 0.5 * (1 + np.tanh(x / 2))


def _volume(points: np.ndarray) -> float:
    """Hypervolume of points to be maximised above the origin."""
    return float(moocore.hypervolume(points, ref=0, maximise=True)) if points.size else 0.0


def _named(key: str, names: list[str], values: np.ndarray) -> dict[str, float]:
    return {f"{key}/{name}": float(value) for name, value in zip(names, values, strict=True)}
