"""A connection to another server of the job: what it says of itself, and the log of its state for a standby.

Rules of this file
  1. Whatever gRPC raises becomes the ``PsError`` that stands behind it; callers know nothing of gRPC.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import grpc

from torch_ps.common import version
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.rpc import channel
from torch_ps.common.rpc.credentials import Access
from torch_ps.common.rpc.status import error_of
from torch_ps.common.wire.address import Address
from torch_ps.common.wire.field_ranges import MAX_SENTENCE

#: Seconds in which a primary has to end the stream of a standby that cannot follow.
FAIL_SECONDS = 2.0


class ReplicaStream:
    """A standby's end of one Replicate call: frames from the primary, receipts to it."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self._received = 0
        self._changed = asyncio.Event()

    async def frames(self) -> AsyncIterator[bytes]:
        """The frames, until the primary ends the stream."""
        while (message := await self._call.read()) is not grpc.aio.EOF:
            yield message

    def confirm(self) -> None:
        """Have the primary told that one more frame was taken."""
        self._received += 1
        self._changed.set()

    async def fail(self, reason: str) -> None:
        """Tell the primary why this standby cannot follow; wait until it has ended the stream, for a moment at most."""
        text = "".join(each if each.isprintable() else " " for each in reason)[:MAX_SENTENCE]
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError, TimeoutError):
            async with asyncio.timeout(FAIL_SECONDS):
                await self._call.write(pb.ReplicaUp(failed=text).SerializeToString())
                async for _ in self.frames():
                    pass

    async def send_receipts(self, seconds: float) -> None:
        """Send how many frames were taken, at once and at least every ``seconds``, until the stream ends.

        Whoever reads from the stream learns why it has ended.
        """
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            while True:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), seconds)
                self._changed.clear()
                await self._call.write(pb.ReplicaUp(received=self._received).SerializeToString())


class Peer:
    """One connection, made by ``connect`` with the certificates and the token as they are then."""

    def __init__(self, address: Address, connection: grpc.aio.Channel, access: Access) -> None:
        self._address, self._connection, self._access = address, connection, access

    async def describe(self, seconds: float) -> pb.JobDescription:
        """Ask the server for its job, without the model; wait until it is up.

        Raises:
            PsError: It has not answered within ``seconds``, or refuses.
        """
        call = self._connection.unary_unary(
            channel.method("Describe"), pb.DescribeRequest.SerializeToString, pb.JobDescription.FromString
        )
        with self._errors():
            reply: pb.JobDescription = await call(
                pb.DescribeRequest(version=version.current()),
                timeout=seconds,
                wait_for_ready=True,
                metadata=self._access.metadata,
            )
        return reply

    @asynccontextmanager
    async def replicate(self, server: str, receipt_seconds: float) -> AsyncIterator[ReplicaStream]:
        """Follow the server as its standby, for as long as the context lasts.

        Args:
            server: Name of this life of the standby.
            receipt_seconds: Longest pause between two receipts.

        Raises:
            PsError: The stream has failed; also from within the context.
        """
        with self._errors():
            call: Any = self._connection.stream_stream(channel.method("Replicate"), None, None)(
                metadata=self._access.metadata
            )
            hello = pb.ReplicaHello(server=server, version=version.current())
            await call.write(pb.ReplicaUp(hello=hello).SerializeToString())
            stream = ReplicaStream(call)
            sending = asyncio.create_task(stream.send_receipts(receipt_seconds))
            try:
                yield stream
            finally:
                sending.cancel()
                call.cancel()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except grpc.aio.AioRpcError as error:
            raise error_of(error, str(self._address)) from None


@asynccontextmanager
async def connect(address: Address, access: Access) -> AsyncIterator[Peer]:
    """Connect to the server at ``address``.

    Raises:
        ConfigError: The certificates of this process cannot be read.
    """
    async with access.connect_aio(address, channel.STANDBY_OPTIONS) as connection:
        yield Peer(address, connection, access)
