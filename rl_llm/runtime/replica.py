"""One worker, wherever it runs: in this process, or several actors as one. The single Ray actor is in `actor.py`."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

BUILT = ""
"""The id of a replica's first answer: its worker is made."""


class WorkerDied(Exception):
    """The worker's process, or an object it was given, is gone."""


@dataclass(frozen=True)
class Answer:
    """What came of a call: its value, the second of its two returns as it is kept, or what the method raised."""

    id: str
    value: Any = None
    kept: Any = None
    error: Exception | None = None


class Replica(Protocol):
    """A place for one worker, with at most `slots` calls under way.

    Attributes:
        where: its process, for messages; None while unknown.
        free: calls it could take now; 0 while its worker is being made.
        waits_for: what Ray will have ready when there is something to receive. Empty with a call under way: `receive`
            does the work, here and now.
    """

    slots: int

    @property
    def where(self) -> str | None: ...

    @property
    def free(self) -> int: ...

    @property
    def waits_for(self) -> Sequence[Any]: ...

    def build(self, make: Callable[..., Any]) -> None:
        """Begin to make the worker, in place of the one that may be there; answers under the id `BUILT`."""

    def call(self, id: str, method: str, args: tuple[Any, ...], returns: int) -> None: ...

    def receive(self) -> Answer | None:
        """Something that is ready; None where it is only a part of an answer. Raises `WorkerDied`."""

    def kill(self, *part: int) -> None:
        """End its process, or of several those of these ranks."""


class Local:
    """A worker in this process, made when it is first needed.

    What it raises is raised here, so that a debugger works in it. Nothing can be killed: deadlines do not hold.
    """

    slots = 1
    where = None
    waits_for: Sequence[Any] = ()

    def __init__(self) -> None:
        self._call: tuple[str, str, tuple[Any, ...], int] | None = None
        self._worker: Any = None

    @property
    def free(self) -> int:
        return int(self._call is None)

    def build(self, make: Callable[..., Any]) -> None:
        close(self._worker)
        self._make, self._worker, self._call = make, None, None

    def call(self, id: str, method: str, args: tuple[Any, ...], returns: int) -> None:
        self._call = id, method, args, returns

    def receive(self) -> Answer:
        assert self._call is not None
        (id, method, args, returns), self._call = self._call, None
        if self._worker is None:
            self._worker = self._make()
        given = getattr(self._worker, method)(*fetch(args))
        return Answer(id, *given) if returns == 2 else Answer(id, given)

    def kill(self, *part: int) -> None:
        close(self._worker)
        self._call = self._worker = None


class Shards:
    """Several actors as one worker: all of them get every call, and the first one's answer is the answer.

    Dead when one of them is; what one raises is raised without waiting for the others, who may wait for it for ever.
    """

    slots = 1

    def __init__(self, replicas: Sequence[Replica]) -> None:
        self._replicas = list(replicas)
        self._answers: dict[int, Answer] = {}
        self._id: str | None = None

    @property
    def where(self) -> str | None:
        return self._replicas[0].where

    @property
    def free(self) -> int:
        return int(self._id is None and all(replica.free for replica in self._replicas))

    @property
    def waits_for(self) -> Sequence[Any]:
        return [ref for replica in self._replicas for ref in replica.waits_for]

    def build(self, make: Callable[..., Any]) -> None:
        """`make` is called with the rank of each."""
        self._begin(BUILT)
        for rank, replica in enumerate(self._replicas):
            replica.build(partial(make, rank))

    def call(self, id: str, method: str, args: tuple[Any, ...], returns: int) -> None:
        self._begin(id)
        for replica in self._replicas:
            replica.call(id, method, args, returns)

    def _begin(self, id: str) -> None:
        self._id, self._answers = id, {}

    def receive(self) -> Answer | None:
        for rank, replica in enumerate(self._replicas):
            if not ready(replica.waits_for):
                continue
            try:
                answer = replica.receive()
            except WorkerDied as death:
                raise WorkerDied(f"rank {rank}: {death}" if len(self._replicas) > 1 else str(death)) from None
            if answer is None or answer.id != self._id:
                continue  # of a call that another one's error has ended already
            self._answers[rank] = answer
            if answer.error is not None:
                self._id = None
                return answer
        if len(self._answers) < len(self._replicas):
            return None
        first, self._id, self._answers = self._answers[0], None, {}
        return first

    def kill(self, *part: int) -> None:
        for rank in part or range(len(self._replicas)):
            self._replicas[rank].kill()


def close(worker: Any) -> None:
    """Have a worker give back what it holds, where it has a `close()`, before another takes its place."""
    if hasattr(worker, "close"):
        worker.close()


def ready(refs: Sequence[Any], timeout_s: float = 0.0) -> set[Any]:
    """Those of some references that are there; with none there yet, waits up to `timeout_s` seconds for the first."""
    if not refs:
        return set()
    import ray  # only a run with actors has references

    # fetch_local=False: a result counts as there once it exists, not once it has crossed the network.
    count = 1 if timeout_s > 0 else len(refs)
    return set(ray.wait(list(refs), num_returns=count, timeout=timeout_s, fetch_local=False)[0])


def fetch(values: Sequence[Any]) -> list[Any]:
    """The values themselves: references from actors are resolved, what is plain already passes through."""
    ray = sys.modules.get("ray")
    return [ray.get(value) if ray is not None and isinstance(value, ray.ObjectRef) else value for value in values]


def put(value: Any) -> Any:
    """A value that actors read as a reference: put into the object store once, from where each of them maps it."""
    import ray

    return value if isinstance(value, ray.ObjectRef) else ray.put(value)
