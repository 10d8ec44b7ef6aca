"""Exchange for workers on this host, over a Unix socket: the same handler as gRPC's, with the socket in gRPC's place.

    Describe --> offer(name, token) --> worker connects --> user, token checked --> Exchange(messages, context)

Rules of this file
  1. Decides nothing about a stream; it only carries messages and, at the end, the reason.
  2. No wait of a stranger is without a deadline, and so many connections and no more are open.

Source: see ``torch_ps.common.socket_frames``.
"""

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

from torch_ps.common.arena import host_id
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.socket_frames import LENGTH, TOKEN_BYTES, length_of, put, same_user

log = logging.getLogger("torch_ps.ps")

#: Seconds in which a connection has to show the token.
TOKEN_SECONDS = 10.0

Exchange = Callable[[AsyncGenerator[bytes], "Context"], Awaitable[None]]


class Context:
    """What an Exchange needs of gRPC's context, on a socket."""

    def __init__(self, writer: asyncio.StreamWriter, worker: str) -> None:
        self._writer, self._peer = writer, worker

    def peer(self) -> str:
        return self._peer

    async def write(self, message: bytes) -> None:
        self._writer.write(put(message))
        await self._writer.drain()

    async def abort(self, code: Any, text: str, trailers: tuple[tuple[str, str], ...]) -> None:
        """Tell why the stream ends."""
        end = pb.StreamEnd(error=trailers[0][1], text=text)
        self._writer.write(put(end.SerializeToString(), end=True))
        await self._writer.drain()


class NearWorkers:
    """The socket of one shard.

    Args:
        exchange: the handler of a stream.
        most: connections that are open at a time; more are closed at once.
    """

    def __init__(self, exchange: Exchange, most: int) -> None:
        self._exchange, self._most = exchange, most
        self._open: set[asyncio.StreamWriter] = set()
        self._token = secrets.token_bytes(TOKEN_BYTES)
        self._name = f"torch-ps-{secrets.token_hex(16)}"
        self._server: asyncio.Server | None = None

    async def listen(self) -> None:
        """Begin; where this system has no such sockets, gRPC carries all."""
        if not host_id():
            return
        try:
            self._server = await asyncio.start_unix_server(self._serve, "\0" + self._name)
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
        for writer in tuple(self._open):
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        try:
            with contextlib.suppress(OSError, EOFError, TimeoutError, asyncio.CancelledError):
                if len(self._open) <= self._most and await self._let_in(reader, writer):
                    await self._exchange(_messages(reader), Context(writer, "unix:this host"))
        finally:
            self._open.discard(writer)
            writer.close()

    async def _let_in(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        connection: Any = writer.get_extra_info("socket")
        async with asyncio.timeout(TOKEN_SECONDS):
            shown = await reader.readexactly(TOKEN_BYTES)
        return same_user(connection) and secrets.compare_digest(shown, self._token)


async def _messages(reader: asyncio.StreamReader) -> AsyncGenerator[bytes]:
    """Every message, until the worker closes the socket."""
    while True:
        try:
            length, end = length_of(await reader.readexactly(LENGTH.size))
            if end:
                return
            message = await reader.readexactly(length)
        except (EOFError, ConnectionError):
            return
        yield message
