"""Which pages of a ``MAP_PRIVATE`` mapping this process has written to, as the kernel knows it.

The kernel copies such a page when it is written to first. From then on the page is anonymous memory, not of the file.

Source: proc_pid_pagemap(5), bits 61 to 63 of a page's entry.
"""

import mmap
import os
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_ENTRY_BYTES, _FILE_BIT, _SWAPPED_BIT, _PRESENT_BIT = 8, 61, 62, 63
#: Pages between two spans up to which their entries are read in one call.
_NEAR = 512


def written_pages(first: int, last: int) -> npt.NDArray[np.bool_] | None:
    """Whether each page from ``first`` up to ``last``, not included, has been written to.

    Args:
        first, last: numbers of pages, addresses divided by ``mmap.PAGESIZE``.

    Returns:
        Shape (last - first,); None where the system does not tell.

    Cost: 8 us for 256 pages.
    """
    size = _ENTRY_BYTES * (last - first)
    try:
        pages = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        try:
            found = os.pread(pages, size, _ENTRY_BYTES * first)
        finally:
            os.close(pages)
    except OSError:
        return None
    if len(found) < size:
        return None
    flags = np.frombuffer(found, np.uint64)
    there = (flags >> np.uint64(_PRESENT_BIT) | flags >> np.uint64(_SWAPPED_BIT)) & np.uint64(1)
    written: npt.NDArray[np.bool_] = (there & ~(flags >> np.uint64(_FILE_BIT))).astype(np.bool_)
    return written


class PageSpans:
    """Spans of memory in mappings that are private to this process, of which it is asked again and again.

    Args:
        spans: address of the first byte and length in bytes of each.
    """

    def __init__(self, spans: Sequence[tuple[int, int]]) -> None:
        self._count = len(spans)
        #: Runs of spans that are near each other: first page, page after the last, and for each span of the run its
        #: number, its first page in the run and the page after its last.
        self._runs: list[tuple[int, int, npt.NDArray[np.intp], npt.NDArray[np.intp], npt.NDArray[np.intp]]] = []
        pages = [(address // mmap.PAGESIZE, -(-(address + size) // mmap.PAGESIZE)) for address, size in spans]
        run: list[int] = []
        end = 0
        for at in sorted(range(len(spans)), key=pages.__getitem__):
            if run and pages[at][0] > end + _NEAR:
                self._add(pages, run, end)
                run, end = [], 0
            run.append(at)
            end = max(end, pages[at][1])
        if run:
            self._add(pages, run, end)

    def _add(self, pages: Sequence[tuple[int, int]], run: Sequence[int], end: int) -> None:
        begin = pages[run[0]][0]
        bounds = np.array([pages[at] for at in run], np.intp) - begin
        self._runs.append((begin, end, np.array(run, np.intp), bounds[:, 0], bounds[:, 1]))

    def untouched(self) -> npt.NDArray[np.bool_]:
        """Whether it is certain that this process has not written to each span since it was mapped.

        Returns:
            Shape (number of spans,); False also where a neighbour on one of its pages was written to, or the system
            does not tell.
        """
        found = np.ones(self._count, np.bool_)
        for begin, end, run, first, last in self._runs:
            written = written_pages(begin, end)
            if written is None:
                found[run] = False
            elif written.any():
                before = np.concatenate(([0], np.cumsum(written)))  # pages written to before each page
                found[run] = before[last] == before[first]
        return found
