"""The first message of every call, read by few at a time: a message may be megabytes, and a caller may be anybody.

    call --> place free? --no--> waits, a bounded time
                 '--yes--> reads one message, a bounded time --> gives the place back --> handler

gRPC reads no message of a stream before it is asked to, so what waits here costs only its HTTP/2 window. That is why
the calls with one request are served as streams of one message; on the wire they are the same.

Rules of this file
  1. What is read here at the same time is at most ``PLACES`` messages, and ``PLACES_OF_HOST`` of one host, so that one
     host cannot keep the others out.
  2. Every wait has a deadline, also that for a message which comes byte by byte.
"""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

from torch_ps.common.errors import Overloaded, WaitTimeout

PLACES, PLACES_OF_HOST = 32, 16
#: Seconds that a place may be waited for.
PATIENCE = 20.0


def host_of(context: Any) -> str:
    """The peer's address without its port: "ipv4:10.0.0.7"."""
    return str(context.peer()).rpartition(":")[0]


class Readers:
    """The places for one kind of call."""

    def __init__(self) -> None:
        self._taken: Counter[str] = Counter()
        self._freed = asyncio.Event()

    async def first(self, frames: AsyncIterator[bytes], host: str, seconds: float, what: str) -> bytes:
        """The first message of a call, b"" if the caller ended the call before.

        Args:
            seconds: that the message may take.
            what: it is, for the error.

        Raises:
            Overloaded: no place was free for too long.
            WaitTimeout: the message did not come in time.
        """
        async with self._place(host):
            try:
                async with asyncio.timeout(seconds):
                    return await anext(frames, b"")
            except TimeoutError:
                raise WaitTimeout(f"no {what} came within {seconds:g} s of opening the stream") from None

    @contextlib.asynccontextmanager
    async def _place(self, host: str) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(PATIENCE):
                while self._taken[host] >= PLACES_OF_HOST or self._taken.total() >= PLACES:
                    await self._freed.wait()
        except TimeoutError:
            raise Overloaded(f"too many calls of {host} are still being read; try again later") from None
        self._taken[host] += 1
        try:
            yield
        finally:
            self._taken -= Counter((host,))  # and forgets a host that has none left
            self._freed.set()
            self._freed = asyncio.Event()
