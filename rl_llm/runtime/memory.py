"""How much memory this process may have: the machine's, or less where a container or a batch system says so."""

import os
from pathlib import Path, PurePosixPath

SMALL_MACHINE = 32 * 2**30
STORE_AT_MOST = 10 * 10**9
"""Bytes; for a larger object store Ray asks for as much in /dev/shm."""


def physical_memory() -> int:
    """Bytes of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def memory_limit(cgroups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Bytes that this process may have: the least of the machine's memory and the limits of its control groups.

    Args:
        cgroups: where they are mounted, of version 1 or 2.
        own: which of them this process is in.
    """
    limits = [physical_memory()]
    for line in own.read_text().splitlines() if own.is_file() else []:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            root, name = cgroups, "memory.max"
        elif "memory" in controllers.split(","):
            root, name = cgroups / "memory", "memory.limit_in_bytes"
        else:
            continue
        # Each level may have a limit of its own. In a container its own group is the root, whatever the path says.
        for group in (PurePosixPath(path), *PurePosixPath(path).parents):
            try:
                limits.append(int((root / group.relative_to("/") / name).read_text()))
            except (OSError, ValueError):
                continue  # "max", or not to be seen from here
    return min(limits)


def ray_memory() -> tuple[int, int] | tuple[None, None]:
    """Bytes for Ray's object store and for its workers; None where what Ray takes by itself will do.

    By itself Ray would take 30 % of what is free for the store, and it sees the outermost control group's limit only.
    """
    limit = memory_limit()
    if SMALL_MACHINE <= limit == physical_memory():
        return None, None
    store = min(limit // 5, STORE_AT_MOST)
    return store, limit - store
