"""Carrier of an Exchange over one gRPC call.

gRPC's messages --read task--> on_message;  outbox --write task--> gRPC
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable
from typing import Any

from torch_ps.common.errors import PsError
from torch_ps.common.rpc.channel import CARRIER_KEY, MAX_REASON
from torch_ps.common.rpc.status import status_of, trailers_of
from torch_ps.common.wire.frames import Frame, join, messages
from torch_ps.ps.transport.carrier import MessageHandler
from torch_ps.ps.transport.streams import Stream


class GrpcCarrier:
    """A ``Carrier`` of one call.

    Args:
        frames: Request messages of the call.
        context: The call's ``grpc.aio.ServicerContext``.
    """

    kind, by_reference = "gRPC", False

    def __init__(self, frames: AsyncIterable[bytes], context: Any) -> None:
        self._messages, self._context, self.speaker = messages_of(frames), context, ""

    @property
    def peer(self) -> str:
        return str(self._context.peer())

    @property
    def reason(self) -> str:
        told = next((value for key, value in self._context.invocation_metadata() or () if key == CARRIER_KEY), "")
        return "".join(each for each in str(told)[:MAX_REASON] if each.isprintable())

    async def receive(self) -> Frame:
        return await anext(self._messages, b"")

    async def carry(self, stream: Stream, on_message: MessageHandler) -> None:
        reading = asyncio.create_task(self._read(stream, on_message))
        writing = asyncio.create_task(self._write(stream))
        try:
            done, _ = await asyncio.wait({reading, writing}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            reading.cancel()
            writing.cancel()
            await asyncio.wait({reading, writing})

    async def close(self) -> None:
        await self._messages.aclose()

    async def end(self, error: PsError) -> None:
        await self._context.abort(status_of(error), str(error), trailers_of(error))

    async def _read(self, stream: Stream, on_message: MessageHandler) -> None:
        await stream.until_room()
        async for message in self._messages:
            on_message(message)
            await stream.until_room()

    async def _write(self, stream: Stream) -> None:
        while True:
            frames = await _next_frames(stream)
            for message in messages(frames):
                await self._context.write(join(message))
            stream.note_sent(len(frames))


def messages_of(frames: AsyncIterable[bytes]) -> AsyncGenerator[bytes]:
    """Generator of request messages, made by gRPC; it holds the last message until it is closed."""
    generator: Any = aiter(frames)
    return generator  # type: ignore[no-any-return]


async def _next_frames(stream: Stream) -> list[Frame]:
    """All frames that are in the outbox; waits for the first.

    Raises:
        PsError: it is next.
    """
    outbox, frames = stream.outbox, list[Frame]()
    item = await outbox.get()
    while not isinstance(item, PsError):
        frames.append(item)
        if outbox.empty():
            return frames
        item = outbox.get_nowait()
    if not frames:
        raise item
    outbox.put_nowait(item)  # at the end is as good: nothing that follows an error is sent
    return frames
