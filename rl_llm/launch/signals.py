"""How a run is asked to stop."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from rl_llm.trainer.trainer import Trainer


@contextmanager
def stop_between_steps(trainer: Trainer) -> Iterator[None]:
    """A first SIGINT or SIGTERM has the trainer stop after the step under way; a second one interrupts at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, frame: object) -> None:
        if trainer.stopping:
            raise KeyboardInterrupt
        trainer.stopping = True
        # A handler may interrupt a print, and a print within a print fails.
        os.write(2, b"stopping after this step; once more to stop at once\n")

    old = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM outside the loop (before it, in the last test, in a control) ends the run in order, as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    old = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)
