"""The section `algorithm`: what a step's loss is made of."""

from typing import Literal

from pydantic import Field, model_validator

from rl_llm.config.base import Section

Aggregation = Literal["token_mean", "token_sum", "seq_mean_token_sum", "seq_mean_token_sum_norm", "seq_mean_token_mean"]
Preset = Literal["grpo", "dr_grpo", "rloo", "dapo", "gspo", "cispo", "ppo", "reinforce", "reinforce_pp"]

PRESET = "empty: the preset's own"


class KLConfig(Section):
    """How the policy is held to the reference policy."""

    coef: float = Field(0.0, ge=0, description="0: no KL, and no reference policy is kept")
    placement: Literal["loss", "reward"] | None = Field(None, description=PRESET)
    estimator: Literal["k1", "k2", "k3"] | None = Field(None, description="empty: k3 in the loss, k1 in the reward")
    target: float | None = Field(None, gt=0, description="KL a token that the coefficient is moved towards")
    horizon: int = Field(10_000, ge=1, description="samples over which it moves, with a target")

    @model_validator(mode="after")
    def _target_needs_a_start(self) -> "KLConfig":
        if self.target is not None and self.coef == 0:
            raise ValueError("kl.target moves kl.coef from where it starts: set kl.coef above 0")
        return self


class ReferenceConfig(Section):
    """The policy a KL refers to: the first policy, or what it was at the last refresh."""

    refresh_every: int | None = Field(None, ge=1, description="steps after which it becomes the policy as it is then")


class ValueConfig(Section):
    """The value function of advantages made by GAE."""

    model: Literal["shared", "own"] = Field("shared", description="a head on the policy's trunk, or a model of its own")
    coef: float = Field(0.1, gt=0, description="weight of the value loss")
    clip: float | None = Field(0.2, gt=0, description="how far a value may move in a step; empty: not clipped")
    lr_factor: float = Field(10.0, gt=0, description="learning rate of the head, or the model, over learner.lr")


class CorrectionConfig(Section):
    """Weights of tokens where the engine that sampled and the learner disagree: exp(learner - engine log-prob)."""

    kind: Literal["none", "tis", "icepop", "sequence_mask"] = "none"
    low: float | None = Field(None, ge=0, description="empty: the kind's own")
    high: float | None = Field(None, gt=0, description="empty: the kind's own")


class AlgorithmConfig(Section):
    name: Preset = Field("grpo", description="the preset; the settings below go over it")
    advantage: Literal["grpo", "dr_grpo", "rloo", "returns", "gae"] | None = Field(None, description=PRESET)
    gamma: float | None = Field(None, gt=0, le=1, description=f"discount of returns and gae; {PRESET}")
    lam: float | None = Field(None, ge=0, le=1, description=f"lambda of gae, 0 is TD; {PRESET}")
    whiten: bool | None = Field(None, description=f"advantages to mean 0 and variance 1 over all tokens; {PRESET}")
    loss: str | None = Field(None, description=f"clipped, cispo, policy_gradient or package.module:function; {PRESET}")
    ratio: Literal["token", "sequence"] | None = Field(None, description=PRESET)
    clip_low: float | None = Field(None, gt=0, description=f"how far the ratio may fall below 1; {PRESET}")
    clip_high: float | None = Field(None, gt=0, description=f"how far it may rise above 1; {PRESET}")
    dual_clip: float | None = Field(None, gt=1, description="bound of the loss where the advantage is negative")
    aggregation: Aggregation | None = Field(None, description=PRESET)
    entropy_coef: float = Field(0.0, ge=0, description="weight of the entropy bonus")
    resample: int | None = Field(
        None, ge=0, description=f"rounds of further prompts that take the place of groups without signal; {PRESET}"
    )
    kl: KLConfig = KLConfig()
    reference: ReferenceConfig = ReferenceConfig()
    value: ValueConfig = ValueConfig()
    correction: CorrectionConfig = CorrectionConfig()
