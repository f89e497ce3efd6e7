"""What the C library does with freed memory."""

import ctypes
import sys

# Of <malloc.h>, glibc: how much free memory is kept, and how many pieces are mapped alone.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Let this process use its freed memory again rather than give it back to the system.

    A pass over a batch takes and frees gigabytes in pieces of megabytes. glibc returns such pieces at once, and taking
    them again costs a page fault for every 4 KiB. Without glibc this does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, -1)
