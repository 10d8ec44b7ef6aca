"""Exchange for workers on this host, over a Unix socket: the same handler as gRPC's, with the socket in gRPC's place.

    Describe --> offer(name, token) --> worker connects --> user, token checked --> Exchange(connection, connection)
                                                            Hello read --> carry: socket --> take
                                                                                  socket <-- outbox

Rules of this file
  1. Decides nothing about a stream; it only carries messages and, at the end, the reason.
  2. No wait of a stranger is without a deadline, and so many connections and no more are open.
  3. A message is taken where it has been read, and frames leave when the loop has done what it was woken for: no task
     has to be woken in between.

Source: see ``torch_ps.common.wire.socket_frames``.
"""

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Self

from torch_ps.common.arena import host_id
from torch_ps.common.errors import PsError
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.wire.frames import messages
from torch_ps.common.wire.socket_frames import LENGTH, TOKEN_BYTES, length_of, put, same_user
from torch_ps.ps.transport.grpc_carrier import Take
from torch_ps.ps.transport.streams import Stream

log = logging.getLogger("torch_ps.ps")

#: Seconds in which a connection has to show the token.
TOKEN_SECONDS = 10.0
#: Bytes that are read ahead while nobody takes messages.
READ_AHEAD = 65536


class Connection(asyncio.Protocol):
    """One worker's socket: the ``Carrier`` of its Exchange, and what that needs of gRPC's context.

    Args:
        serve: what is done with it, a task of its own.
    """

    def __init__(self, serve: "Callable[[Connection], Awaitable[None]]") -> None:
        self._serve = serve
        self._loop = asyncio.get_running_loop()
        self._received, self._changed = bytearray(), asyncio.Event()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._stream: Stream | None = None
        self._take: Take = lambda message: None
        self._writable, self._flush_is_due = True, False

    # -------------------------------------------------------------- the socket

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
        self._end(None)
        return True  # it is closed when what is in its buffer has left

    def connection_lost(self, error: Exception | None) -> None:
        self._end(None)

    def pause_writing(self) -> None:
        self._writable = False

    def resume_writing(self) -> None:
        self._writable = True
        self._schedule()

    def _end(self, error: Exception | None) -> None:
        """Nothing more comes or goes; ``error`` says why, None: the worker has closed the socket."""
        self._changed.set()
        if self._ended.done():
            return
        if error is None:
            self._ended.set_result(None)
        else:
            self._ended.set_exception(error)

    # -------------------------------------------------------------- before there is a stream

    async def shown(self) -> bytes:
        """The token that the worker shows; less if it closes the socket before."""
        while len(self._received) < TOKEN_BYTES and not self._ended.done():
            await self._next()
        token = bytes(self._received[:TOKEN_BYTES])
        del self._received[:TOKEN_BYTES]
        return token

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        while (message := next(self._complete(), None)) is None:
            if self._ended.done():
                raise StopAsyncIteration
            await self._next()
        return message

    async def _next(self) -> None:
        self._changed.clear()
        self.transport.resume_reading()
        await self._changed.wait()

    async def aclose(self) -> None:
        """As of an asynchronous generator; the socket stays open to say why it ends."""

    # -------------------------------------------------------------- an open stream

    async def carry(self, stream: Stream, take: Take) -> None:
        self._stream, self._take = stream, take
        stream.outbox.on_put = self._schedule
        self.transport.resume_reading()
        self._schedule()
        self._deliver()
        try:
            await self._ended
        finally:
            stream.outbox.on_put = None
            self._take = lambda message: None

    def _deliver(self) -> None:
        try:
            for message in self._complete():
                self._take(message)
                if self._stream is not None and self._stream.crowded:
                    self.transport.pause_reading()  # until the next flush
                    return
        except Exception as error:  # noqa: BLE001 - who waits in carry raises it
            self._end(error)

    def _complete(self) -> Iterator[bytes]:
        """Messages that have come; each is forgotten when it is given."""
        while len(self._received) >= LENGTH.size and not (self._ended.done() and self._ended.exception()):
            length, end = length_of(bytes(self._received[: LENGTH.size]))
            if end:
                self._end(None)
                return
            stop = LENGTH.size + length
            if len(self._received) < stop:
                return
            message = bytes(memoryview(self._received)[LENGTH.size : stop])
            del self._received[:stop]
            yield message

    def _schedule(self) -> None:
        """Have what is in the outbox sent when the loop has done what it is at, so that frames travel together."""
        if not self._flush_is_due and self._stream is not None:
            self._flush_is_due = True
            self._loop.call_soon(self._flush, self._stream)

    def _flush(self, stream: Stream) -> None:
        self._flush_is_due = False
        for message in messages(self._leaving(stream)):
            self.transport.write(put(message))
        if not stream.crowded and not self.transport.is_reading() and not self._ended.done():
            self.transport.resume_reading()
            self._deliver()

    def _leaving(self, stream: Stream) -> Iterator[bytes]:
        """Frames of the outbox, as long as the socket takes them."""
        while self._writable and not self._ended.done() and not stream.outbox.empty():
            item = stream.outbox.get_nowait()
            if isinstance(item, PsError):
                self._end(item)
                return
            stream.wrote(1)
            yield item

    # -------------------------------------------------------------- as a context of gRPC

    def peer(self) -> str:
        return "unix:this host"

    async def abort(self, code: Any, text: str, trailers: tuple[tuple[str, str], ...]) -> None:
        """Tell why the stream ends."""
        end = pb.StreamEnd(error=trailers[0][1], text=text)
        self.transport.write(put(end.SerializeToString(), end=True))


Exchange = Callable[[Connection, Connection], Awaitable[None]]


class NearWorkers:
    """The socket of one shard.

    Args:
        exchange: the handler of a stream: of its messages and its context, which are both the connection.
        most: connections that are open at a time; more are closed at once.
    """

    def __init__(self, exchange: Exchange, most: int) -> None:
        self._exchange, self._most = exchange, most
        self._open: set[Connection] = set()
        self._token = secrets.token_bytes(TOKEN_BYTES)
        self._name = f"torch-ps-{secrets.token_hex(16)}"
        self._server: asyncio.Server | None = None

    async def listen(self) -> None:
        """Begin; where this system has no such sockets, gRPC carries all."""
        if not host_id():
            return
        loop = asyncio.get_running_loop()
        try:
            self._server = await loop.create_unix_server(lambda: Connection(self._serve), "\0" + self._name)
        except (OSError, AttributeError, NotImplementedError) as error:
            log.info("workers on this host use the network: %s", error)

    def offer(self, port: int) -> pb.SocketOffer | None:
        """What a worker is told; ``port`` is that of the server."""
        if self._server is None:
            return None
        return pb.SocketOffer(host=host_id(), name=self._name, token=self._token, port=port)

    async def close(self) -> None:
        """End, and every connection that is left."""
        if self._server is None:
            return
        self._server.close()
        for connection in tuple(self._open):
            connection.transport.close()

    async def _serve(self, connection: Connection) -> None:
        self._open.add(connection)
        try:
            if len(self._open) <= self._most and await self._let_in(connection):
                await self._exchange(connection, connection)
        finally:
            self._open.discard(connection)

    async def _let_in(self, connection: Connection) -> bool:
        async with asyncio.timeout(TOKEN_SECONDS):
            shown = await connection.shown()
        socket: Any = connection.transport.get_extra_info("socket")
        return same_user(socket) and secrets.compare_digest(shown, self._token)


async def _run(serve: Callable[[Connection], Awaitable[None]], connection: Connection) -> None:
    try:
        with contextlib.suppress(OSError, EOFError, TimeoutError, asyncio.CancelledError):
            await serve(connection)
    finally:
        connection.transport.close()
