"""The sections `trainer`, `checkpoint` and `logging`: how long a run is, and what it keeps."""

from typing import Annotated

from pydantic import Field

from rl_llm.config.base import MAY_CHANGE, Section


class CheckpointConfig(Section):
    every: int = Field(20, ge=1)
    keep: int = Field(2, ge=1)


class LoggingConfig(Section):
    rollouts: int = Field(200, ge=0, description="rollout tables to keep, newest first")
    tensorboard: bool = True
    wandb_project: str | None = None
    mlflow_experiment: str | None = None


class TrainerConfig(Section):
    steps: Annotated[int, MAY_CHANGE] = Field(100, ge=1)
    seed: int = Field(0, ge=0)
