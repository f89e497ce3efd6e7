"""The mixture: from raw components to advantages, and whose advantages they are.

The order is: mask > gate > clip > scale > weigh > combine. A component without a value for a row contributes exactly 0
to that row's advantage and leaves the statistics; a row without any value leaves everything. All in numpy, float64.
"""

from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from rl_llm.config import Ramp, RewardsConfig, Scheduled, value_at
from rl_llm.controllers import RULES, Decision, Statistics
from rl_llm.errors import UserError, did_you_mean
from rl_llm.groups import EPS, Grouped, Scale

_EPS_BATCH = 1e-8  # so small that whitening does not depend on the size of the weights, yet rounding noise stays noise
_NO_SIGNAL = 1e-8


@dataclass(frozen=True)
class Mixed:
    """A step's rewards, weighed.

    Attributes:
        reward: float64 [N], the weighted sum of a row's components, NaN where it has none.
        valid: bool [N], rows with at least one component.
        outcome: float64 [N], `reward` with a component that is missing at its group's mean: what algorithms make
            advantages of that are not a group's. With `normalize_then_sum` the advantages themselves.
        advantages: float64 [N], 0 where not valid.
        contributions: by component float64 [N]; they add up to the advantages.
        diagnostics: numbers for `metrics.jsonl`, see `Mixture.mix`.
    """

    reward: np.ndarray
    valid: np.ndarray
    outcome: np.ndarray
    advantages: np.ndarray
    contributions: dict[str, np.ndarray]
    diagnostics: dict[str, float]


class Mixture:
    """Weights and combines components; its weights may be changed between two steps.

    Attributes:
        weights: by component, a number or a `Ramp`; change one with `set_weight`. A controller sets out from them.
    """

    def __init__(self, config: RewardsConfig) -> None:
        self.config = config
        self.weights: dict[str, Scheduled] = dict(config.weights)
        self._baseline: np.ndarray | None = None
        self._controller: dict[str, Any] = {}

    def set_weight(self, name: str, value: Scheduled) -> None:
        """Raises `UserError` where there is no such component or the value is not finite."""
        if name not in self.weights:
            raise UserError(f"weights.{name}: no such component; {did_you_mean(name, self.weights)}")
        if not isinstance(value, Ramp) and not np.isfinite(value):
            raise UserError(f"weights.{name}: {value} is not a finite number")
        self.weights[name] = value if isinstance(value, Ramp) else float(value)

    def weights_at(self, step: int) -> dict[str, float]:
        """The numbers the weights stand for at a step, before a controller."""
        return {name: value_at(weight, step) for name, weight in self.weights.items()}

    def mix(self, components: dict[str, np.ndarray], groups: np.ndarray | None, step: int, scale: Scale) -> Mixed:
        """Weigh the raw components of a step; asked once a step, since a controller goes on with each.

        The first batch ever mixed, the first policy's, sets the baseline that `std_floor` refers to; a component
        without two values in any group of it has no floor.

        Args:
            components: raw values by component, float64 [N], NaN where a row has none.
            groups: int [N], rows of one prompt share a number; None: the batch is one group.
            step: for weights that follow a schedule.
            scale: the algorithm's, what a group's centred weighted sum is multiplied by; not used by
                `normalize_then_sum`.

        Diagnostics, with raw values in what is named after a component:
            `reward/mean`, `reward/std`, `reward/<name>/mean`, `reward/<name>/std`: over rows with a value; left out
            where there is none.
            `share/<name>`: the covariance share of the advantage, sum_i(c_i A_i) / sum_i(A_i^2) for contribution c;
            they add up to 1, or are all 0 where there is no advantage.
            `correlation/<a>~<b>`: Pearson's, of deviations from group means over rows with both; 0 where undefined.
            `weights/<name>`, as applied; `controller/...`: what its rule has to show.
            `groups/without_signal`: share of groups where every advantage is 0.
        """
        raw = np.stack([components[name] for name in self.weights], axis=1)
        batch = Grouped(self._transform(raw), np.zeros(len(raw), int) if groups is None else groups)
        weights, self._controller, controlled = self._decide(raw, batch, step)
        names = list(self.weights)
        baseline = self._baseline = batch.covariance() if self._baseline is None else self._baseline
        valid = batch.present.any(axis=1)
        if self.config.combine == "normalize_then_sum":
            contributions = self._normalize_then_sum(batch, weights, valid, baseline)
            outcome = advantages = contributions.sum(axis=1)
        else:
            contributions = self._sum_then_normalize(batch, weights, valid, baseline, scale)
            outcome = ((batch.means[batch.index] + batch.centred) * weights).sum(axis=1)
            advantages = contributions.sum(axis=1)
        reward = np.where(valid, batch.filled @ weights, np.nan)
        diagnostics = {
            **_moments("reward", reward),
            **{key: n for k, name in enumerate(names) for key, n in _moments(f"reward/{name}", raw[:, k]).items()},
            **_shares(names, contributions, advantages),
            **_correlations(names, raw, batch.index),
            **{f"weights/{name}": float(weight) for name, weight in zip(names, weights, strict=True)},
            **controlled,
            "groups/without_signal": float((batch.largest(advantages) < _NO_SIGNAL).mean()),
        }
        return Mixed(reward, valid, outcome, advantages, dict(zip(names, contributions.T, strict=True)), diagnostics)

    def signal(self, components: dict[str, np.ndarray], groups: np.ndarray, step: int) -> np.ndarray:
        """Rows of groups with something to learn from, samples whose mixtures differ, bool [N]; arguments of `mix`."""
        raw = np.stack([components[name] for name in self.weights], axis=1)
        batch = Grouped(self._transform(raw), groups)
        weights = self._decide(raw, batch, step).weights
        if self.config.combine == "normalize_then_sum":
            baseline = batch.covariance() if self._baseline is None else self._baseline
            valid = batch.present.any(axis=1)
            deviations = self._normalize_then_sum(batch, weights, valid, baseline).sum(axis=1)
        else:
            deviations = batch.centred @ weights
        return (batch.largest(deviations) > _NO_SIGNAL)[batch.index]

    def _decide(self, raw: np.ndarray, batch: Grouped, step: int) -> Decision:
        """The weights of a step and what goes with them, of its raw values [N, K]; nothing of the mixture changes."""
        weights = np.array(list(self.weights_at(step).values()))
        if self.config.controller is None:
            return Decision(weights, {}, {})
        specs = [self.config.components[name] for name in self.weights]
        floor = np.array([min(np.multiply(spec.clip, spec.scale)) if spec.clip else np.nan for spec in specs])
        statistics = Statistics.of(list(self.weights), weights, floor, raw, batch)
        return RULES[self.config.controller.kind](self.config.controller, self._controller, statistics)

    def _transform(self, raw: np.ndarray) -> np.ndarray:
        """Gate, clip and scale, [N, K]. A gate looks at raw values and is shut where the gating component has none."""
        names = list(self.weights)
        out = raw.copy()
        for k, name in enumerate(names):
            config = self.config.components[name]
            if config.gate is not None:
                gating = raw[:, names.index(config.gate.component)]
                low = -np.inf if config.gate.above is None else config.gate.above
                high = np.inf if config.gate.below is None else config.gate.below
                shut = ~((gating >= low) & (gating <= high))
                out[shut & ~np.isnan(raw[:, k]), k] = config.gate.otherwise
            if config.clip is not None:
                out[:, k] = np.clip(out[:, k], *config.clip)
            out[:, k] *= config.scale
        return out

    def _sum_then_normalize(
        self, batch: Grouped, weights: np.ndarray, valid: np.ndarray, baseline: np.ndarray, scale: Scale
    ) -> np.ndarray:
        """The algorithm's advantage of the weighted sum, the components' contributions to it, [N, K].

        A missing value counts as its component's mean over the group, which centring turns into exactly 0.
        """
        contributions = batch.centred * weights
        summed = Grouped(np.where(valid, contributions.sum(axis=1), np.nan), batch.index)
        # Components that a group lacks altogether add no spread to it, so they have no part in its floor.
        live = weights * (batch.counts > 0)
        variance = np.einsum("gk,kl,gl->g", live, baseline, live)
        floor = self.config.std_floor * np.sqrt(np.maximum(variance, 0.0))
        return contributions * scale(summed.counts, summed.std, floor)[batch.index, None]

    def _normalize_then_sum(
        self, batch: Grouped, weights: np.ndarray, valid: np.ndarray, baseline: np.ndarray
    ) -> np.ndarray:
        """GDPO (arXiv 2601.05242), the components' contributions to it, [N, K].

        Each component is centred and divided in its group, weighted, summed, and the sum divided by its unbiased
        standard deviation over the batch's sequences. Its mean is 0 already, so nothing is subtracted.
        """
        floor = self.config.std_floor * np.sqrt(np.diag(baseline))
        contributions = weights * batch.centred / (np.maximum(batch.std, floor) + EPS)[batch.index]
        spread = contributions.sum(axis=1)[valid].std(ddof=1) if valid.sum() > 1 else 0.0
        return contributions / (spread + _EPS_BATCH)

    def state_dict(self) -> dict[str, Any]:
        """Weights, baseline and, where there is one, the controller's state as JSON has them."""
        names = list(self.weights)
        baseline = self._baseline
        controller = self.config.controller
        return {
            "weights": {name: w.model_dump() if isinstance(w, Ramp) else w for name, w in self.weights.items()},
            "baseline": None
            if baseline is None
            else {a: {b: float(baseline[i, j]) for j, b in enumerate(names)} for i, a in enumerate(names)},
            **({"controller": {"kind": controller.kind, "state": self._controller}} if controller else {}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from it; a controller of another kind begins anew.

        Raises `UserError` where the state is of a mixture of other components.
        """
        if set(state["weights"]) != set(self.weights):
            raise UserError(
                f"the saved mixture has the components {sorted(state['weights'])}, this one {sorted(self.weights)}"
            )
        saved = {name: Ramp(**w) if isinstance(w, dict) else w for name, w in state["weights"].items()}
        self.weights = {name: saved[name] for name in self.weights}
        baseline = state["baseline"]
        self._baseline = baseline and np.array([[baseline[a][b] for b in self.weights] for a in self.weights])
        saved_rule, rule = state.get("controller"), self.config.controller
        self._controller = saved_rule["state"] if saved_rule and rule and saved_rule["kind"] == rule.kind else {}


def _moments(key: str, values: np.ndarray) -> dict[str, float]:
    there = values[~np.isnan(values)]
    return {f"{key}/mean": float(there.mean()), f"{key}/std": float(there.std())} if len(there) else {}


def _shares(names: list[str], contributions: np.ndarray, advantages: np.ndarray) -> dict[str, float]:
    total = float(advantages @ advantages)
    shares = contributions.T @ advantages / total if total > len(advantages) * _NO_SIGNAL**2 else np.zeros(len(names))
    return {f"share/{name}": float(share) for name, share in zip(names, shares, strict=True)}


def _correlations(names: list[str], raw: np.ndarray, groups: np.ndarray) -> dict[str, float]:
    out = {}
    for i, j in combinations(range(len(names)), 2):
        both = ~np.isnan(raw[:, [i, j]]).any(axis=1)
        a, b = Grouped(raw[both][:, [i, j]], groups[both]).centred.T
        norm = float(np.sqrt((a @ a) * (b @ b)))
        out[f"correlation/{names[i]}~{names[j]}"] = float(a @ b) / norm if norm > 0 else 0.0
    return out
