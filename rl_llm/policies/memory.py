"""What the C library does with freed memory."""

import ctypes
import sys

# Of <malloc.h>, glibc: sizes above the first limit are mapped alone, free memory above the second is given back.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 32 * 2**20


def keep_freed_memory() -> None:
    """Let this process use its freed memory again rather than give it back to the system.

    A pass over a batch takes and frees gigabytes in pieces of megabytes. glibc returns such pieces at once, and taking
    them again costs a page fault for every 4 KiB. Without glibc this does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)
