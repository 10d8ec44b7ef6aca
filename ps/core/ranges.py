"""Positions as ranges: sorted, disjoint [start, stop), as few as possible. Pure functions over lists of pairs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

Range = tuple[int, int]


def count(ranges: Iterable[Range]) -> int:
    """Positions in all of them."""
    return sum(stop - start for start, stop in ranges)


def take(ranges: list[Range], number: int) -> list[Range]:
    """Remove ``number`` positions from the front of ``ranges`` and return them; there have to be that many."""
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


def merged(ranges: Iterable[Range]) -> list[Range]:
    """The same positions in order; ranges that touch become one. They have to be disjoint."""
    out: list[Range] = []
    for start, stop in sorted(ranges):
        if out and out[-1][1] == start:
            out[-1] = out[-1][0], stop
        else:
            out.append((start, stop))
    return out


def check(ranges: Sequence[Range], size: int) -> list[Range]:
    """Ranges that came from elsewhere.

    Raises:
        ValueError: they are not sorted, disjoint and within 0 and ``size``.
    """
    end = 0
    for start, stop in ranges:
        if not end <= start < stop <= size:
            raise ValueError(f"range {start} to {stop} of {size}")
        end = stop
    return list(ranges)


def heard(told: Any, size: int) -> list[Range]:
    """Ranges in the order in which they were given, from plain data.

    Raises:
        TypeError, ValueError: they are none, or not disjoint and within 0 and ``size``.
    """
    ranges = [(int(start), int(stop)) for start, stop in told]
    check(sorted(ranges), size)
    return ranges


def cut(number: int, batches: Sequence[int]) -> list[int]:
    """One round: a batch for each or, where ``number`` is less than all of them, parts in proportion to the batches."""
    whole = sum(batches)
    number = min(number, whole)
    ends, upto = [0], 0
    for batch in batches:
        upto += batch
        ends.append(number * upto // whole)
    return [stop - start for start, stop in pairwise(ends)]
