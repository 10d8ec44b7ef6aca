"""Heartbeat timeout that does not count time in which this process itself was suspended (SIGSTOP, a paused machine).

A primary waits so for its standby. A standby does not judge its primary: see ``standby.py``.

Rules of this file
  1. Silence counts only while this process could have heard something: what came meanwhile is not read yet.
"""

import asyncio
import time
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")

#: Parts of a wait; a process that was suspended loses two of them at most.
PARTS = 8


async def wait_alive(sign: Awaitable[T], seconds: float) -> T:
    """Wait for ``sign``, which is cancelled after ``seconds`` in which this process has run.

    Raises:
        TimeoutError: It has not come by then.
    """
    task, part, left = asyncio.ensure_future(sign), seconds / PARTS, seconds
    try:
        while left > 0:
            begin = time.monotonic()
            await asyncio.wait({task}, timeout=min(part, left))
            if task.done():
                return task.result()
            left -= min(time.monotonic() - begin, 2 * part)
        raise TimeoutError
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait({task})
