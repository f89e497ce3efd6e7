"""One run at a time in a process: it sets signals, torch's threads and modes, and ends the Ray it has started."""

import functools
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from rl_llm.errors import UserError

P = ParamSpec("P")
T = TypeVar("T")

# Whoever has it may have it again: a control is a run within a run.
_under_way = threading.RLock()


def one_at_a_time(run: Callable[P, T]) -> Callable[P, T]:
    """Have `run` raise `UserError` while another thread of this process is in it."""

    @functools.wraps(run)
    def alone(*args: P.args, **kwargs: P.kwargs) -> T:
        if not _under_way.acquire(blocking=False):
            raise UserError(
                "another thread of this process has a run under way; wait for its end, or start each run in a process "
                "of its own"
            )
        try:
            return run(*args, **kwargs)
        finally:
            _under_way.release()

    return alone
