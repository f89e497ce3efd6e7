"""Errors that the person running a job can act on."""

import contextlib
import difflib
from collections.abc import Iterable, Iterator


class UserError(Exception):
    """Something the user can mend. The message says what to change; commands print it and exit with code 2."""


class RunFailed(Exception):
    """A run that had started cannot go on. The message names the cause; all up to the last checkpoint is kept."""


class Interrupted(KeyboardInterrupt):
    """Somebody asked the run to stop (SIGINT, SIGTERM); its state is saved."""


_command_line = False


@contextlib.contextmanager
def on_the_command_line() -> Iterator[None]:
    """Within, messages name options as commands take them, and not as Python does."""
    global _command_line
    before, _command_line = _command_line, True
    try:
        yield
    finally:
        _command_line = before


def option(name: str, value: str = "") -> str:
    """An option as the caller writes it: `--resume` in a command; in Python `resume=True`, or its name alone."""
    if _command_line:
        return f"--{name}"
    return f"{name}={value}" if value else name


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint naming the closest known word, or the whole choice where nothing is close."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return "known: " + ", ".join(known) if known else "nothing is known here"
