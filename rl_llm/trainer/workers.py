"""What a config starts: learners, rollout workers and reward workers, in this process or as Ray actors."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from rl_llm.config import ComponentConfig, RunConfig
from rl_llm.errors import UserError
from rl_llm.learner.group import LearnerGroup
from rl_llm.learner.learner import Learner
from rl_llm.learner.parallel import DataParallel, MakeParallel
from rl_llm.rewards import RewardWorker, deadline_s
from rl_llm.rollout import RolloutWorker
from rl_llm.runtime.pool import Dispatcher, Pool
from rl_llm.runtime.replica import Local, Replica, Shards
from rl_llm.runtime.weights import InPlace, ObjectStore, WeightChannel
from rl_llm.trainer.collector import Collector

Functions = Mapping[str, Callable[..., Any]]


class Workers:
    """The workers of a run, and what connects them.

    Attributes:
        learner: the learners; only of workers that learn.
        here: the one in this process, None where there is none.
        rollouts, rewards: the other two pools.
        collector: sampling and scoring on them.
        channel: takes the learners' weights to the rollout workers.
    """

    learner: LearnerGroup
    here: Learner | None
    channel: WeightChannel
    collector: Collector

    def __init__(
        self,
        config: RunConfig,
        base: str,
        components: Mapping[str, ComponentConfig],
        functions: Functions,
        caches: Mapping[str, Path] | None = None,
        learns: bool = True,
        parallel: MakeParallel = DataParallel,
        group: Any = None,
    ) -> None:
        """Start them.

        Args:
            base: folder of the policy before training.
            components: the rewards to be scored.
            functions: reward functions given as they are, by component.
            caches: folders of components whose values are kept, see `cache_folders`.
            learns: without, there is no learner, and rollout workers act with `base`.
            parallel: how several learners go together.
            group: room that is there already, see `Placement`.
        """
        self._config, self._learns, self._parallel = config, learns, parallel
        # In this process it may refuse the config, and there is nothing to give back yet.
        makes = self._makes(config, base, components, functions, caches)
        resources = config.resources
        self._placement: Any = None
        if resources.uses_ray:
            from rl_llm.runtime.cluster import Placement

            self._placement = Placement(resources, group)
        self.dispatcher = Dispatcher()
        try:
            if learns:
                self._learner_pool = Pool(
                    "learner", makes["learner"], self._place_learners, 1, self.dispatcher, max_attempts=1, stateful=True
                )
            self.rollouts = Pool(
                "rollout",
                makes["rollout_worker"],
                partial(self._place, "rollout_worker"),
                max(resources.num_rollout_workers, 1),
                self.dispatcher,
                max_attempts=resources.max_attempts,
                retry_timeouts=True,
            )
            self.rewards = Pool(
                "reward",
                makes["reward_worker"],
                partial(self._place, "reward_worker"),
                max(resources.num_reward_workers, 1),
                self.dispatcher,
                max_attempts=resources.max_attempts,
            )
            self._connect(components, functions)
        except BaseException:
            # Actors and their room outlive an exception otherwise, where Ray is somebody else's.
            self.close()
            raise

    def reset(
        self,
        config: RunConfig,
        base: str,
        components: Mapping[str, ComponentConfig],
        functions: Functions,
        caches: Mapping[str, Path] | None = None,
    ) -> None:
        """Make all workers anew for another config, in the processes they have.

        Raises:
            UserError: the config asks for other resources.
        """
        if config.resources != self._config.resources:
            raise UserError("resources cannot change with the workers that are there; start others")
        makes = self._makes(config, base, components, functions, caches)
        self._config = config
        if self._learns:
            self._learner_pool.rebuild(makes["learner"])
        self.rollouts.rebuild(makes["rollout_worker"])
        self.rewards.rebuild(makes["reward_worker"])
        self._connect(components, functions)

    def _makes(
        self,
        config: RunConfig,
        base: str,
        components: Mapping[str, ComponentConfig],
        functions: Functions,
        caches: Mapping[str, Path] | None,
    ) -> dict[str, Callable[..., Any]]:
        """What makes a worker of each kind; the channel they share is chosen by what is where."""
        resources = config.resources
        make, here = partial(Learner, config, base, parallel=self._parallel), None
        if self._learns and resources.num_learners == 0:
            here = make()
        self.here = here
        shared = here.policy if here is not None and resources.num_rollout_workers == 0 else None
        in_place = shared is not None or not self._learns
        self.channel = InPlace(shared) if in_place else ObjectStore(shared=resources.num_rollout_workers > 0)
        return {
            "learner": make if here is None else lambda: here,
            "rollout_worker": partial(RolloutWorker, config, base, self.channel, shared),
            "reward_worker": partial(RewardWorker, dict(components), dict(functions), config.trainer.steps, caches),
        }

    def _connect(self, components: Mapping[str, ComponentConfig], functions: Functions) -> None:
        """The learners with each other, and the pools by a collector."""
        config = self._config
        self.collector = Collector(
            self.rollouts,
            dict.fromkeys(components, self.rewards),
            {name: deadline_s(component, functions.get(name)) for name, component in components.items()},
            config.resources,
            config.rollout.request_rows,
        )
        for name, component in components.items():
            if component.cache:
                # How fast it was with rows that are known says nothing of the next ones.
                self.collector.note_seconds(name, math.inf)
        if self._learns:
            self.learner = LearnerGroup(self._learner_pool, config)
            self.learner.join()

    def _place(self, kind: str, index: int) -> Replica:
        resources = self._config.resources
        if getattr(resources, f"num_{kind}s") == 0:
            return Local()
        from rl_llm.runtime.actor import Actor

        return Actor(resources.threads, self._placement.bundle(kind, index))

    def _place_learners(self, index: int) -> Replica:
        count = self._config.resources.num_learners
        if count == 0:
            return Local()
        return Shards([self._place("learner", rank) for rank in range(count)])

    def restarts(self) -> dict[str, int]:
        """Workers replaced so far, by pool."""
        return {pool.name: pool.counters["restarts"] for pool in (self.rollouts, self.rewards)}

    def close(self) -> None:
        self.dispatcher.close()
        if self._placement is not None:
            self._placement.remove()
