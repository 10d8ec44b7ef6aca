"""Admission: bounds how many first messages of calls are read at a time, as each may be megabytes from anybody.

    call --> place free? --no--> wait, for a bounded time
                 '--yes--> read one message, within a bounded time --> free the place --> handler

gRPC reads no message of a stream before the handler does, so a call that waits here costs only its HTTP/2 window. For
that reason the server serves calls with one request as streams of one message; on the wire they are the same.

Rules of this file
  1. At most ``PLACES`` messages are read at the same time, and at most ``PLACES_OF_HOST`` of one host, so that one host
     cannot keep the others out.
  2. Every wait has a deadline, also for a message that arrives byte by byte.
"""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

from torch_ps.common.errors import Overloaded, WaitTimeout

Message = TypeVar("Message")

PLACES, PLACES_OF_HOST = 32, 16
#: Seconds to wait for a place.
PATIENCE = 20.0


def host_of(peer: str) -> str:
    """A peer's address without its port: "ipv4:10.0.0.7"."""
    return peer.rpartition(":")[0]


class Admission:
    """The places of one kind of call."""

    def __init__(self) -> None:
        self._taken: Counter[str] = Counter()
        self._freed = asyncio.Event()

    async def read_first(
        self, receive: Callable[[], Awaitable[Message]], peer: str, seconds: float, name: str
    ) -> Message:
        """Read the first message of a call; b"" if the caller ended the call before it.

        Args:
            receive: Reads the next message.
            peer: Address of the caller.
            seconds: Deadline of the message.
            name: Name of the message, for the error.

        Raises:
            Overloaded: no place became free in ``PATIENCE`` seconds.
            WaitTimeout: the message did not arrive in time.
        """
        host = host_of(peer)
        async with self._place(host):
            try:
                async with asyncio.timeout(seconds):
                    return await receive()
            except TimeoutError:
                raise WaitTimeout(f"no {name} came within {seconds:g} s of the opening of the call") from None

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
            self._taken -= Counter((host,))  # also removes a host that has none left
            self._freed.set()
            self._freed = asyncio.Event()
