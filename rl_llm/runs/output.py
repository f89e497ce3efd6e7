"""Standard output and error are a view of a run: it goes on where nobody can see it any more."""

import contextlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class _View:
    """A text stream on which printing never fails: what its encoding lacks is escaped, what nobody reads is dropped."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        # ValueError: the stream is closed.
        with contextlib.suppress(OSError, ValueError):
            try:
                self._stream.write(text)
            except UnicodeEncodeError:
                encoding = self._stream.encoding
                self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def shielded(*names: str) -> Iterator[None]:
    """For as long as this lasts, whoever prints in this process prints to a view; `names`: "stdout", "stderr" or both.

    A reward that prints, a library's warning and our own lines alike: a closed terminal, the end of `| head` and a
    `tee` that Ctrl-C has ended cost their text and nothing else, the exit code included.
    """
    views: dict[str, _View] = {}
    for name in names or ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, _View):
            views[name] = _View(stream)
            setattr(sys, name, views[name])
    try:
        yield
    finally:
        for name, view in views.items():
            if getattr(sys, name) is view:
                setattr(sys, name, view._stream)
            _let_go(view._stream)


def _let_go(stream: Any) -> None:
    """Leave nothing in a lost stream for the interpreter to flush as it ends: that would be an error of its own."""
    try:
        stream.flush()
    except OSError:
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)
    except ValueError:
        pass  # closed, so there is nothing in it
