"""The workers of a run: learner, rollout and reward pools, in this process or as Ray actors."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from rl_llm.collector import Collector
from rl_llm.config import ComponentConfig, RunConfig
from rl_llm.learner.learner import Learner
from rl_llm.rewards import RewardWorker, deadline_s
from rl_llm.rollout import RolloutWorker
from rl_llm.workers import Factory, Pool, Request, as_completed, share


class Crew:
    """Starts the workers a config asks for.

    Attributes:
        learner: a pool of one; `learner.call("update", ...)`.
        collector: sampling and scoring on the other two pools.
        weights, version: what rollout requests are to act with; `weights` is None where policy and learner are one.
    """

    def __init__(
        self,
        config: RunConfig,
        base: str,
        components: Mapping[str, ComponentConfig],
        functions: Mapping[str, Callable[..., Any]],
    ) -> None:
        """`base` is the folder of the first policy; `functions` are components given as they are, by name.

        Raises:
            UserError: the cluster has no room for the actors, or the model cannot be loaded.
        """
        resources = config.resources
        # First, for it may refuse the config, and there is nothing to give back yet.
        here = Learner(config, base) if resources.num_learners == 0 else None
        self._placement: Any = None
        if resources.uses_ray:
            from rl_llm.cluster import Placement

            self._placement = Placement(resources)
        shared = here.policy if here is not None and resources.num_rollout_workers == 0 else None

        def factory(kind: str, cls: Callable[..., Any], *args: Any) -> Factory:
            if self._placement is None:
                return Factory(cls, args, resources.threads)
            return Factory(cls, args, resources.threads, partial(self._placement.bundle, kind))

        self.learner = Pool(
            "learner",
            factory("learner", Learner, config, base) if here is None else factory("learner", lambda: here),
            resources.num_learners,
            max_attempts=1,
        )
        self.rollouts = Pool(
            "rollout",
            factory("rollout_worker", RolloutWorker, config, base, shared),
            resources.num_rollout_workers,
            max_attempts=resources.max_attempts,
            retry_timeouts=True,
        )
        self.rewards = Pool(
            "reward",
            factory("reward_worker", RewardWorker, dict(components), dict(functions)),
            resources.num_reward_workers,
            max_attempts=resources.max_attempts,
        )
        deadlines = {name: deadline_s(config, functions.get(name)) for name, config in components.items()}
        self.collector = Collector(self.rollouts, self.rewards, deadlines, resources)
        self._one_policy = shared is not None
        self._remote_rollouts = resources.num_rollout_workers > 0
        self.weights: Any = None
        self.version = 0

    def publish(self, version: int) -> None:
        """Make the learner's weights those that the next rollouts act with."""
        self.version = version
        if self._one_policy:
            return
        self.learner.submit(Request("weights", "weights", (), float("inf"), returns=2))
        [(_, _, outcome)] = as_completed(self.learner)
        outcome.result()
        self.weights = outcome.shard
        if self._remote_rollouts:
            self.weights = share(self.weights)

    def restarts(self) -> dict[str, int]:
        """Workers replaced so far, by pool."""
        return {pool.name: pool.counters["restarts"] for pool in (self.rollouts, self.rewards)}

    @contextmanager
    def closing_on_error(self) -> Iterator[None]:
        """Actors and their room outlive an exception otherwise, where Ray is somebody else's."""
        try:
            yield
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        for pool in (self.rollouts, self.rewards, self.learner):
            pool.close()
        if self._placement is not None:
            self._placement.remove()
