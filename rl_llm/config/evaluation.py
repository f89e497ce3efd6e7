"""The section `evaluation`: what is measured, when, and what that decides."""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from rl_llm.config.base import MAY_CHANGE, Section
from rl_llm.config.rewards import Components

UTILITY, TOKENS = "utility", "tokens"
"""Measured of every policy, beside its components."""


class EvaluationConfig(Section):
    every: Annotated[int, MAY_CHANGE] = Field(20, ge=1, description="steps between validations on the tune split")
    prompts: int = Field(128, ge=1, description="tune prompts used; the same ones each time")
    test_prompts: int = Field(512, ge=2, description="test prompts used before and after training")
    temperature: float = Field(0.0, ge=0, description="0: greedy")
    metrics: Components = Field({}, description="components measured but not trained on")
    utility: dict[str, float] | None = Field(
        None, description="metric: weight; default: the run's initial reward weights, and 1 for each extra metric"
    )
    patience: Annotated[int | None, MAY_CHANGE] = Field(
        None, ge=1, description="validations without a better utility that end the run"
    )
    samples: Annotated[int, MAY_CHANGE] = Field(3, ge=0, description="completions shown at each validation")
    controls: Annotated[list[Literal["supervised", "constant_reward"]], MAY_CHANGE] = Field(
        [], description="runs made for comparison after the main one, from the same start"
    )

    @field_validator("utility")
    @classmethod
    def _weighs_something(cls, utility: dict[str, float] | None) -> dict[str, float] | None:
        if utility == {}:
            raise ValueError("it names no metric; leave it out, or null, for the default")
        return utility
