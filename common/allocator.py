"""Megabyte messages without a page fault per page.

Every message of a few MiB is allocated and freed again. glibc gives such memory back to the kernel and asks for it anew
each time, and the kernel then clears and maps every page again. Told to keep what was freed, glibc reuses it.

Source: mallopt(3).
"""

import contextlib
import ctypes

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3

#: Largest request that the heap serves; glibc allows no more.
_MMAP_THRESHOLD = 32 << 20
#: Freed bytes at the end of a heap that are kept.
_TRIM_THRESHOLD = 512 << 20


def keep_freed_memory() -> None:
    """Let this process reuse large blocks instead of returning them. Does nothing where there is no glibc.

    Cost: up to 512 MiB of the process's peak stay with it; benchmarks in ``docs/benchmark-log.md``.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD)
    mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD)


def give_back_freed_memory() -> None:
    """Return free memory to the kernel once, after a step that will not be repeated."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
