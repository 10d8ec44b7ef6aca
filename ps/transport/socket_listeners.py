"""Sockets of one shard that accept streams: a Unix socket for workers on this host, and the data port for all others.

    Describe --offer--> worker connects --> authenticated --> Exchange
                        unix: user and token    data port: both ends prove that they know the token

Rules of this file
  1. Waiting for an unauthenticated peer has a deadline and needs no memory that the peer chooses. One more than may
     wait ends the one that waits longest, of the host with the most; the number of open connections is bounded.
  2. Few connections are accepted in a row, so that a flood of them takes a bounded part of the event loop.

Source: see ``torch_ps.common.wire.port_proof`` and ``torch_ps.common.wire.socket_frames``.
"""

import asyncio
import contextlib
import functools
import logging
import secrets
import socket
from collections import Counter
from collections.abc import Awaitable, Callable

from torch_ps.common.errors import ConfigError
from torch_ps.common.host_id import host_id
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.security.tls import Tls
from torch_ps.common.security.tls_socket import Contexts
from torch_ps.common.wire import port_proof
from torch_ps.common.wire.address import Address
from torch_ps.common.wire.socket_frames import TOKEN_BYTES, tune
from torch_ps.ps.transport.bundles import Bundles
from torch_ps.ps.transport.carrier import Serve
from torch_ps.ps.transport.port_sockets import peer_of
from torch_ps.ps.transport.socket_carrier import SocketCarrier

log = logging.getLogger("torch_ps.ps")

#: Seconds in which a connection has to be authenticated.
TOKEN_SECONDS = 10.0
#: Connections that may be about to be authenticated.
MAX_WAITING = 64
#: Connections that are accepted in a row, and seconds until the next ones are if as many wait for authentication.
ACCEPTED, PAUSE = 8, 0.02
#: Seconds until the next ones are accepted where no descriptor is free.
NO_DESCRIPTOR_PAUSE = 1.0
#: Connections that the kernel keeps until they are accepted.
BACKLOG = 128

#: Takes the first bytes of a connection; returns its stream if they are authentic, else None.
Admit = Callable[[SocketCarrier], Awaitable[Callable[[], Awaitable[None]] | None]]


class Acceptor:
    """Accepts connections of one listening socket, authenticates them, and has each served by a task of its own.

    Args:
        admit: Authenticates a connection; returns what serves it then, None if it is not authentic.
        max_connections: Largest number of authenticated connections; further ones are closed at once.
        kind: Kind of the carriers, for people.
    """

    def __init__(self, admit: Admit, max_connections: int, kind: str) -> None:
        self._admit, self._max_connections, self._kind = admit, max_connections, kind
        self._waiting: dict[asyncio.Task[None], str] = {}  # hosts, in the order they came
        self._open: set[asyncio.Task[None]] = set()
        self._listening: socket.socket | None = None

    @property
    def listens(self) -> bool:
        """Whether it accepts connections."""
        return self._listening is not None

    def listen(self, listening: socket.socket) -> None:
        """Accept connections of ``listening``, which is closed in ``close``."""
        self._listening = listening
        listening.setblocking(False)
        listening.listen(BACKLOG)
        self._resume()

    def close(self) -> None:
        """Accept nobody any more; open connections go on."""
        if self._listening is not None:
            asyncio.get_running_loop().remove_reader(self._listening)
            self._listening.close()
            self._listening = None

    def _resume(self) -> None:
        if self._listening is not None:
            asyncio.get_running_loop().add_reader(self._listening, self._acceptable)

    def _acceptable(self) -> None:
        listening = self._listening
        for _ in range(ACCEPTED):
            if listening is None:
                return
            try:
                connection, _ = listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                log.warning("streams of workers cannot be accepted: %s; raise the limit of open files", error)
                self._rest(NO_DESCRIPTOR_PAUSE)
                return
            task = asyncio.create_task(self._run(connection))
            self._waiting[task] = _host_of(connection)
            self._make_place()
        if len(self._waiting) >= ACCEPTED:
            self._rest(PAUSE)

    def _rest(self, seconds: float) -> None:
        """Accept nobody for a while."""
        if self._listening is not None:
            loop = asyncio.get_running_loop()
            loop.remove_reader(self._listening)
            loop.call_later(seconds, self._resume)

    def _make_place(self) -> None:
        if len(self._waiting) <= MAX_WAITING:
            return
        most = Counter(self._waiting.values()).most_common(1)[0][0]
        oldest = next(task for task, host in self._waiting.items() if host == most)
        del self._waiting[oldest]
        oldest.cancel()

    async def _run(self, connection: socket.socket) -> None:
        task = asyncio.current_task()
        if task is None:
            return
        carrier = SocketCarrier(connection, _name_of(connection), self._kind)
        try:
            if connection.family != socket.AF_UNIX:
                tune(connection)
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(TOKEN_SECONDS):
                    serve = await self._admit(carrier)
                if serve is None or len(self._open) >= self._max_connections:
                    return
                self._waiting.pop(task, None)
                self._open.add(task)
                await serve()
        finally:
            self._waiting.pop(task, None)
            self._open.discard(task)
            carrier.dispose()


class UnixListener:
    """The Unix socket of one shard.

    Args:
        exchange: Handler of an Exchange; ends the carrier with the error, if there is one.
        max_connections: Largest number of authenticated connections.
    """

    def __init__(self, exchange: Serve, max_connections: int) -> None:
        self._acceptor = Acceptor(self._admit, max_connections, "Unix socket")
        self._exchange = exchange
        self._token = secrets.token_bytes(TOKEN_BYTES)
        self._name = f"torch-ps-{secrets.token_hex(16)}"
        self.close = self._acceptor.close

    def listen(self) -> None:
        """Start to accept. On a system without such sockets the network carries every stream."""
        if not host_id():
            return
        try:
            listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            listening.bind("\0" + self._name)
        except (OSError, AttributeError) as error:
            log.info("no Unix socket here; workers on this host use the network: %s", error)
            return
        self._acceptor.listen(listening)

    def offer(self, port: int) -> pb.SocketOffer | None:
        """What Describe offers to workers; None: there is no socket.

        Args:
            port: Port of the server.
        """
        if not self._acceptor.listens:
            return None
        return pb.SocketOffer(host=host_id(), name=self._name, token=self._token, port=port)

    async def _admit(self, carrier: SocketCarrier) -> Callable[[], Awaitable[None]] | None:
        if not carrier.of_same_user():
            return None
        if not secrets.compare_digest(await carrier.receive_bytes(TOKEN_BYTES), self._token):
            return None
        return functools.partial(self._exchange, carrier)


class DataPort:
    """The TCP port of one shard for streams of workers on other hosts. Bound when it is made, opened by ``listen``.

    Args:
        wanted: Host of the server's own port, and port of this one, 0 for any.
        tls: Certificates of the port; None serves in the clear.

    Attributes:
        port: Number of the port.

    Raises:
        ConfigError: The address cannot be bound.
    """

    def __init__(self, wanted: Address, tls: Tls | None = None) -> None:
        self._contexts = Contexts(tls, server=True) if tls is not None else None
        self._token = secrets.token_bytes(TOKEN_BYTES)
        self._acceptor: Acceptor | None = None
        self._bundles: Bundles | None = None
        self._listening = _bind(wanted)
        self.port: int = self._listening.getsockname()[1]

    def listen(self, exchange: Serve, max_streams: int) -> None:
        """Start to accept.

        Args:
            exchange: Handler of an Exchange; ends the carrier with the error, if there is one.
            max_streams: Largest number of streams, each of which has ``port_proof.MAX_CONNECTIONS`` at most.
        """
        self._bundles = Bundles(exchange)
        self._acceptor = Acceptor(self._admit, max_streams * port_proof.MAX_CONNECTIONS, "socket")
        self._acceptor.listen(self._listening)

    def close(self) -> None:
        """Accept nobody any more; open connections go on."""
        if self._acceptor is not None:
            self._acceptor.close()
        self._listening.close()

    def offer(self, port: int) -> pb.DataPortOffer:
        """What Describe offers to workers.

        Args:
            port: Port of the server.
        """
        return pb.DataPortOffer(port=self.port, token=self._token, server_port=port, tls=self._contexts is not None)

    async def _admit(self, carrier: SocketCarrier) -> Callable[[], Awaitable[None]] | None:
        if self._contexts is not None:
            await carrier.start_tls(self._contexts.current())
        name = await carrier.receive_bytes(len(port_proof.NAME))
        if name != port_proof.NAME:
            return None  # before more is awaited: a stranger may have sent all that it will
        greeting = name + await carrier.receive_bytes(port_proof.GREETING_BYTES - len(name))
        place = port_proof.place_of(greeting)
        if place is None or self._bundles is None:
            return None
        reply, expected = port_proof.answer(self._token, greeting)
        await carrier.send_bytes(reply)
        if not secrets.compare_digest(await carrier.receive_bytes(len(expected)), expected):
            return None
        return functools.partial(self._bundles.serve, carrier, place)


def _bind(wanted: Address) -> socket.socket:
    try:
        found = socket.getaddrinfo(wanted.host, wanted.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, where = found[0]
        listening = socket.socket(family, kind, protocol)
    except OSError as error:
        raise _cannot_bind(wanted, error) from None
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)  # as gRPC's port
        listening.bind(where)
    except OSError as error:
        listening.close()
        raise _cannot_bind(wanted, error) from None
    return listening


def _cannot_bind(wanted: Address, error: OSError) -> ConfigError:
    return ConfigError(
        f"cannot listen for data on {wanted}: {error.strerror or error}; choose another port with --data-port, 0 for "
        "any free one, or off"
    )


def _host_of(connection: socket.socket) -> str:
    try:
        return "this host" if connection.family == socket.AF_UNIX else peer_of(connection)[0]
    except OSError:
        return ""


def _name_of(connection: socket.socket) -> str:
    """The peer as gRPC would name it; what follows the last colon names no host."""
    if connection.family == socket.AF_UNIX:
        return "unix:this host"
    try:
        host, port = peer_of(connection)
    except OSError:
        return "tcp:unknown"
    return f"tcp:{host}:{port}"
