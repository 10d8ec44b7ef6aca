"""The lowest of many clocks that only rise, known without a look at all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable


class LowestClock:
    """The lowest of some counters.

    Args:
        clocks: counters at the start.

    Attributes:
        value: the lowest of them; 0 if there are none.
    """

    def __init__(self, clocks: Iterable[int]) -> None:
        self._num_at = Counter(clocks)
        self.value = min(self._num_at, default=0)

    def rise(self, before: int, after: int) -> None:
        """Note that one counter has gone from ``before`` to ``after``, >= ``before``."""
        if before == after:
            return
        self._num_at[after] += 1
        self._num_at[before] -= 1
        if not self._num_at[before]:
            del self._num_at[before]
            if before == self.value:
                self.value = min(self._num_at)
