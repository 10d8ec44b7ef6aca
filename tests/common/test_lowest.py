"""The lowest number is the lowest of all numbers, whatever order they change in."""

from hypothesis import given
from hypothesis import strategies as st

from torch_ps.common.lowest import Lowest

NUMBERS = st.integers(-2, 3)


@given(st.lists(NUMBERS, min_size=1, max_size=5), st.lists(st.tuples(st.integers(0, 4), NUMBERS)))
def test_value_is_the_lowest_of_all_after_each_change(numbers: list[int], changes: list[tuple[int, int]]) -> None:
    lowest = Lowest(numbers)
    for index, number in changes:
        lowest[index % len(numbers)] = numbers[index % len(numbers)] = number
        assert lowest.value == min(numbers)
        assert [lowest[each] for each in range(len(numbers))] == numbers


def test_there_may_be_no_number() -> None:
    assert Lowest([]).value == 0
