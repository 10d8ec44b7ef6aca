"""Connects to the sockets that a server offers for its streams: a Unix socket on this host, its data port from others.

A socket that cannot be reached is no error: the caller takes the next best carrier, and the reason is for people.

Source: see ``torch_ps.common.wire.port_proof`` and ``torch_ps.common.wire.socket_frames``.
"""

import contextlib
import socket
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import Any

from torch_ps.common.daemon_thread import in_daemon_thread
from torch_ps.common.errors import NoSharedMemory, PsError
from torch_ps.common.host_id import host_id
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.security.tls_socket import Contexts, TlsSocket
from torch_ps.common.wire import port_proof
from torch_ps.common.wire.address import Address
from torch_ps.common.wire.socket_frames import same_user, tune
from torch_ps.common.wire.striped_socket import Connection, StripedSocket

#: Seconds in which a server has to take a connection to its Unix socket.
UNIX_SECONDS = 5.0
#: Seconds in which a connection to a data port has to be made and proved.
DATA_SECONDS = 2.0


class NoDataPort(PsError):
    """The data port of a server cannot be used from here; says why."""


def connect_unix(offer: pb.SocketOffer) -> socket.socket:
    """Connect to the Unix socket that a server offers.

    Raises:
        NoSharedMemory: the socket cannot be reached, as from another host or by another user; says why.
    """
    if not offer.name or offer.host != host_id():
        raise NoSharedMemory("it is on another host")
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(UNIX_SECONDS)
        connection.connect("\0" + offer.name)
        if not same_user(connection):
            raise NoSharedMemory("its socket is another user's")
        connection.sendall(offer.token)
        connection.settimeout(None)
    except OSError as error:
        connection.close()
        raise NoSharedMemory(f"its socket cannot be reached: {error}") from None
    except NoSharedMemory:
        connection.close()
        raise
    return connection


def connect_data(
    server: Address, offer: pb.DataPortOffer, contexts: Contexts | None = None, connections: int = 1
) -> Connection | StripedSocket:
    """Connect to the data port of a server.

    Args:
        server: address at which the server was reached.
        offer: what the server has said of its data port.
        contexts: TLS settings; None where the server was reached in the clear.
        connections: number of connections that the stream goes over, 1 to ``port_proof.MAX_CONNECTIONS``.

    Raises:
        NoDataPort: it cannot be reached within ``DATA_SECONDS``, or something else answers there; says why.
    """
    if not offer.port:
        raise NoDataPort("the server has no data port")
    if offer.server_port != server.port:
        raise NoDataPort(f"the server listens at port {offer.server_port}, so something stands between")
    if offer.tls != (contexts is not None):
        raise NoDataPort("one of its two ports speaks TLS and the other does not")
    deadline, there = time.monotonic() + DATA_SECONDS, Address(server.host, offer.port)
    places = port_proof.places(connections)
    if connections == 1:
        return _open(there, offer.token, contexts, places[0], deadline)
    with contextlib.ExitStack() as stack:
        waiting = [
            in_daemon_thread(_open, there, offer.token, contexts, each, deadline, name=f"connect {there}")
            for each in places
        ]
        stack.callback(_close_all, waiting)
        opened = [each.result() for each in waiting]  # each has the deadline
        with _named(there):
            if _receive(opened[0], len(port_proof.READY), there, deadline) != port_proof.READY:
                raise NoDataPort(f"what listens at data port {there} is another server")
            opened[0].settimeout(None)
        stack.pop_all()
    return StripedSocket(opened)


def _open(
    there: Address, token: bytes, contexts: Contexts | None, place: port_proof.Place, deadline: float
) -> Connection:
    """Open one connection, prove it, and have its calls wait.

    Raises:
        NoDataPort: that has failed; says why.
    """
    with _named(there):
        plain = _connect(there, deadline)
        connection: Connection = plain
        try:
            tune(plain)
            if contexts is not None:
                connection = tls = TlsSocket(plain, contexts.current(), server_name=there.host)
                tls.settimeout(_left(deadline))
                tls.handshake()
            _prove(connection, there, token, place, deadline)
            connection.settimeout(None)
        except BaseException:
            connection.close()
            raise
    return connection


def _close_all(waiting: Sequence[Future[Connection]]) -> None:
    """Close each connection as soon as it is open."""
    for each in waiting:
        each.add_done_callback(_close)


def _close(opened: Future[Connection]) -> None:
    if opened.exception() is None:
        opened.result().close()


@contextlib.contextmanager
def _named(there: Address) -> Iterator[None]:
    """Name the data port in what goes wrong.

    Raises:
        NoDataPort: the connection has failed or is too slow; says which.
    """
    try:
        yield
    except TimeoutError:
        raise NoDataPort(f"data port {there} does not answer within {DATA_SECONDS:g} s") from None
    except OSError as error:
        raise NoDataPort(f"data port {there} cannot be reached: {error.strerror or error}") from None


def _connect(there: Address, deadline: float) -> socket.socket:
    """Connect to the first address of a host that takes the connection."""
    found = _look_up(there, deadline)
    for place, (family, kind, protocol, _, where) in enumerate(found):
        connection = socket.socket(family, kind, protocol)
        try:
            connection.settimeout(_left(deadline) / (len(found) - place))
            connection.connect(where)
            return connection
        except OSError:
            connection.close()
            if place + 1 == len(found):
                raise
    raise OSError(f"{there.host} has no address")


def _look_up(there: Address, deadline: float) -> list[Any]:
    """What ``getaddrinfo`` says. It waits for as long as the system's resolver does, which may be a minute."""
    with contextlib.suppress(socket.gaierror):
        return socket.getaddrinfo(there.host, there.port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    looked_up = in_daemon_thread(_addresses, there, name=f"look up {there.host}")
    try:
        return looked_up.result(_left(deadline))
    except TimeoutError:
        raise NoDataPort(f"the name {there.host} is not looked up within {DATA_SECONDS:g} s") from None


def _addresses(there: Address) -> list[Any]:
    return socket.getaddrinfo(there.host, there.port, type=socket.SOCK_STREAM)


def _prove(connection: Connection, there: Address, token: bytes, place: port_proof.Place, deadline: float) -> None:
    greeting = port_proof.greet(place)
    connection.settimeout(_left(deadline))
    connection.send(greeting)  # a few bytes, which a new connection takes whole
    answered = _receive(connection, port_proof.ANSWER_BYTES, there, deadline)
    proof = port_proof.prove(token, greeting, answered)
    if proof is None:
        raise NoDataPort(f"what listens at data port {there} is another server")
    connection.send(proof)


def _receive(connection: Connection, count: int, there: Address, deadline: float) -> bytes:
    received = b""
    while len(received) < count:
        connection.settimeout(_left(deadline))
        data = connection.recv(count - len(received))
        if not data:
            raise NoDataPort(f"what listens at data port {there} closes the connection, so it is another server")
        received += data
    return received


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
