"""The lowest clock is the lowest of all clocks, whatever order they rise in."""

from hypothesis import given
from hypothesis import strategies as st

from torch_ps.ps.core.lowest_clock import LowestClock


@given(st.lists(st.integers(0, 3), min_size=1, max_size=5), st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3))))
def test_lowest_clock_is_the_lowest_of_all_after_each_rise(clocks: list[int], rises: list[tuple[int, int]]) -> None:
    lowest = LowestClock(clocks)
    for index, by in rises:
        index %= len(clocks)
        before, clocks[index] = clocks[index], clocks[index] + by
        lowest.rise(before, clocks[index])
        assert lowest.value == min(clocks)


def test_there_may_be_no_clock() -> None:
    assert LowestClock([]).value == 0
