"""How a run is asked to stop."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from rl_llm.runtime.signals import only_here


class Stoppable(Protocol):
    """What takes steps: a trainer, or a search with its trials."""

    stopping: bool


@contextmanager
def stop_between_steps(trainer: Stoppable) -> Iterator[None]:
    """A first SIGINT, SIGTERM or SIGHUP has it stop after the step under way; a second one interrupts at once.

    Not so SIGHUP: a terminal that closes sends several, and nobody insists.
    """

    def ask(number: int) -> None:
        if trainer.stopping and number != signal.SIGHUP:
            raise KeyboardInterrupt
        trainer.stopping = True
        # A handler may interrupt a print, and a print within a print fails. Nor may losing the terminal end the run.
        if sys.__stderr__ is not None:
            with contextlib.suppress(OSError):
                os.write(2, b"stopping after this step; once more to stop at once\n")

    with _handling(ask, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        yield


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM or SIGHUP outside the loop (before it, in the last test, in a control) ends the run as Ctrl-C does."""

    def interrupt(number: int) -> None:
        raise KeyboardInterrupt

    with _handling(interrupt, signal.SIGTERM, signal.SIGHUP):
        yield


@contextmanager
def _handling(act: Callable[[int], None], *numbers: int) -> Iterator[None]:
    """Act on these signals in this process. SIGHUP stays ignored where it is (nohup), and is ignored once it came."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: object) -> None:
        if number == signal.SIGHUP:
            signal.signal(number, signal.SIG_IGN)
        act(number)

    only_here(handle)
    handled = [n for n in numbers if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, handle) for number in handled}
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is handle:
                # None is one that was not set from Python, and cannot be set from it.
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
