"""Folders that processes on several nodes write to, so that all of them have to see the same one."""

import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rl_llm.errors import UserError

MARK = ".shared-"


@contextmanager
def marked(folder: Path) -> Iterator[Path]:
    """A file in a folder, which is made where it is missing, for others to look for. Neither stays if that fails."""
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        # Under a name that nobody has asked for before: a network's disk remembers what was not there.
        with tempfile.NamedTemporaryFile(dir=folder, prefix=MARK) as mark:
            yield Path(mark.name)
    except BaseException:
        if made:
            with suppress(OSError):
                folder.rmdir()
        raise


def refuse_unshared(mark: Path, remedy: str) -> None:
    """Raise `UserError` where the other process's mark is not to be seen from this one; `remedy`: what to set."""
    if not mark.is_file():
        raise UserError(
            f"{socket.gethostname()} does not see {mark.parent}, which it has to write to and the driver has made; "
            f"{remedy} on storage that all nodes share"
        )
