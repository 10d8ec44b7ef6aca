"""The lowest of many numbers that change one at a time, known without a look at all of them."""

from collections import Counter
from collections.abc import Iterable


class Lowest:
    """A list of numbers that knows its lowest one.

    Cost of a change: that of the different numbers there are, which are few, not of all. In sync mode there are two.

    Args:
        numbers: numbers at the start.

    Attributes:
        value: the lowest of them; 0 if there are none.
    """

    def __init__(self, numbers: Iterable[int]) -> None:
        self._numbers = list(numbers)
        self._times = Counter(self._numbers)  # how often each number is there
        self.value = min(self._times, default=0)

    def __getitem__(self, index: int) -> int:
        return self._numbers[index]

    def __setitem__(self, index: int, number: int) -> None:
        before, self._numbers[index] = self._numbers[index], number
        if number == before:
            return
        self._times[number] += 1
        self._times[before] -= 1
        gone = not self._times[before]
        if gone:
            del self._times[before]
        if number < self.value:
            self.value = number
        elif gone and before == self.value:
            self.value = min(self._times)
