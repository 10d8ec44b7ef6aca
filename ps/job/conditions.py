"""Waiting on the event loop until something is so, with a deadline and a sentence for when it is over."""

import asyncio
import time
from collections.abc import Callable

from torch_ps.common.errors import WaitTimeout


class Waits:
    """Of one shard, ``name``. Whoever changes what others may wait for calls ``notify``."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._changed = asyncio.Event()

    async def until(self, ready: Callable[[], bool], deadline: float, what: str) -> None:
        """Wait until ``ready()``.

        Args:
            deadline: on ``time.monotonic()``.

        Raises:
            WaitTimeout: it is not by then; says ``what``, and since when.
        """
        begin = time.monotonic()
        while not ready():
            left = deadline - time.monotonic()
            if left <= 0:
                raise WaitTimeout(f"{self._name}: {what} for {time.monotonic() - begin:.1f} s")
            try:
                await asyncio.wait_for(self._changed.wait(), left)
            except TimeoutError:
                continue

    def notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
