"""The section `resources`: where things run."""

from typing import Annotated

from pydantic import Field

from rl_llm.config.base import MUST_STAY, Section


class ResourcesConfig(Section):
    num_rollout_workers: int = Field(0, ge=0, description="0: in this process")
    num_reward_workers: int = Field(0, ge=0, description="0: in this process")
    num_learners: int = Field(0, ge=0, description="0: in this process; several share the rows of a step")
    num_cpus_per_rollout_worker: float = Field(1, gt=0)
    num_cpus_per_reward_worker: float = Field(1, gt=0)
    num_cpus_per_learner: float = Field(1, gt=0)
    num_gpus_per_rollout_worker: float = Field(0, ge=0)
    num_gpus_per_learner: float = Field(0, ge=0)
    # Floats follow it.
    threads: Annotated[int, MUST_STAY] = Field(
        1, ge=1, description="torch threads of every process; changes floats, so set it on its own"
    )
    address: str | None = Field(
        None, description="Ray cluster to join; empty: the one in RAY_ADDRESS, else a local one"
    )
    wait_s: float = Field(120, gt=0, description="how long to wait for room for the actors")
    request_timeout_s: float = Field(
        600, gt=0, description="deadline of a rollout request; then its worker is replaced"
    )
    max_attempts: int = Field(3, ge=1, description="workers a request may bring down before it is given up by name")

    @property
    def uses_ray(self) -> bool:
        return self.num_rollout_workers + self.num_reward_workers + self.num_learners > 0
