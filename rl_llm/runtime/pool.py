"""The pool that rollout, reward and learner workers live in: requests, deadlines, retries, watchdog.

    rollouts = Pool("rollout", Factory(RolloutWorker, (config,), threads, place), size=2, retry_timeouts=True)
    rewards = Pool("reward", Factory(RewardWorker, (config,)), size=0)
    for request in requests:
        rollouts.submit(request)
    for pool, request, outcome in as_completed(rollouts, rewards):
        ...  # may submit more, to either

With `size=0` requests run in this process, one at a time, and what a method raises is raised here, so that a debugger
works in it; nothing can be killed there, so deadlines do not hold. Otherwise every worker is a Ray actor with at most
one request under way, and a deadline counts the work alone, neither the queue nor the start of the actor. An actor that
misses a deadline or dies is replaced by a fresh one: whatever a worker needs beyond its constructor (weights) has to
come with the request. Every request submitted gets exactly one outcome, unless `cancel` forgets it.
"""

import logging
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from rl_llm.config import ResourcesConfig
from rl_llm.errors import RunFailed

if TYPE_CHECKING:
    from rl_llm.runtime.cluster import Actor

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """A call of a worker's method.

    Args:
        id: names it in messages, such as "step-12/3".
        deadline_s: seconds of work after which its worker is killed; may be infinite.
        returns: 1, or 2 for a method that returns (value, shard), where the shard stays in the object store.
        note: what else a message should say of it, such as which prompts it holds.
    """

    id: str
    method: str
    args: tuple[Any, ...]
    deadline_s: float
    returns: int = 1
    note: str = ""


class RequestFailed(RunFailed):
    """No answer to a request. `kind` is

    - "error": the method raised `cause`, which has the remote traceback as a note;
    - "poison": it brought down as many workers as it may;
    - "timeout": it missed its deadline, for the last time where timeouts are tried again.
    """

    def __init__(self, kind: Literal["error", "poison", "timeout"], message: str, cause: Exception | None = None):
        super().__init__(message)
        self.kind = kind
        self.cause = cause


@dataclass(frozen=True)
class Outcome:
    """What became of a request: its value, the shard where it has two returns (a reference if it comes from an actor,
    see `fetch`), or the error."""

    value: Any = None
    shard: Any = None
    error: RequestFailed | None = None

    def result(self) -> Any:
        """The value; or raises what the method raised, as it would have been raised in this process."""
        if self.error is None:
            return self.value
        if self.error.cause is not None:
            raise self.error.cause from self.error
        raise self.error


def _anywhere(index: int) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Factory:
    """How to make a worker: `cls(*args)`, in a process with `threads` OpenMP threads, under the Ray actor options
    `place(index)`: `functools.partial(placement.bundle, kind)`, or Ray's defaults."""

    cls: Callable[..., Any]
    args: tuple[Any, ...] = ()
    threads: int = 1
    place: Callable[[int], dict[str, Any]] = _anywhere


@dataclass
class _Job:
    request: Request
    attempts: int = 0

    def __str__(self) -> str:
        return f"{self.request.id} ({self.request.note})" if self.request.note else self.request.id


@dataclass
class _Seat:
    """The place of one worker. It is empty, starting (busy without a job), working on a job, or free."""

    label: str
    actor: "Actor | None" = None
    job: _Job | None = None
    since: float = 0.0
    limit_s: float = math.inf
    failed_starts: int = 0

    def __str__(self) -> str:
        return f"{self.label} ({self.actor.where})" if self.actor and self.actor.where else self.label

    @property
    def busy(self) -> bool:
        return self.actor is not None and self.actor.busy

    @property
    def deadline(self) -> float:
        return self.since + self.limit_s

    def expect(self, limit_s: float) -> None:
        self.since, self.limit_s = time.monotonic(), limit_s

    def clear(self) -> None:
        if self.actor is not None:
            self.actor.kill()
        self.actor = self.job = None


@dataclass(eq=False)
class Pool:
    """`size` workers of one kind, and the requests to them; see the module's text.

    Args:
        name: labels the workers in messages: "rollout-0".
        max_attempts: workers a request may bring down, and starts in a row that may fail, before it is given up.
        retry_timeouts: whether a request that missed its deadline is sent again; else it fails at once.
        start_timeout_s: seconds a worker may take to start; it then is started again.

    `counters` counts `restarts` of workers, `retries` of requests and `timeouts` (missed deadlines) so far.

    Raises, from `as_completed`:
        RunFailed: a worker does not start. What its constructor raises is raised as it is.
    """

    name: str
    factory: Factory
    size: int
    max_attempts: int = 3
    retry_timeouts: bool = False
    start_timeout_s: float = 600.0
    counters: dict[str, int] = field(default_factory=lambda: {"restarts": 0, "retries": 0, "timeouts": 0}, init=False)

    def __post_init__(self) -> None:
        self._queue: deque[_Job] = deque()
        self._finished: deque[tuple[Request, Outcome]] = deque()
        self._seats = [_Seat(f"{self.name}-{index}") for index in range(self.size)]
        self._worker: Any = None
        self._fill()

    def submit(self, request: Request) -> None:
        """Queues a request, or hands it to a free worker; returns at once."""
        self._queue.append(_Job(request))
        self._fill()

    def call(self, method: str, *args: Any) -> Any:
        """The value of a method, waited for without a deadline; for one worker with a state, such as the learner.

        Give such a pool `max_attempts=1`: its state dies with it, so the call must fail rather than go to a fresh one.
        """
        self.submit(Request(method, method, args, math.inf))
        [(_, _, outcome)] = as_completed(self)
        return outcome.result()

    def cancel(self) -> None:
        """Forgets every request and kills the workers that are on one; the pool can be used on."""
        self._queue.clear()
        self._finished.clear()
        for seat in self._seats:
            if seat.job is not None:
                seat.clear()

    def close(self) -> None:
        """Forgets every request and ends every worker."""
        self.cancel()
        self._worker = None
        for seat in self._seats:
            seat.clear()

    def _pending(self) -> bool:
        return bool(self._queue or self._finished or any(seat.job is not None for seat in self._seats))

    def _run_here(self) -> None:
        request = self._queue.popleft().request
        if self._worker is None:
            self._worker = self.factory.cls(*self.factory.args)
        answer = getattr(self._worker, request.method)(*fetch(request.args))
        value, shard = answer if request.returns == 2 else (answer, None)
        self._finished.append((request, Outcome(value, shard)))

    def _poll(self) -> None:
        """Takes the answers that are there, replaces the workers that are late, hands out what is queued."""
        if not self._seats:
            return
        from rl_llm.runtime.cluster import answered

        ready = answered([seat.actor for seat in self._seats if seat.actor is not None], 0.0)
        for seat in self._seats:
            if seat.actor in ready:
                self._take(seat, seat.actor)
            elif seat.busy and time.monotonic() >= seat.deadline:
                self._replace(seat, "timeout", f"missed its deadline of {seat.limit_s:g} s")
        self._fill()

    def _take(self, seat: _Seat, actor: "Actor") -> None:
        from rl_llm.runtime.cluster import MethodRaised, WorkerDied

        try:
            outcome = Outcome(*actor.receive())
        except WorkerDied as death:
            self._replace(seat, "poison", str(death))
            return
        except MethodRaised as error:
            if seat.job is None:
                seat.clear()
                raise error.cause from None
            outcome = Outcome(error=RequestFailed("error", f"{seat} failed on {seat.job}: {error}", error.cause))
        if seat.job is not None:
            self._finished.append((seat.job.request, outcome))
        seat.job = None
        seat.failed_starts = 0

    def _replace(self, seat: _Seat, kind: Literal["poison", "timeout"], cause: str) -> None:
        job, lost = seat.job, str(seat)
        seat.clear()
        self.counters["restarts"] += 1
        if job is None:
            seat.failed_starts += 1
            if seat.failed_starts >= self.max_attempts:
                raise RunFailed(f"{lost} could not be started, {seat.failed_starts} times in a row; the last: {cause}")
            log.warning("%s did not start and is started again: %s", lost, cause)
            return
        self.counters["timeouts"] += kind == "timeout"
        attempt = f"attempt {job.attempts} of {self.max_attempts}"
        log.warning("%s is replaced; it was on %s, %s: %s", lost, job, attempt, cause)
        if job.attempts < self.max_attempts and (kind == "poison" or self.retry_timeouts):
            self.counters["retries"] += 1
            self._queue.appendleft(job)
            return
        did = "brought down" if kind == "poison" else "was too slow for"
        message = f"{self.name} request {job} {did} {job.attempts} worker(s) and is given up; the last, {lost}: {cause}"
        self._finished.append((job.request, Outcome(error=RequestFailed(kind, message))))

    def _fill(self) -> None:
        for index, seat in enumerate(self._seats):
            if seat.actor is None:
                from rl_llm.runtime.cluster import Actor

                make = self.factory
                seat.expect(self.start_timeout_s)
                seat.actor = Actor(make.cls, make.args, make.threads, make.place(index))
            elif self._queue and not seat.busy:
                seat.job = job = self._queue.popleft()
                job.attempts += 1
                seat.expect(job.request.deadline_s)
                seat.actor.call(job.request.method, job.request.args, job.request.returns)

    def _status(self) -> str:
        """Who is at what since when, for the watchdog."""
        parts = []
        for seat in self._seats:
            if not seat.busy:
                continue
            limit = f" of {seat.limit_s:.0f}" if math.isfinite(seat.limit_s) else ""
            doing = f"on {seat.job}" if seat.job else "starting"
            attempt = f", attempt {seat.job.attempts}" if seat.job else ""
            parts.append(f"{seat} {doing} for {time.monotonic() - seat.since:.0f}{limit} s{attempt}")
        if not parts:
            parts.append(f"{self.name} idle")
        if self._queue:
            parts.append(f"{len(self._queue)} queued")
        return ", ".join(parts)


def as_completed(*pools: Pool, watchdog_s: float = 60.0) -> Iterator[tuple[Pool, Request, Outcome]]:
    """The outcomes of all requests to `pools` in the order they come, until nothing is pending.

    Requests may be submitted while iterating. Whenever nothing has finished for `watchdog_s` seconds, a warning says
    who waits for whom.
    """
    heard = warned = time.monotonic()
    while any(pool._pending() for pool in pools):
        for pool in pools:
            pool._poll()
        done = next((pool for pool in pools if pool._finished), None)
        here = next((pool for pool in pools if pool._queue and not pool._seats), None)
        if done is not None:
            yield done, *done._finished.popleft()
            heard = warned = time.monotonic()
        elif here is not None:
            here._run_here()
        elif not _wait(pools, warned + watchdog_s) and time.monotonic() >= warned + watchdog_s:
            warned = time.monotonic()
            status = "; ".join(pool._status() for pool in pools)
            log.warning("nothing finished for %.0f s: %s", warned - heard, status)


def _wait(pools: Sequence[Pool], until: float) -> bool:
    """Sleeps to the first answer, the first deadline or `until`, whichever is first; whether an answer came."""
    from rl_llm.runtime.cluster import answered

    busy = [seat for pool in pools for seat in pool._seats if seat.busy]
    until = min([until, *(seat.deadline for seat in busy)])
    actors = [seat.actor for seat in busy if seat.actor is not None]
    return bool(answered(actors, max(0.0, until - time.monotonic())))


def fetch(values: Sequence[Any]) -> list[Any]:
    """The values themselves: references from actors are resolved, what is plain already passes through."""
    ray = sys.modules.get("ray")
    return [ray.get(value) if ray is not None and isinstance(value, ray.ObjectRef) else value for value in values]


@contextmanager
def connected(resources: ResourcesConfig) -> Iterator[None]:
    """Ray for as long as a config with workers needs it; what was there before stays."""
    if not resources.uses_ray:
        yield
        return
    import ray

    from rl_llm.runtime.cluster import connect, send_tables_as_ipc

    started = connect(resources)
    send_tables_as_ipc()
    try:
        yield
    finally:
        if started:
            ray.shutdown()


def share(value: Any) -> Any:
    """A value that actors read as a reference: put into the object store once, from where each of them maps it."""
    import ray

    return value if isinstance(value, ray.ObjectRef) else ray.put(value)
