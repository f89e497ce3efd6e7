"""The run directory as a place: a new name for every run, and one process at a time that writes in it."""

import contextlib
import json
import os
import secrets
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rl_llm.errors import UserError, option
from rl_llm.files import FULL, free_name

LOCK = ".lock"
CLEARING = ".lock.clearing"
# The holder touches its lock; from another machine, one that was left alone for longer is nobody's.
TOUCH_S, STALE_S = 20.0, 300.0


@contextmanager
def run_directory(given: Path | None, prefix: str = "") -> Iterator[Path]:
    """The directory that was asked for, or one under `runs/` that no other start has; empty at the end, it goes again.

    Raises:
        UserError: it cannot be made.
    """
    if given is not None:
        yield given
        return
    wanted = Path("runs") / (prefix + time.strftime("%Y%m%d-%H%M%S"))
    with _made(wanted.parent):
        path = _new(wanted)
        try:
            yield path
        finally:
            _remove_empty(path)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a run directory, made where there is none, against all other processes that would write in it.

    The lock is a file that says who has it, and that only one can create: this holds on NFS too. One whose holder has
    died is taken over. Reading a run needs no lock.

    Raises:
        UserError: another process has it, or there can be no such directory.
    """
    with _made(path):
        lock, mine, owner = path / LOCK, json.dumps(_this_process()).encode(), os.getpid()
        with _refusing(path):
            while not _create(lock, mine):
                _clear_stale(lock)
        done = threading.Event()
        threading.Thread(target=_keep_fresh, args=(lock, done.wait), name="run lock", daemon=True).start()
        try:
            yield
        finally:
            done.set()
            with contextlib.suppress(OSError):
                # What is forked within a run and leaves by an exception comes by here too.
                if os.getpid() == owner and lock.read_bytes() == mine:
                    lock.unlink()


def refuse_held(path: Path) -> None:
    """Raise `UserError` where another process holds a run directory."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        _refuse_living(path / LOCK, (path / LOCK).read_bytes())


def _create(lock: Path, content: bytes) -> bool:
    """Whether the lock was free and is ours now."""
    try:
        handle = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    try:
        os.write(handle, content)
    except OSError:
        lock.unlink()
        raise
    finally:
        os.close(handle)
    return True


def _clear_stale(lock: Path) -> None:
    """Take away the lock that is there if its holder has left it. Raises `UserError` if not."""
    guard = lock.with_name(CLEARING)
    with contextlib.suppress(FileNotFoundError):  # its holder has just given it back
        seen = lock.read_bytes()
        _refuse_living(lock, seen)
        # One at a time: who is a little later would take away the new lock of who was first.
        try:
            guard.mkdir()
        except FileExistsError:
            if _untouched_s(guard) < STALE_S:
                raise UserError(f"{lock.parent} is just being taken over by another start") from None
            guard.rmdir()
            return
        try:
            if lock.read_bytes() == seen:
                lock.unlink()
        finally:
            guard.rmdir()


def _refuse_living(lock: Path, content: bytes) -> None:
    path = lock.parent
    try:
        holder = json.loads(content)
        pid, host, pids, started = int(holder["pid"]), holder["host"], holder["pids"], holder["started"]
    except (ValueError, KeyError, TypeError):
        if _untouched_s(lock) < STALE_S:
            raise UserError(f"{path} is being started in by another process; if there is none, delete {lock}") from None
        return
    here = _this_process()
    if (host, pids) == (here["host"], here["pids"]):
        # Process ids come again, and not with the same start.
        if _started(pid) != started:
            return
        what = "this process" if pid == here["pid"] else f"process {pid} on this machine, {host}"
        remedy = "" if pid == here["pid"] else f" or stop it (kill {pid})"
    else:
        untouched = _untouched_s(lock)
        if untouched > STALE_S:
            return
        what = f"process {pid} on {host}, last seen {max(untouched, 0):.0f} s ago"
        remedy = f", stop it there (kill {pid}), try again {STALE_S / 60:.0f} minutes after its end"
    raise UserError(f"{path} is in use by {what}: wait for it{remedy}, or name another {option('output')}")


def _this_process() -> dict[str, Any]:
    try:
        pids = os.readlink("/proc/self/ns/pid")  # containers may share a host's name and not its process ids
    except OSError:
        pids = ""
    pid = os.getpid()
    return {
        "pid": pid, "host": socket.gethostname(), "pids": pids, "started": _started(pid), "token": secrets.token_hex(8),
    }  # fmt: skip


def _started(pid: int) -> str | None:
    """When a process of this machine began, in the system's own words ("" where it has none); None once it is gone."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass  # it is there, and somebody else's
    try:
        # After the name, which may have blanks and brackets in it: the state first, the start as the 20th.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return ""
    return None if fields[0] in "ZX" else fields[19]


def _untouched_s(path: Path) -> float:
    """Seconds since a file was touched, by the clock of the machine that has the files."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".now-") as now:
        return os.fstat(now.fileno()).st_mtime - path.stat().st_mtime


def _keep_fresh(lock: Path, wait: Callable[[float], bool]) -> None:
    while not wait(TOUCH_S):
        with contextlib.suppress(OSError):
            os.utime(lock)


@contextmanager
def _made(path: Path) -> Iterator[None]:
    """A folder and those above it, made where they are missing; what was made and is empty at the end goes again."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    with _refusing(path):
        path.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for folder in missing:
            _remove_empty(folder)


def _new(path: Path) -> Path:
    """A folder that nobody had, of this name or the next free one."""
    while True:
        free = free_name(path)
        with _refusing(path), contextlib.suppress(FileExistsError):  # somebody was a moment earlier
            free.mkdir()
            return free


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """Raises `UserError` where there can be no such directory; a full disk is no fault of the name."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise
        raise UserError(f"{path} cannot be written to ({error.strerror}); name another {option('output')}") from None


def _remove_empty(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.rmdir()
