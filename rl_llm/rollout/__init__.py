"""From a request to a shard: engines that sample, and the worker that answers with one."""

from rl_llm.rollout.engines import ENGINES, Engine, LocalEngine
from rl_llm.rollout.worker import RolloutRequest, RolloutWorker, sample_shard

__all__ = ["ENGINES", "Engine", "LocalEngine", "RolloutRequest", "RolloutWorker", "sample_shard"]
