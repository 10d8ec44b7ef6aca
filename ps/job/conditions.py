"""Waiting on the event loop until a condition holds, with a deadline and a sentence for when it passes."""

import asyncio
import time
from collections.abc import Callable

from torch_ps.common.errors import WaitTimeout


def clock() -> float:
    """Seconds on a clock that goes on while the machine sleeps, as the lease of a seat does."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Conditions:
    """A condition variable of one shard. Whoever changes what others may wait for calls ``notify``.

    Args:
        name: Begins the message of every timeout, such as "shard 0".
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._changed = asyncio.Event()

    async def until(self, ready: Callable[[], bool], deadline: float, what: str | Callable[[], str]) -> None:
        """Wait until ``ready()`` is true.

        Args:
            deadline: Time on ``time.monotonic()``; ``math.inf`` waits for as long as the caller lives.
            what: Clause that names the missing condition, or a function that returns it at the deadline.

        Raises:
            WaitTimeout: The deadline has passed; the message has ``what`` and the seconds waited.
        """
        begin = time.monotonic()
        while not ready():
            left = deadline - time.monotonic()
            if left <= 0:
                clause = what if isinstance(what, str) else what()
                raise WaitTimeout(f"{self._name}: {clause} for {time.monotonic() - begin:.1f} s")
            try:
                await asyncio.wait_for(self._changed.wait(), left)
            except TimeoutError:
                continue

    def notify(self) -> None:
        """Have everyone who waits look again."""
        self._changed.set()
        self._changed = asyncio.Event()
