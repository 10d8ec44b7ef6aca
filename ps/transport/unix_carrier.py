"""Carrier of an Exchange over a Unix socket, for workers on this host, and the socket that accepts them.

    Describe --> offer(name, token) --> worker connects --> user and token checked --> Exchange
                                        Hello read --> carry: socket --> on_message
                                                              socket <-- outbox

Rules of this file
  1. Waiting for an unauthenticated peer has a deadline, and one more than may wait ends the one that waits longest; the
     number of open connections is bounded. Other users are let go at once.
  2. A message is handled where it is read, and frames leave at the end of the loop's iteration: neither wakes a task.

Source: see ``torch_ps.common.wire.socket_frames``.
"""

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from torch_ps.common.arena import host_id
from torch_ps.common.errors import PsError
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.wire.frames import messages
from torch_ps.common.wire.socket_frames import LENGTH, TOKEN_BYTES, length_of, put, same_user
from torch_ps.ps.transport.carrier import Carrier, MessageHandler
from torch_ps.ps.transport.streams import Stream

log = logging.getLogger("torch_ps.ps")

#: Seconds in which a connection has to show the token.
TOKEN_SECONDS = 10.0
#: Connections that may be about to show the token.
MAX_WAITING = 64
#: Bytes that are read ahead while no stream is open.
READ_AHEAD = 65536


class UnixCarrier(asyncio.Protocol):
    """A ``Carrier`` of one worker's socket.

    Args:
        serve: Serves the connection; runs as a task of its own.
    """

    def __init__(self, serve: "Callable[[UnixCarrier], Awaitable[None]]") -> None:
        self._serve = serve
        self._loop = asyncio.get_running_loop()
        self._received, self._changed = bytearray(), asyncio.Event()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._stream: Stream | None = None
        self._on_message: MessageHandler = lambda message: None
        self._writable, self._flush_is_due = True, False

    # -------------------------------------------------------------- asyncio.Protocol

    def connection_made(self, transport: Any) -> None:
        self.transport: asyncio.Transport = transport
        self._task = self._loop.create_task(_run(self._serve, self))  # kept: the loop holds tasks weakly

    def data_received(self, data: bytes) -> None:
        self._received += data
        if self._stream is not None:
            self._deliver()
        elif len(self._received) > READ_AHEAD:
            self.transport.pause_reading()
        self._changed.set()

    def eof_received(self) -> bool:
        self._finish(None)
        return True  # keep the transport open until its buffer has left

    def connection_lost(self, error: Exception | None) -> None:
        self._finish(None)

    def pause_writing(self) -> None:
        self._writable = False

    def resume_writing(self) -> None:
        self._writable = True
        self._schedule()

    def _finish(self, error: Exception | None) -> None:
        """End reading and sending. ``error`` is the reason; None: the worker closed the socket."""
        self._changed.set()
        if self._ended.done():
            return
        if error is None:
            self._ended.set_result(None)
        else:
            self._ended.set_exception(error)

    # -------------------------------------------------------------- before the stream is open

    @property
    def peer(self) -> str:
        return "unix:this host"

    async def receive_token(self) -> bytes:
        """The token that the worker shows; shorter if it closes the socket first."""
        while len(self._received) < TOKEN_BYTES and not self._ended.done():
            await self._wait_for_data()
        token = bytes(self._received[:TOKEN_BYTES])
        del self._received[:TOKEN_BYTES]
        return token

    async def receive(self) -> bytes:
        while (message := next(self._complete(), None)) is None:
            if self._ended.done():
                return b""
            await self._wait_for_data()
        return message

    async def _wait_for_data(self) -> None:
        self._changed.clear()
        self.transport.resume_reading()
        await self._changed.wait()

    # -------------------------------------------------------------- an open stream

    async def carry(self, stream: Stream, on_message: MessageHandler) -> None:
        self._stream, self._on_message = stream, on_message
        stream.outbox.on_put = self._schedule
        self.transport.resume_reading()
        self._schedule()
        self._deliver()
        try:
            await self._ended
        finally:
            stream.outbox.on_put = None
            self._on_message = lambda message: None

    async def close(self) -> None:
        self._finish(None)
        self._received.clear()

    async def end(self, error: PsError) -> None:
        reason = pb.StreamEnd(error=type(error).__name__, text=str(error))
        self.transport.write(put(reason.SerializeToString(), end=True))

    def _deliver(self) -> None:
        try:
            for message in self._complete():
                self._on_message(message)
                if self._stream is not None and self._stream.crowded:
                    self.transport.pause_reading()  # until the next flush
                    return
        except Exception as error:  # noqa: BLE001 - carry raises it
            self._finish(error)

    def _complete(self) -> Iterator[bytes]:
        """Messages that have arrived whole; each is dropped from the buffer when it is yielded."""
        while len(self._received) >= LENGTH.size and not (self._ended.done() and self._ended.exception()):
            length, end = length_of(bytes(self._received[: LENGTH.size]))
            if end:
                self._finish(None)
                return
            stop = LENGTH.size + length
            if len(self._received) < stop:
                return
            message = bytes(memoryview(self._received)[LENGTH.size : stop])
            del self._received[:stop]
            yield message

    def _schedule(self) -> None:
        """Send the outbox at the end of this iteration of the loop, so that frames share a message."""
        if not self._flush_is_due and self._stream is not None:
            self._flush_is_due = True
            self._loop.call_soon(self._flush, self._stream)

    def _flush(self, stream: Stream) -> None:
        self._flush_is_due = False
        for message in messages(self._sendable(stream)):
            self.transport.write(put(message))
        if not stream.crowded and not self.transport.is_reading() and not self._ended.done():
            self.transport.resume_reading()
            self._deliver()

    def _sendable(self, stream: Stream) -> Iterator[bytes]:
        """Frames of the outbox, while the socket accepts them."""
        while self._writable and not self._ended.done() and not stream.outbox.empty():
            item = stream.outbox.get_nowait()
            if isinstance(item, PsError):
                self._finish(item)
                return
            stream.note_sent(1)
            yield item


class UnixListener:
    """The Unix socket of one shard.

    Args:
        exchange: Handler of an Exchange; ends the carrier with the error, if there is one.
        max_connections: Largest number of authenticated connections; further ones are closed at once.
    """

    def __init__(self, exchange: Callable[[Carrier], Awaitable[None]], max_connections: int) -> None:
        self._exchange, self._max_connections = exchange, max_connections
        self._waiting: dict[UnixCarrier, None] = {}  # in the order they came
        self._num_open = 0
        self._token = secrets.token_bytes(TOKEN_BYTES)
        self._name = f"torch-ps-{secrets.token_hex(16)}"
        self._server: asyncio.Server | None = None

    async def listen(self) -> None:
        """Start to accept. On a system without such sockets gRPC carries every stream."""
        if not host_id():
            return
        loop = asyncio.get_running_loop()
        try:
            self._server = await loop.create_unix_server(lambda: UnixCarrier(self._serve), "\0" + self._name)
        except (OSError, AttributeError, NotImplementedError) as error:
            log.info("no Unix socket here; workers on this host use the network: %s", error)

    def close(self) -> None:
        """Accept nobody any more; open connections go on."""
        if self._server is not None:
            self._server.close()
            self._server = None

    def offer(self, port: int) -> pb.SocketOffer | None:
        """What Describe offers to workers; None: there is no socket.

        Args:
            port: Port of the server.
        """
        if self._server is None:
            return None
        return pb.SocketOffer(host=host_id(), name=self._name, token=self._token, port=port)

    async def _serve(self, connection: UnixCarrier) -> None:
        socket: Any = connection.transport.get_extra_info("socket")
        if not (same_user(socket) and await self._authenticate(connection) and self._num_open < self._max_connections):
            return
        self._num_open += 1
        try:
            await self._exchange(connection)
        finally:
            self._num_open -= 1

    async def _authenticate(self, connection: UnixCarrier) -> bool:
        if len(self._waiting) >= MAX_WAITING:
            oldest = next(iter(self._waiting))
            del self._waiting[oldest]
            oldest.transport.abort()
        self._waiting[connection] = None
        try:
            async with asyncio.timeout(TOKEN_SECONDS):
                shown = await connection.receive_token()
        finally:
            self._waiting.pop(connection, None)
        return secrets.compare_digest(shown, self._token)


async def _run(serve: Callable[[UnixCarrier], Awaitable[None]], connection: UnixCarrier) -> None:
    try:
        with contextlib.suppress(OSError, EOFError, TimeoutError, asyncio.CancelledError):
            await serve(connection)
    finally:
        connection.transport.close()
