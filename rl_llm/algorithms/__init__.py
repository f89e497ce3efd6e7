"""What an algorithm is: an advantage, a policy loss, an aggregation and a place for the KL.

A preset is a few lines in `PRESETS`; the config's own `algorithm.*` settings go before it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from torch import Tensor

from rl_llm.algorithms import advantages
from rl_llm.config import Aggregation, AlgorithmConfig, KLConfig

AdvantageEstimator = Callable[..., Tensor]


@dataclass(frozen=True)
class Algorithm:
    """A resolved algorithm.

    Attributes:
        advantage: `(rewards, groups, valid, std_floor) -> advantages`, see `advantages.py`.
        clip_low, clip_high: bounds of the ratio in the clipped loss.
        aggregation: how token losses become one number, see `losses.aggregate`.
        kl: coefficient and estimator of the KL term added to the token loss.
    """

    advantage: AdvantageEstimator
    aggregation: Aggregation
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl: KLConfig = field(default_factory=KLConfig)


PRESETS = {
    "grpo": Algorithm(advantages.grpo, "seq_mean_token_mean"),
    "dr_grpo": Algorithm(advantages.dr_grpo, "seq_mean_token_sum_norm"),
    "rloo": Algorithm(advantages.rloo, "token_mean"),
}


def build_algorithm(config: AlgorithmConfig) -> Algorithm:
    """The preset named in the config with what the config sets explicitly put over it."""
    given = {name: getattr(config, name) for name in ("clip_low", "clip_high", "aggregation")}
    return replace(PRESETS[config.name], kl=config.kl, **{k: v for k, v in given.items() if v is not None})
