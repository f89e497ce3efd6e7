"""What a process has one of: its folder, and how torch computes. Code of the user's may want them otherwise."""

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from os import PathLike
from pathlib import Path
from typing import Any

from rl_llm.errors import UserError

log = logging.getLogger(__name__)

FOLDER = "the working folder"
# By what it is called: how it is read and set, given torch.
_MODES: dict[str, tuple[Callable[[Any], Any], Callable[[Any, Any], Any]]] = {
    "torch's gradients": (lambda torch: torch.is_grad_enabled(), lambda torch, on: torch.set_grad_enabled(on)),
    "torch's default dtype": (lambda torch: torch.get_default_dtype(), lambda torch, it: torch.set_default_dtype(it)),
    "torch's default device": (
        lambda torch: torch.get_default_device().type,
        # None takes away what would otherwise stand between every call and its result.
        lambda torch, it: torch.set_default_device(None if it == "cpu" else it),
    ),
    "torch's matmul precision": (
        lambda torch: torch.get_float32_matmul_precision(),
        lambda torch, it: torch.set_float32_matmul_precision(it),
    ),
    "torch's threads": (lambda torch: torch.get_num_threads(), lambda torch, count: torch.set_num_threads(count)),
}


def absolute(path: str | PathLike[str]) -> Path:
    """A path that leads to the same place wherever the process goes. Raises `UserError` where its `~` is nobody's."""
    try:
        return Path(path).expanduser().absolute()
    except RuntimeError:
        raise UserError(f"{path}: nobody's home folder is known here; write the whole path") from None


class Apart:
    """Keeps what some code makes of the process for that code alone; a first change is warned of.

    Args:
        who: names the code.
    """

    def __init__(self, who: str) -> None:
        self._who, self._told = who, False
        self._own: dict[str, Any] = {}

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        before = _read()
        _set(self._own)
        try:
            yield
        finally:
            after = _read()
            self._own = {what: value for what, value in after.items() if value != before.get(what, value)}
            _set({what: before[what] for what in self._own})
            if self._own and not self._told:
                self._told = True
                changed = ", ".join(f"{what} (to {value})" for what, value in self._own.items())
                log.warning("%s changed %s; the run goes on with its own", self._who, changed)


@contextlib.contextmanager
def own_modes() -> Iterator[None]:
    """Within, torch has gradients and its default types, whatever the caller's are; those come back afterwards."""
    before = _read()
    torch = sys.modules.get("torch")
    if torch is not None:
        defaults = {"torch's gradients": True, "torch's default dtype": torch.float32, "torch's default device": "cpu"}
        _set({what: value for what, value in defaults.items() if before[what] != value})
    try:
        yield
    finally:
        after = _read()
        _set({what: value for what, value in before.items() if value != after.get(what)})


def _read() -> dict[str, Any]:
    state: dict[str, Any] = {}
    with contextlib.suppress(FileNotFoundError):
        state[FOLDER] = os.getcwd()
    torch = sys.modules.get("torch")  # where it is not loaded, nobody computes with it
    return state if torch is None else {**state, **{what: read(torch) for what, (read, _) in _MODES.items()}}


def _set(state: dict[str, Any]) -> None:
    for what, value in state.items():
        if what == FOLDER:
            with contextlib.suppress(OSError):
                os.chdir(value)
        else:
            _MODES[what][1](sys.modules["torch"], value)
