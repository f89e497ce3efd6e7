"""Requests to workers: who is on what, until when, and what became of it.

    dispatcher = Dispatcher()
    rollouts = Pool("rollout", partial(RolloutWorker, config), place_rollout, 2, dispatcher, retry_timeouts=True)
    rewards = Pool("reward", partial(RewardWorker, config), lambda index: Local(), 1, dispatcher)
    rollouts.submit(Request("step-1/0", "sample", args, deadline_s=60, reply=score_it))  # may submit more, to either
    dispatcher.serve(lambda: everything_is_there)

Every request submitted gets exactly one outcome, handed to its `reply` in the driver, unless `cancel` forgets it. A
deadline counts the work alone, neither the queue nor the start of the worker. A worker that misses one or dies is
replaced by a fresh one: whatever it needs beyond its constructor (weights) has to come with the request.
"""

import itertools
import logging
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from rl_llm.errors import RunFailed
from rl_llm.runtime.replica import BUILT, Answer, Replica, WorkerDied, ready

log = logging.getLogger(__name__)


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
    """What became of a request: its value, what of it is kept where it has two returns (a reference if it comes from an
    actor, see `fetch`), or the error."""

    value: Any = None
    kept: Any = None
    error: RequestFailed | None = None

    def result(self) -> Any:
        """The value; or raises what the method raised, as it would have been raised in this process."""
        if self.error is None:
            return self.value
        if self.error.cause is not None:
            raise self.error.cause from self.error
        raise self.error


@dataclass(frozen=True)
class Request:
    """A call of a worker's method.

    Args:
        id: names it in messages, such as "step-12/3".
        deadline_s: seconds of work after which its worker is killed; may be infinite.
        returns: 1, or 2 for a method that returns (value, kept), where what is kept stays in the object store.
        note: what else a message should say of it, such as which prompts it holds.
        reply: called in the driver with the outcome; not sent.
    """

    id: str
    method: str
    args: tuple[Any, ...]
    deadline_s: float
    returns: int = 1
    note: str = ""
    reply: Callable[[Outcome], None] = field(default=lambda outcome: None, compare=False)


@dataclass
class _Attempt:
    """A request with a worker, for the `number`th time."""

    request: Request
    number: int = 0
    since: float = 0.0

    def __str__(self) -> str:
        return f"{self.request.id} ({self.request.note})" if self.request.note else self.request.id

    @property
    def deadline(self) -> float:
        return self.since + self.request.deadline_s


@dataclass
class _Slot:
    """The place of one worker: empty, building, or with some attempts under way."""

    label: str
    replica: Replica | None = None
    attempts: dict[str, _Attempt] = field(default_factory=dict)
    building_since: float | None = None
    failed_starts: int = 0

    def __str__(self) -> str:
        return f"{self.label} ({self.replica.where})" if self.replica and self.replica.where else self.label

    @property
    def works_here(self) -> bool:
        """Whether its replica does what it was asked only when it is received."""
        return bool(self.attempts) and self.replica is not None and not self.replica.waits_for

    def clear(self) -> None:
        if self.replica is not None:
            self.replica.kill()
        self.replica, self.attempts, self.building_since = None, {}, None


class Pool:
    """Workers of one kind, and the requests to them; see the module's text.

    Args:
        name: labels the workers in messages: "rollout-0".
        make: makes a worker, in the replica's process.
        place: gives the empty replica of a slot.
        size: how many.
        dispatcher: serves it beside other pools; its own by default.
        max_attempts: workers a request may bring down, and starts in a row that may fail, before it is given up.
        retry_timeouts: whether a request that missed its deadline is sent again; else it fails at once.
        stateful: whether a worker has a state that is lost with its process; then no other takes its place.
        start_timeout_s: seconds a worker may take to start; it then is started again.

    `counters` counts `restarts` of workers, `retries` of requests and `timeouts` (missed deadlines) so far.

    Raises, while served:
        RunFailed: a worker does not start. What its constructor raises is raised as it is.
    """

    def __init__(
        self,
        name: str,
        make: Callable[..., Any],
        place: Callable[[int], Replica],
        size: int,
        dispatcher: "Dispatcher | None" = None,
        *,
        max_attempts: int = 3,
        retry_timeouts: bool = False,
        stateful: bool = False,
        start_timeout_s: float = 600.0,
    ) -> None:
        self.name, self.max_attempts, self.retry_timeouts = name, max_attempts, retry_timeouts
        self.stateful, self.start_timeout_s = stateful, start_timeout_s
        self._lost_state = False
        self._numbers = itertools.count(1)
        self.counters = {"restarts": 0, "retries": 0, "timeouts": 0}
        self.dispatcher = dispatcher or Dispatcher()
        self.dispatcher.pools.append(self)
        self._make, self._place = make, place
        self._queue: deque[_Attempt] = deque()
        self._finished: deque[tuple[Request, Outcome]] = deque()
        self._slots = [_Slot(f"{name}-{index}") for index in range(size)]
        self._fill()

    @property
    def size(self) -> int:
        return len(self._slots)

    @property
    def pending(self) -> bool:
        return bool(self._queue or self._finished or any(slot.attempts for slot in self._slots))

    def submit(self, request: Request) -> None:
        """Queues a request, or hands it to a free worker; returns at once.

        Raises `RunFailed` where a worker's state was lost and would be missed.
        """
        if self._lost_state:
            raise RunFailed(f"the {self.name} is gone, and its state with it; go on from the last checkpoint")
        self._queue.append(_Attempt(request))
        self._fill()

    def call(self, method: str, *args: Any, returns: int = 1) -> Any:
        """The value of a method (with `returns=2` value and kept), waited for without a deadline.

        For one worker with a state, such as the learner. Other pools of the dispatcher are served meanwhile.
        """
        outcomes: list[Outcome] = []

        def reply(outcome: Outcome) -> None:
            outcome.result()
            outcomes.append(outcome)

        self.submit(Request(method, method, args, math.inf, returns, reply=reply))
        self.dispatcher.serve(lambda: bool(outcomes))
        return (outcomes[0].value, outcomes[0].kept) if returns == 2 else outcomes[0].value

    def rebuild(self, make: Callable[..., Any]) -> None:
        """Other workers from now on, in the processes of these; requests are forgotten."""
        self._make, self._lost_state = make, False
        self.counters = dict.fromkeys(self.counters, 0)
        self._queue.clear()
        self._finished.clear()
        for slot in self._slots:
            slot.attempts, slot.failed_starts = {}, 0
            if slot.replica is not None:
                self._build(slot, slot.replica)
        self._fill()

    def where(self, index: int) -> str | None:
        """The process of a worker; None while it is starting, or where it is in this one."""
        replica = self._slots[index].replica
        return None if replica is None else replica.where

    def kill(self, index: int, *part: int) -> None:
        """Ends a worker's process behind the pool's back, to see what becomes of its requests.

        `part`: of a worker that is several, the rank of the one to be ended.
        """
        replica = self._slots[index].replica
        if replica is not None:
            replica.kill(*part)

    def cancel(self) -> None:
        """Forgets every request and kills the workers that are on one; the pool can be used on."""
        self._queue.clear()
        self._finished.clear()
        for slot in self._slots:
            if slot.attempts:
                self._clear(slot)

    def close(self) -> None:
        """Forgets every request and ends every worker."""
        self.cancel()
        for slot in self._slots:
            slot.clear()

    def _clear(self, slot: _Slot) -> None:
        # One in this process is made by handing it out again, and one that is nowhere yet has no state.
        self._lost_state |= self.stateful and slot.replica is not None and slot.replica.where is not None
        slot.clear()

    # What the dispatcher does with a pool.

    def _deliver(self) -> bool:
        """Hands one outcome to its reply, if there is one."""
        if not self._finished:
            return False
        request, outcome = self._finished.popleft()
        request.reply(outcome)
        return True

    def _waiting(self) -> list[tuple[Any, _Slot]]:
        """References and the slots that will have something to receive with them."""
        return [(ref, slot) for slot in self._slots if slot.replica is not None for ref in slot.replica.waits_for]

    def _due_here(self) -> _Slot | None:
        return next((slot for slot in self._slots if slot.works_here), None)

    def _take(self, slot: _Slot) -> None:
        """Receives from a replica that has something, or does the work of one in this process."""
        if slot.replica is None:
            return
        try:
            answer = slot.replica.receive()
        except WorkerDied as death:
            self._replace(slot, "poison", str(death))
            return
        if answer is None:
            return
        if answer.id == BUILT:
            if answer.error is not None:
                slot.clear()
                raise answer.error
            slot.building_since, slot.failed_starts = None, 0
        elif answer.id in slot.attempts:
            attempt = slot.attempts.pop(answer.id)
            self._finished.append((attempt.request, self._outcome(slot, attempt, answer)))
        self._fill()

    def _outcome(self, slot: _Slot, attempt: _Attempt, answer: Answer) -> Outcome:
        if answer.error is None:
            return Outcome(answer.value, answer.kept)
        what = f"{type(answer.error).__name__}: {answer.error}"
        return Outcome(error=RequestFailed("error", f"{slot} failed on {attempt}: {what}", answer.error))

    def _deadline(self) -> float:
        """When the first of them is late."""
        return min((self._late_at(slot) for slot in self._slots), default=math.inf)

    def _late_at(self, slot: _Slot) -> float:
        if slot.building_since is not None:
            return slot.building_since + self.start_timeout_s
        if slot.works_here:
            return math.inf
        return min((attempt.deadline for attempt in slot.attempts.values()), default=math.inf)

    def _replace_late(self) -> None:
        now = time.monotonic()
        for slot in self._slots:
            if now >= self._late_at(slot):
                limits = [a.request.deadline_s for a in slot.attempts.values() if now >= a.deadline]
                self._replace(slot, "timeout", f"missed its deadline of {(limits or [self.start_timeout_s])[0]:g} s")
        self._fill()

    def _replace(self, slot: _Slot, kind: Literal["poison", "timeout"], cause: str) -> None:
        attempts, lost, building = list(slot.attempts.values()), str(slot), slot.building_since is not None
        self._clear(slot)
        self.counters["restarts"] += 1
        if building:
            slot.failed_starts += 1
            if slot.failed_starts >= self.max_attempts:
                raise RunFailed(f"{lost} could not be started, {slot.failed_starts} times in a row; the last: {cause}")
            log.warning("%s did not start and is started again: %s", lost, cause)
        elif not attempts:
            log.warning("%s is replaced; it was idle: %s", lost, cause)
        now = time.monotonic()
        for attempt in attempts:
            if kind == "timeout" and now < attempt.deadline:
                attempt.number -= 1  # it only shared a worker with the one that is late
                self._queue.appendleft(attempt)
            else:
                self._lost(attempt, lost, kind, cause)
        self._fill()

    def _lost(self, attempt: _Attempt, lost: str, kind: Literal["poison", "timeout"], cause: str) -> None:
        self.counters["timeouts"] += kind == "timeout"
        which = f"attempt {attempt.number} of {self.max_attempts}"
        log.warning("%s is replaced; it was on %s, %s: %s", lost, attempt, which, cause)
        if attempt.number < self.max_attempts and (kind == "poison" or self.retry_timeouts):
            self.counters["retries"] += 1
            self._queue.appendleft(attempt)
            return
        did = "brought down" if kind == "poison" else "was too slow for"
        message = (
            f"{self.name} request {attempt} {did} {attempt.number} worker(s) and is given up; the last, {lost}: {cause}"
        )
        self._finished.append((attempt.request, Outcome(error=RequestFailed(kind, message))))

    def _fill(self) -> None:
        """Makes the workers that are missing, and hands what is queued to those that are free."""
        if self._lost_state:
            return
        for index, slot in enumerate(self._slots):
            if slot.replica is None:
                slot.replica = self._place(index)
                self._build(slot, slot.replica)
        while self._queue:
            slot = max(self._slots, key=lambda slot: slot.replica.free if slot.replica else 0)
            if slot.replica is None or slot.replica.free == 0:
                return
            attempt = self._queue.popleft()
            attempt.number, attempt.since = attempt.number + 1, time.monotonic()
            # Under a number of its own: what an earlier attempt may still answer is nobody's.
            id, request = str(next(self._numbers)), attempt.request
            slot.replica.call(id, request.method, request.args, request.returns)
            slot.attempts[id] = attempt

    def _build(self, slot: _Slot, replica: Replica) -> None:
        replica.build(self._make)
        slot.building_since = time.monotonic() if replica.waits_for else None

    def _status(self) -> str:
        """Who is at what since when, for the watchdog."""
        now = time.monotonic()
        parts = []
        for slot in self._slots:
            if slot.building_since is not None:
                parts.append(f"{slot} starting for {now - slot.building_since:.0f} of {self.start_timeout_s:.0f} s")
            for attempt in slot.attempts.values():
                limit = attempt.request.deadline_s
                of = f" of {limit:.0f}" if math.isfinite(limit) else ""
                parts.append(f"{slot} on {attempt} for {now - attempt.since:.0f}{of} s, attempt {attempt.number}")
        if not parts:
            parts.append(f"{self.name} idle")
        if self._queue:
            parts.append(f"{len(self._queue)} queued")
        return ", ".join(parts)


class Dispatcher:
    """Serves several pools at once: whoever waits for one thing lets all of them go on.

    Args:
        watchdog_s: whenever nothing has finished for so long, a warning says who waits for whom.
    """

    def __init__(self, watchdog_s: float = 60.0) -> None:
        self.pools: list[Pool] = []
        self.watchdog_s = watchdog_s

    def serve(self, done: Callable[[], bool] | None = None) -> None:
        """Hand outcomes to their replies until `done()`, by default until nothing is pending.

        An exception, one that a reply raises included, ends it and forgets every request: those that are under way may
        wait for the lost one for ever.

        Raises:
            RuntimeError: nothing is pending, so that `done` would be waited for in vain.
        """
        heard = warned = time.monotonic()
        try:
            while not done() if done else any(pool.pending for pool in self.pools):
                if any(pool._deliver() for pool in self.pools):
                    heard = warned = time.monotonic()
                elif not any(pool.pending or pool._waiting() for pool in self.pools):
                    raise RuntimeError("nothing is under way that this could wait for")
                elif not self._step(warned + self.watchdog_s) and time.monotonic() >= warned + self.watchdog_s:
                    warned = time.monotonic()
                    status = "; ".join(pool._status() for pool in self.pools)
                    log.warning("nothing finished for %.0f s: %s", warned - heard, status)
        except BaseException:
            for pool in self.pools:
                pool.cancel()
            raise

    def _step(self, until: float) -> bool:
        """Takes what is there; else does a piece of work in this process, or waits for an answer or a deadline."""
        here = next(((pool, slot) for pool in self.pools if (slot := pool._due_here()) is not None), None)
        waiting = [(ref, pool, slot) for pool in self.pools for ref, slot in pool._waiting()]
        wait_s = 0.0 if here else max(min([until, *(pool._deadline() for pool in self.pools)]) - time.monotonic(), 0.0)
        there = ready([ref for ref, _, _ in waiting], wait_s)
        answered = {id(slot): (pool, slot) for ref, pool, slot in waiting if ref in there}
        for pool, slot in answered.values():
            pool._take(slot)
        for pool in self.pools:
            pool._replace_late()
        if here and not there:
            pool, slot = here
            pool._take(slot)
        return bool(here or there)

    def close(self) -> None:
        """Ends every worker of every pool."""
        for pool in self.pools:
            pool.close()
