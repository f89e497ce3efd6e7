"""What signals do to the processes that are started or forked from this one."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

_DEFAULTS: dict[int, Any] = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGHUP: signal.SIG_DFL,
}
_only_here: WeakSet[Any] = WeakSet()


def only_here(handler: Any) -> None:
    """Have processes forked from this one take signals that `handler` is set for as any process does.

    `multiprocessing` ends its children with SIGTERM and waits for them: one that goes on is waited for for ever.
    """
    if callable(handler):
        _only_here.add(handler)


def _in_child() -> None:
    for number, default in _DEFAULTS.items():
        if signal.getsignal(number) in _only_here:
            signal.signal(number, default)


os.register_at_fork(after_in_child=_in_child)


@contextmanager
def outliving_the_terminal() -> Iterator[None]:
    """Processes that are started meanwhile ignore SIGHUP, which a closing terminal sends to all of them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL if before is None else before)
