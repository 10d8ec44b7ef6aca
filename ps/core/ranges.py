"""Positions as ranges: sorted, disjoint [start, stop), as few as possible. Pure functions over lists of pairs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

Range = tuple[int, int]


def num_positions(ranges: Iterable[Range]) -> int:
    """Number of positions in all ranges together."""
    return sum(stop - start for start, stop in ranges)


def take_front(ranges: list[Range], number: int) -> list[Range]:
    """Remove the first ``number`` positions of ``ranges``, which holds at least as many, and return them."""
    taken: list[Range] = []
    while number:
        start, stop = ranges[0]
        end = min(start + number, stop)
        taken.append((start, end))
        number -= end - start
        if end == stop:
            del ranges[0]
        else:
            ranges[0] = end, stop
    return taken


def merge(ranges: Iterable[Range]) -> list[Range]:
    """The same positions in order, with ranges that touch made one. The ranges have to be disjoint."""
    out: list[Range] = []
    for start, stop in sorted(ranges):
        if out and out[-1][1] == start:
            out[-1] = out[-1][0], stop
        else:
            out.append((start, stop))
    return out


def check_ranges(ranges: Sequence[Range], size: int) -> list[Range]:
    """Ranges that came from elsewhere, as a list.

    Raises:
        ValueError: the ranges are not sorted, disjoint and within 0 and ``size``.
    """
    end = 0
    for start, stop in ranges:
        if not end <= start < stop <= size:
            raise ValueError(f"range {start} to {stop} of {size}")
        end = stop
    return list(ranges)


def parse_ranges(data: Any, size: int) -> list[Range]:
    """Ranges from plain data, in the order of ``data``, which need not be sorted.

    Raises:
        TypeError, ValueError: ``data`` holds no ranges, or they are not disjoint and within 0 and ``size``.
    """
    ranges = [(int(start), int(stop)) for start, stop in data]
    check_ranges(sorted(ranges), size)
    return ranges


def split_round(number: int, batches: Sequence[int]) -> list[int]:
    """Split one round of ``number`` positions: a batch for each or, where it does not suffice, in proportion."""
    whole = sum(batches)
    number = min(number, whole)
    ends, upto = [0], 0
    for batch in batches:
        upto += batch
        ends.append(number * upto // whole)
    return [stop - start for start, stop in pairwise(ends)]
