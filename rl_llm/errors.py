"""Errors that the person running a job can act on."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can mend. The message says what to change; commands print it and exit with code 2."""


class RunFailed(Exception):
    """A run that had started cannot go on. The message names the cause; all up to the last checkpoint is kept."""


class Interrupted(KeyboardInterrupt):
    """Somebody asked the run to stop (SIGINT, SIGTERM); its state is saved."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint naming the closest known word, or the whole choice where nothing is close."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return "known: " + ", ".join(known) if known else "nothing is known here"
