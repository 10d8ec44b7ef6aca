"""Whether the event loop of this process still runs, as seen from other threads."""

import asyncio
import time

#: Seconds without a beat of the event loop after which a shard is unhealthy.
NO_BEAT_SECONDS = 10.0


class LoopHealth:
    """A heartbeat on the event loop."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    async def beat(self) -> None:
        """Note every second that the event loop runs, until cancelled."""
        while True:
            self._last = time.monotonic()
            await asyncio.sleep(1.0)

    def problem(self, now: float) -> str:
        """Why the shard is unhealthy at ``now``, a time on ``time.monotonic()``; "" if it is healthy."""
        silent = now - self._last
        return f"the event loop has not run for {silent:.0f} s" if silent > NO_BEAT_SECONDS else ""
