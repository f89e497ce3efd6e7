"""Files that are there whole or not at all: written aside, on disk, renamed. And what ends a run on a full disk."""

import contextlib
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rl_llm.errors import RunFailed, UserError, option

FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` to write, which takes its name once it is on disk; where that fails `path` is as it was."""
    aside = path.with_name(f".{path.name}.partial")
    try:
        yield aside
        sync(aside)
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise


def write_text(path: Path, text: str) -> None:
    """Write a whole text file; lone surrogates, which no file can hold, are escaped."""
    with replacing(path) as aside:
        aside.write_text(text, encoding="utf-8", errors="backslashreplace")


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def free_name(path: Path) -> Path:
    """`path`, or where something has that name already the first of `path-2`, `path-3`, ... that is free."""
    number, free = 1, path
    while os.path.lexists(free):
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free


@contextmanager
def room_for(path: Path | str, then: str | None = None) -> Iterator[None]:
    """Raises `RunFailed`, which says what to do, where the disk turns out to be full while `path` is written."""
    try:
        yield
    except (RunFailed, UserError):
        raise
    except Exception as error:
        if not _full(error):
            raise
        where = getattr(error, "filename", None) or path
        then = then or f"go on with {option('resume', 'True')}"
        raise RunFailed(f"disk full: no room to write {where}; free room, then {then}") from error


def _full(error: Exception) -> bool:
    # Some libraries say it in words only, safetensors for one.
    return (isinstance(error, OSError) and error.errno in FULL) or any(os.strerror(n) in str(error) for n in FULL)
