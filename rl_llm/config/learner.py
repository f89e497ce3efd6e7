"""The section `learner`: how a step's loss is applied."""

from typing import Annotated, Literal

from pydantic import Field

from rl_llm.config.base import Section

Beta = Annotated[float, Field(ge=0, lt=1)]


class LearnerConfig(Section):
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float = Field(1e-5, gt=0)
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="how lr moves after warm-up")
    warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    momentum: float = Field(0.0, ge=0, lt=1, description="for sgd")
    max_grad_norm: float = Field(1.0, gt=0)
    epochs: int = Field(1, ge=1, description="passes over the batch of a step")
    minibatches: int = Field(1, ge=1, description="updates in a pass; each takes whole groups")
    tokens_per_microbatch: int = Field(4096, ge=1)
    max_bad_steps: int = Field(
        3, ge=1, description="updates in a row with a non-finite loss or gradient that end the run"
    )
