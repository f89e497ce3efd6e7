"""Sampling: engines that decode, and the worker that answers requests with one."""

from rl_llm.policies.sampling import SamplingParams
from rl_llm.rollout.worker import RolloutRequest, RolloutWorker

__all__ = ["RolloutRequest", "RolloutWorker", "SamplingParams"]
