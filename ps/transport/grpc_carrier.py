"""Carries an open Exchange over gRPC; ``torch_ps.ps.transport.unix_carrier`` does the same over a Unix socket.

    gRPC's messages --read task--> take;  outbox --write task--> gRPC

Rules of this file
  1. Decides nothing about a stream; it only carries messages.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, Callable
from typing import Any, Protocol, Self

from torch_ps.common.wire.frames import messages
from torch_ps.ps.transport.streams import Stream

Take = Callable[[bytes], None]


class Carrier(Protocol):
    """The messages of an Exchange: the first by ``anext``, all others to ``take``."""

    def __aiter__(self) -> Self:
        """Itself."""

    async def __anext__(self) -> bytes:
        """The next message, until the peer ends the stream."""

    async def carry(self, stream: Stream, take: Take) -> None:
        """Bring every message to ``take`` and every frame of the outbox to the peer, until either ends.

        Raises:
            PsError: ``take`` has raised it, or it was in the outbox.
        """

    async def aclose(self) -> None:
        """Give back what reading has kept."""


class GrpcCarrier:
    """A ``Carrier`` of one call; ``context`` is its ``grpc.aio.ServicerContext``."""

    def __init__(self, frames: AsyncIterable[bytes], context: Any) -> None:
        self._messages, self._context = messages_of(frames), context

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        return await anext(self._messages)

    async def carry(self, stream: Stream, take: Take) -> None:
        reading = asyncio.create_task(self._read(stream, take))
        writing = asyncio.create_task(self._write(stream))
        try:
            done, _ = await asyncio.wait({reading, writing}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            reading.cancel()
            writing.cancel()
            await asyncio.wait({reading, writing})

    async def aclose(self) -> None:
        await self._messages.aclose()

    async def _read(self, stream: Stream, take: Take) -> None:
        await stream.room()
        async for message in self._messages:
            take(message)
            await stream.room()

    async def _write(self, stream: Stream) -> None:
        while True:
            frames = await _waiting(stream)
            for message in messages(frames):
                await self._context.write(message)
            stream.wrote(len(frames))


def messages_of(frames: AsyncIterable[bytes]) -> AsyncGenerator[bytes]:
    """GRPC's generator of messages, which keeps the last one until it is closed."""
    generator: Any = aiter(frames)
    return generator  # type: ignore[no-any-return]


async def _waiting(stream: Stream) -> list[bytes]:
    """All frames that are there, at least one.

    Raises:
        PsError: it is next.
    """
    outbox, frames = stream.outbox, list[bytes]()
    item = await outbox.get()
    while isinstance(item, bytes):
        frames.append(item)
        if outbox.empty():
            return frames
        item = outbox.get_nowait()
    if not frames:
        raise item
    outbox.put_nowait(item)  # nothing comes after it that anybody could use
    return frames
