"""A worker as a Ray actor."""

import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

import ray
import ray.exceptions

from rl_llm.errors import RunFailed
from rl_llm.imports import look_in, places
from rl_llm.runtime.cluster import send_tables_as_ipc
from rl_llm.runtime.replica import BUILT, Answer, WorkerDied, close
from rl_llm.runtime.signals import only_here

# Each says that the process is gone, or what it was given: another try elsewhere may do.
_GONE = (
    ray.exceptions.RayActorError,
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.OutOfMemoryError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.ObjectLostError,
    ray.exceptions.ActorPlacementGroupRemoved,
    ray.exceptions.ActorUnschedulableError,
)
_FULL = (ray.exceptions.ObjectStoreFullError, ray.exceptions.OutOfDiskError)

_MEMORY = re.compile(r"was ([\d.]+ ?[KMGT]?B)(?: used)? / ([\d.]+ ?[KMGT]?B)")
_ADVICE = re.compile(r"\s*(Some common causes|Refer to the doc|To see |Check cluster logs|Tip: |Consider ).*")


def prepare_process(folders: Sequence[str]) -> None:
    """Make an actor's process one that modules of the user's work in; `folders`: where these lie."""
    look_in(*folders)
    # What arrives pickled names its modules without asking `import_function`.
    sys.path += [folder for folder in folders if folder not in sys.path]
    send_tables_as_ipc()
    only_here(signal.getsignal(signal.SIGTERM))  # Ray's own


class _Host:
    """The process of one worker. Building the worker is a call of its own, so that what its constructor raises
    arrives as it was raised; from an actor's constructor it would arrive as a death."""

    def __init__(self, folders: Sequence[str]) -> None:
        """`folders`: where modules of the user's lie."""
        prepare_process(folders)
        self._worker: Any = None

    def build(self, make: Callable[..., Any]) -> str:
        close(self._worker)
        self._worker = None  # before the next one is made: two would need twice the memory
        self._worker = make()
        return f"pid {os.getpid()} on {ray.util.get_node_ip_address()}"

    def call(self, method: str, *args: Any) -> Any:
        return getattr(self._worker, method)(*args)


class Actor:
    """A replica in a process of its own, with `threads` OpenMP threads.

    Args:
        options: resources and scheduling strategy as `Placement.bundle` gives them, or any of Ray's actor options.
        slots: calls that may be under way at once, for workers that batch by themselves.
    """

    def __init__(self, threads: int, options: dict[str, Any], slots: int = 1) -> None:
        variables = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
        host: Any = ray.remote(_Host)
        self._handle = host.options(
            **options, runtime_env={"env_vars": variables}, max_restarts=0, max_task_retries=0, max_concurrency=slots
        ).remote(places())
        self.slots = slots
        self.where: str | None = None
        # By the reference that is ready first: the id of the call, and the references of all its returns.
        self._calls: dict[Any, tuple[str, list[Any]]] = {}

    @property
    def free(self) -> int:
        building = any(id == BUILT for id, _ in self._calls.values())
        return 0 if building else self.slots - len(self._calls)

    @property
    def waits_for(self) -> Sequence[Any]:
        return list(self._calls)

    def build(self, make: Callable[..., Any]) -> None:
        # Calls of the worker that was there before are forgotten; they end first, an actor takes one after the other.
        ref = self._handle.build.remote(make)
        self._calls = {ref: (BUILT, [ref])}

    def call(self, id: str, method: str, args: tuple[Any, ...], returns: int) -> None:
        refs = self._handle.call.options(num_returns=returns).remote(method, *args)
        refs = refs if returns > 1 else [refs]
        self._calls[refs[0]] = id, refs

    def receive(self) -> Answer:
        """The value of a call's first return and the reference of its second, if it has one; or what it raised.

        What was raised carries the remote traceback as a note. Raises `WorkerDied` where no answer will come.
        """
        [ref], _ = ray.wait(list(self._calls), num_returns=1, fetch_local=False)
        id, refs = self._calls.pop(ref)
        try:
            value = ray.get(ref)
        except Exception as exception:
            error: Any = exception
            raised = isinstance(error, ray.exceptions.RayTaskError)
            cause: Exception = error.cause if raised else error
            # A method that talks to Ray may itself raise what would else be news of this actor.
            if isinstance(cause, ray.exceptions.ObjectLostError if raised else _GONE):
                raise WorkerDied(reason_of(cause)) from None
            if isinstance(cause, _FULL):
                cause = RunFailed(f"Ray has no room for what a worker returned: {reason_of(cause)}")
            elif raised:
                cause.add_note(re.sub(r"\x1b\[\d*m", "", str(error)))
            return Answer(id, error=cause)
        if id == BUILT:
            self.where = value
        return Answer(id, value, refs[1] if len(refs) > 1 else None)

    def kill(self, *part: int) -> None:
        if ray.is_initialized():
            ray.kill(self._handle)


def reason_of(error: Exception) -> str:
    """What Ray says of a loss, in a line: how full the node's memory was, or else what it puts last but advice."""
    text, name = str(error), type(error).__name__
    full = _MEMORY.search(text)
    if full:
        used = f"{full[1]} of {full[2]}"
        return f"{name}: Ray killed it because its node ran low on memory, {used} used; start fewer workers"
    # It begins with a page of identifiers.
    lines = [said for line in text.splitlines() if (said := _ADVICE.sub("", line).strip())]
    return f"{name}: {lines[-1]}" if lines else name
