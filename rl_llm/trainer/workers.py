"""The workers of a run: learners, rollout and reward pools, in this process or as Ray actors."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from rl_llm.config import ComponentConfig, RunConfig
from rl_llm.learner.learner import Learner
from rl_llm.rewards import RewardWorker, deadline_s
from rl_llm.rollout import RolloutWorker
from rl_llm.runtime.pool import Factory, Outcome, Pool, Request, as_completed, share
from rl_llm.trainer.collector import Collector


def _placed(options: dict[str, Any], index: int) -> dict[str, Any]:
    return options


class Learners:
    """The learners of a run. They hold the same weights and make the same updates, each on its share of the rows."""

    def __init__(self, pools: Sequence[Pool]) -> None:
        """Each pool is of one learner, in the order of their ranks."""
        self._pools = list(pools)

    def join(self) -> None:
        """Wait until they have found each other."""
        if len(self._pools) > 1:
            self.call("join", *self.first("open"))

    def call(self, method: str, *args: Any) -> Any:
        """All of them do it; gives what the first one gives."""
        return self._ask(self._pools, method, args).value

    def first(self, method: str, *args: Any) -> Any:
        """What the first of them gives, for what the others need not do too."""
        return self._ask(self._pools[:1], method, args).value

    def shard(self, method: str) -> Any:
        """The second of two values that the first of them gives; it stays in the object store."""
        return self._ask(self._pools[:1], method, (), returns=2).shard

    def close(self) -> None:
        for pool in self._pools:
            pool.close()

    def _ask(self, pools: Sequence[Pool], method: str, args: tuple[Any, ...], returns: int = 1) -> Outcome:
        for pool in pools:
            pool.submit(Request(method, method, args, float("inf"), returns))
        outcomes = {}
        try:
            for pool, _, outcome in as_completed(*pools):
                outcome.result()
                outcomes[pool.name] = outcome
        except BaseException:
            # Those that are under way would wait for the lost one for ever.
            for pool in pools:
                pool.cancel()
            raise
        return outcomes[pools[0].name]


class Crew:
    """Starts the workers a config asks for.

    Attributes:
        learner: `learner.call("update", ...)`.
        collector: sampling and scoring on the other two pools.
        weights, version: what rollout requests are to act with; `weights` is None where policy and learner are one.
        reference: version and weights of the reference policy, where rollout workers score with it.
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
            from rl_llm.runtime.cluster import Placement

            self._placement = Placement(resources)
        shared = here.policy if here is not None and resources.num_rollout_workers == 0 else None

        def factory(kind: str, cls: Callable[..., Any], *args: Any) -> Factory:
            if self._placement is None:
                return Factory(cls, args, resources.threads)
            return Factory(cls, args, resources.threads, partial(self._placement.bundle, kind))

        self.learner = Learners(self._learner_pools(config, base, here))
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
        algorithm = config.algorithm
        self._scores_reference = algorithm.kl.coef > 0 and algorithm.reference.place == "rollout"
        self._refresh_every = algorithm.reference.refresh_every or 0
        self.weights: Any = None
        self.version = 0
        self.reference: tuple[int, Any] | None = None
        with self.closing_on_error():
            self.learner.join()

    def _learner_pools(self, config: RunConfig, base: str, here: Learner | None) -> list[Pool]:
        # The state of a learner dies with it, so a call of a dead one has to fail instead of going to a fresh one.
        threads = config.resources.threads
        if here is not None:
            return [Pool("learner", Factory(lambda: here, (), threads), 0, max_attempts=1)]
        ranks = range(config.resources.num_learners)
        places = [partial(_placed, self._placement.bundle("learner", rank)) for rank in ranks]
        makes = [Factory(Learner, (config, base, rank), threads, places[rank]) for rank in ranks]
        return [
            Pool("learner" if len(ranks) == 1 else f"learner-{rank}", makes[rank], 1, max_attempts=1) for rank in ranks
        ]

    def publish(self, version: int) -> None:
        """Make the learner's weights those that rollouts act with, and its reference the one they score with."""
        self.version = version
        due = self._refresh_every and version % self._refresh_every == 0
        if self._scores_reference and (self.reference is None or due):
            self.reference = version, self._shared("refreshed")
        if not self._one_policy:
            self.weights = self._shared("weights")

    def _shared(self, method: str) -> Any:
        weights = self.learner.shard(method)
        return share(weights) if self._remote_rollouts else weights

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
