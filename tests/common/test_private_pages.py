"""Writes to a private mapping are found by the page, whatever made them."""

import ctypes
import mmap
import os
from collections.abc import Iterator

import pytest

from torch_ps.common.private_pages import PageSpans

PAGE, PAGES = mmap.PAGESIZE, 8


@pytest.fixture
def private() -> Iterator[tuple[mmap.mmap, int]]:
    """A private mapping of a memory file that another mapping writes, and its address."""
    fd = os.memfd_create("test")
    os.ftruncate(fd, PAGES * PAGE)
    with mmap.mmap(fd, PAGES * PAGE) as writer:
        writer[:] = b"a" * (PAGES * PAGE)
        region = mmap.mmap(fd, PAGES * PAGE, flags=mmap.MAP_PRIVATE)
        os.close(fd)
        yield region, ctypes.addressof(ctypes.c_char.from_buffer(region))


def spans(address: int, *pages: tuple[float, float]) -> list[tuple[int, int]]:
    return [(address + int(PAGE * first), int(PAGE * (last - first))) for first, last in pages]


def test_memory_that_was_only_read_or_never_used_is_untouched(private: tuple[mmap.mmap, int]) -> None:
    region, address = private
    assert region[0] == ord("a")
    assert PageSpans(spans(address, (0, 1), (1, 8))).untouched().tolist() == [True, True]


def test_write_of_one_byte_is_found_in_every_span_of_its_page_and_in_no_other(private: tuple[mmap.mmap, int]) -> None:
    region, address = private
    region[3 * PAGE + 17] = 0
    found = PageSpans(spans(address, (4, 8), (0, 3), (3.5, 4), (2.5, 3.25), (0, 8))).untouched().tolist()
    assert found == [True, True, False, False, False]


def test_write_of_the_same_value_counts_and_dropping_the_page_ends_it(private: tuple[mmap.mmap, int]) -> None:
    region, address = private
    region[0] = ord("a")
    assert PageSpans(spans(address, (0, 1))).untouched().tolist() == [False]
    region.madvise(mmap.MADV_DONTNEED, 0, PAGE)
    assert PageSpans(spans(address, (0, 1))).untouched().tolist() == [True]


def test_spans_far_apart_are_each_looked_up(private: tuple[mmap.mmap, int]) -> None:
    _, address = private
    ours = bytearray(2000 * PAGE)  # memory of no file counts as written to
    far = ctypes.addressof(ctypes.c_char.from_buffer(ours))
    assert PageSpans([(far, 2000 * PAGE), *spans(address, (0, 8))]).untouched().tolist() == [False, True]


def test_nothing_is_certain_where_the_system_does_not_tell(
    private: tuple[mmap.mmap, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> bytes:
        raise PermissionError("no")

    monkeypatch.setattr(os, "pread", refuse)
    assert PageSpans(spans(private[1], (0, 8))).untouched().tolist() == [False]
