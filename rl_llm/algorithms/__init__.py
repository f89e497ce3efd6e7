"""What an algorithm is: an advantage, a policy loss, an aggregation and a place for the KL.

A preset is a few lines in `PRESETS`; the config's own `algorithm.*` settings go over it. What each is for, and which
paper it is from, is in docs/algorithms.md.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from torch import Tensor

from rl_llm.algorithms import advantages
from rl_llm.algorithms.correction import BOUNDS
from rl_llm.algorithms.losses import LOSSES, LossInputs, PolicyLoss, sequence_ratio, token_ratio
from rl_llm.config import Aggregation, AlgorithmConfig
from rl_llm.errors import RunFailed, UserError, did_you_mean
from rl_llm.groups import Scale
from rl_llm.imports import import_function

AdvantageEstimator = Callable[..., Tensor]


@dataclass(frozen=True)
class Algorithm:
    """A resolved algorithm.

    Attributes:
        advantage: a group's, made before the learner (`grpo`, `dr_grpo`, `rloo`), or a token's, made in it (`returns`,
            `gae`).
        aggregation: how token losses become one number, see `losses.aggregate`.
        kl_placement: whether the KL is part of the loss or of the reward.
        policy_loss: `LossInputs -> loss [R, T]`, see `losses.py`.
        ratio: what is clipped: each token's probability ratio, or the sequence's.
        clip_low, clip_high: how far the ratio may leave 1.
        gamma, lam: discount, and GAE's lambda.
        whiten: advantages to mean 0 and variance 1 over all tokens of the batch.
        resample: rounds of further prompts that take the place of groups without signal.
        kl_estimator, correction_bounds: with the defaults of their kinds filled in.
    """

    advantage: str
    aggregation: Aggregation
    kl_placement: Literal["loss", "reward"] = "loss"
    policy_loss: PolicyLoss = LOSSES["clipped"]
    ratio: Literal["token", "sequence"] = "token"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    gamma: float = 1.0
    lam: float = 0.95
    whiten: bool = False
    resample: int = 0
    kl_estimator: str = "k3"
    correction_bounds: tuple[float, float] = (0.0, 0.0)

    @property
    def per_token(self) -> bool:
        """Whether advantages are made in the learner, of an outcome a sequence; groups then play no part."""
        return self.advantage not in advantages.SCALE

    @property
    def scale(self) -> Scale:
        """What the mixture makes advantages with: the group's factor, or 1 and so the distance from the mean."""
        return advantages.SCALE.get(self.advantage, advantages.SCALE["dr_grpo"])

    @property
    def estimator(self) -> AdvantageEstimator:
        """The advantage with that factor, `(rewards, groups, valid) -> advantages`, see `advantages.py`."""
        return partial(advantages.scaled, self.scale)

    def loss(self, logprobs: Tensor, old_logprobs: Tensor, advantage: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The token loss [R, T], and where the ratio was outside its bounds, bool [R, T]."""
        ratio = (sequence_ratio if self.ratio == "sequence" else token_ratio)(logprobs, old_logprobs, mask)
        inputs = LossInputs(
            logprobs, old_logprobs, ratio, advantage, mask, self.clip_low, self.clip_high, self.dual_clip
        )
        outside = ratio.detach() != inputs.clipped_ratio.detach()
        loss = self.policy_loss(inputs)
        # A mean would be spread over the tokens without a word, and depend on micro-batches.
        if not isinstance(loss, Tensor) or loss.shape != logprobs.shape:
            shape = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise RunFailed(f"algorithm.loss must return a loss a token, {list(logprobs.shape)} here, not {shape}")
        return loss, outside


PRESETS = {
    "grpo": Algorithm("grpo", "seq_mean_token_mean"),
    "dr_grpo": Algorithm("dr_grpo", "seq_mean_token_sum_norm"),
    "rloo": Algorithm("rloo", "token_mean", "reward"),
    "dapo": Algorithm("grpo", "token_mean", clip_high=0.28, resample=3),
    "gspo": Algorithm("grpo", "seq_mean_token_mean", ratio="sequence", clip_low=3e-4, clip_high=4e-4),
    "cispo": Algorithm("grpo", "token_mean", policy_loss=LOSSES["cispo"], clip_low=1.0, clip_high=4.0),
    "ppo": Algorithm("gae", "token_mean", "reward", whiten=True),
    "reinforce": Algorithm("returns", "token_mean", "reward", LOSSES["policy_gradient"], whiten=True),
    "reinforce_pp": Algorithm("returns", "token_mean", "reward", whiten=True),
}


def build_algorithm(config: AlgorithmConfig) -> Algorithm:
    """The preset named in the config with what the config sets explicitly put over it.

    Raises:
        UserError: settings that do not go together, or a loss that cannot be found.
    """
    names = ("advantage", "ratio", "clip_low", "clip_high", "dual_clip", "aggregation")
    given = {name: getattr(config, name) for name in (*names, "gamma", "lam", "whiten", "resample")}
    given["policy_loss"] = config.loss and _find_loss(config.loss)
    given["kl_placement"] = config.kl.placement
    algorithm = replace(PRESETS[config.name], **{key: value for key, value in given.items() if value is not None})
    _refuse_idle(config, algorithm)
    in_loss = algorithm.kl_placement == "loss"
    low, high = BOUNDS.get(config.correction.kind, (0.0, 0.0))
    asked = config.correction
    algorithm = replace(
        algorithm,
        kl_estimator=config.kl.estimator or ("k3" if in_loss else "k1"),
        correction_bounds=(low if asked.low is None else asked.low, high if asked.high is None else asked.high),
    )
    low, high = algorithm.correction_bounds
    if asked.kind != "none" and low >= high:
        raise UserError(f"algorithm.correction: low {low:g} must be below high {high:g} ({asked.kind})")
    if config.kl.coef and in_loss and algorithm.kl_estimator == "k1":
        raise UserError("algorithm.kl.estimator k1 teaches nothing in the loss; take k2 or k3, or kl.placement=reward")
    if config.kl.coef and not in_loss and algorithm.advantage == "grpo":
        raise UserError(
            "algorithm.kl.placement=reward: the advantage grpo is divided by the reward's spread before the KL is "
            "known; take kl.placement=loss, or the advantage dr_grpo, rloo, returns or gae"
        )
    return algorithm


def _refuse_idle(config: AlgorithmConfig, algorithm: Algorithm) -> None:
    """Raise `UserError` for a setting that would do nothing beside the others."""
    own_loss = config.loss is not None and ":" in config.loss
    clips = algorithm.policy_loss is not LOSSES["policy_gradient"]
    idle = {
        "gamma": (not algorithm.per_token, "only the advantages returns and gae discount"),
        "lam": (algorithm.advantage != "gae", "lambda is of the advantage gae"),
        "clip_low": (not clips, "the loss policy_gradient clips nothing"),
        "clip_high": (not clips, "the loss policy_gradient clips nothing"),
        "ratio": (not clips, "the loss policy_gradient has no ratio"),
        "dual_clip": (not own_loss and algorithm.policy_loss is not LOSSES["clipped"], "it is of the loss clipped"),
    }
    for name, (does_nothing, why) in idle.items():
        if does_nothing and getattr(config, name) is not None:
            raise UserError(f"algorithm.{name} would do nothing with algorithm.name={config.name}: {why}; leave it out")


def _find_loss(name: str) -> PolicyLoss:
    if ":" in name:
        return import_function(name, "algorithm.loss")
    if name not in LOSSES:
        raise UserError(f"algorithm.loss {name!r}: {did_you_mean(name, LOSSES)}, or package.module:function")
    return LOSSES[name]
