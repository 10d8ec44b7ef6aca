"""Watches the sockets of a port for strangers, and closes those that ``strangers.py`` says.

    /proc/self/fd --each PERIOD--> sockets of the port --TCP_INFO--> Stranger --excessive--> shutdown
    call accepted --peer--> the socket of that peer is no stranger's any more

gRPC offers no way to see or close a connection, but its sockets are file descriptors of this process, and the kernel
counts what has arrived on each, with TLS or without.

Rules of this file
  1. A socket is shut down through a duplicate of its descriptor that is checked again, since gRPC may have closed and
     reused the number in between; gRPC then frees the connection as if the peer had gone.
  2. Where the kernel does not tell (anything but Linux) nothing is watched, and the log says so.

Source: tcp(7), TCP_INFO; linux/tcp.h for the layout of tcp_info; proc(5).
"""

import asyncio
import contextlib
import logging
import os
import socket
import stat
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import grpc

from torch_ps.ps.observability.log_throttle import LogThrottle
from torch_ps.ps.observability.shard_metrics import Metrics
from torch_ps.ps.transport import banned_hosts
from torch_ps.ps.transport.strangers import BAN_SECONDS, MAX_REFUSED, Bans, Stranger, excessive

log = logging.getLogger("torch_ps.ps")

DESCRIPTORS = Path("/proc/self/fd")
#: Seconds between two looks: at most, and at least where calls are refused.
PERIOD, SHORTEST = 0.25, 0.02
#: Offset of tcpi_bytes_received in tcp_info, and the size up to its end.
_RECEIVED, _SIZE = 128, 136

Peer = tuple[str, int]


class StrangerWatch:
    """The connections of one port.

    Args:
        metrics: Metrics of the shard.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics, self._throttle = metrics, LogThrottle()
        self._strangers: dict[int, tuple[Peer, Stranger]] = {}  # by inode of the socket, in the order they came
        self._others: set[int] = set()  # inodes of sockets that are no strangers'
        self._listening: set[int] = set()  # inodes among them
        self._bans, self._banned = Bans(), frozenset[str]()
        self._accepted: set[Peer] = set()  # since the last look
        self._refused = Counter[Peer]()  # since the last look
        self._hurry = asyncio.Event()

    def accepted(self, peer: str) -> None:
        """Note that a call of ``peer``, as gRPC names it, was accepted."""
        if (known := _parse(peer)) is not None:
            self._accepted.add(known)

    def refused(self, peer: str) -> None:
        """Note that a call of ``peer`` was refused for want of a token."""
        if (known := _parse(peer)) is not None:
            self._refused[known] += 1
            if self._refused[known] > MAX_REFUSED:
                self._hurry.set()

    async def run(self, port: int) -> None:
        """Look at the connections of ``port`` again and again, until cancelled."""
        if not hasattr(socket, "TCP_INFO") or not DESCRIPTORS.is_dir():  # noqa: ASYNC240 - not a disk
            log.warning("this system does not tell what connections send; peers without the token are not bounded")
            return
        while True:
            await asyncio.sleep(SHORTEST)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._hurry.wait(), PERIOD - SHORTEST)
            self._hurry.clear()
            self._look(port, time.monotonic())

    def _look(self, port: int, now: float) -> None:
        accepted, self._accepted = self._accepted, set()
        refused, self._refused = self._refused, Counter()
        descriptors: dict[int, int] = {}  # inode -> descriptor
        for name in os.listdir(DESCRIPTORS):
            with contextlib.suppress(OSError):  # closed in between
                found = os.fstat(int(name))
                if stat.S_ISSOCK(found.st_mode):
                    descriptors[found.st_ino] = int(name)
        self._others &= descriptors.keys()
        for inode in self._strangers.keys() - descriptors.keys():
            del self._strangers[inode]
        for inode, descriptor in descriptors.items():
            if inode not in self._others:
                self._measure(inode, descriptor, port, now)
        for inode, (peer, stranger) in list(self._strangers.items()):
            stranger.refused += refused[peer]
            if peer in accepted:
                del self._strangers[inode]
                self._others.add(inode)
        inodes = {id(stranger): inode for inode, (_, stranger) in self._strangers.items()}
        for stranger, reason in excessive([stranger for _, stranger in self._strangers.values()], now):
            inode = inodes[id(stranger)]
            self._close(inode, descriptors[inode], reason, now)
        if (banned := self._bans.banned(now)) != self._banned:
            self._ban(banned, [descriptors[inode] for inode in self._listening & descriptors.keys()])

    def _measure(self, inode: int, descriptor: int, port: int, now: float) -> None:
        with contextlib.suppress(OSError), _borrowed(descriptor) as connection:
            if inode not in self._strangers:
                peer = _peer(connection, port)
                if peer is None:
                    self._others.add(inode)
                    if _listens(connection, port):
                        self._listening.add(inode)
                    return
                self._strangers[inode] = peer, Stranger(peer[0], now)
            info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _SIZE)
            if len(info) == _SIZE:
                self._strangers[inode][1].bytes = struct.unpack_from("=Q", info, _RECEIVED)[0]

    def _close(self, inode: int, descriptor: int, reason: str, now: float) -> None:
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as connection:
            if os.fstat(connection.fileno()).st_ino != inode:
                return
            # Otherwise the kernel would keep what gRPC has sent for a peer that does not read.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.shutdown(socket.SHUT_RDWR)
        peer, stranger = self._strangers.pop(inode)
        self._others.add(inode)
        if stranger.abusive:
            self._bans.note(stranger.host, now)
        self._metrics.strangers.inc()
        if (held_back := self._throttle.admit(now)) is not None:
            more = f" ({held_back} more were closed since the last line)" if held_back else ""
            log.warning("closed a connection of %s without an accepted call: %s%s", peer[0], reason, more)

    def _ban(self, banned: frozenset[str], listening: list[int]) -> None:
        """Let nobody connect from ``banned``."""
        try:
            for descriptor in listening:
                with _borrowed(descriptor) as connection:
                    banned_hosts.attach(connection, banned)
        except OSError as error:
            log.warning("hosts that flood this server cannot be kept from connecting: %s", error)
        for host in banned - self._banned:
            log.warning(
                "%s may not connect for %g s: its connections go on to send without an accepted call", host, BAN_SECONDS
            )
        self._banned = banned


class NoteAccepted(grpc.aio.ServerInterceptor):
    """Tells a ``StrangerWatch`` of every call that other interceptors have let through.

    Args:
        watch: Watch of the port.
    """

    def __init__(self, watch: StrangerWatch) -> None:
        self._watch = watch

    async def intercept_service(self, continuation: Callable[[Any], Any], details: grpc.HandlerCallDetails) -> Any:
        handler: Any = await continuation(details)
        if handler is None:  # there is no such method
            return None
        sides = handler.request_streaming, handler.response_streaming
        kind = "_".join("stream" if many else "unary" for many in sides)
        serve = getattr(handler, kind)

        async def noted(request: Any, context: Any) -> Any:
            self._watch.accepted(context.peer())
            return await serve(request, context)

        make = getattr(grpc, f"{kind}_rpc_method_handler")
        return make(noted, handler.request_deserializer, handler.response_serializer)


@contextlib.contextmanager
def _borrowed(descriptor: int) -> Iterator[socket.socket]:
    """A socket of a descriptor that somebody else closes."""
    connection = socket.socket(fileno=descriptor)
    try:
        yield connection
    finally:
        connection.detach()


def _peer(connection: socket.socket, port: int) -> Peer | None:
    """Other end of a connection that came to ``port``; None for any other socket."""
    if connection.family not in (socket.AF_INET, socket.AF_INET6) or connection.type != socket.SOCK_STREAM:
        return None
    if connection.getsockname()[1] != port:
        return None
    try:
        host, number = connection.getpeername()[:2]
    except OSError:  # it listens, or has been closed already
        return None
    return _plain(host), number


def _listens(connection: socket.socket, port: int) -> bool:
    if connection.family not in (socket.AF_INET, socket.AF_INET6) or connection.getsockname()[1] != port:
        return False
    return bool(connection.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def _parse(peer: str) -> Peer | None:
    """Address of gRPC's "ipv4:10.0.0.7:41234" or "ipv6:%5B::1%5D:41234"; None: gRPC does not know it any more."""
    host, _, number = unquote(peer).partition(":")[2].rpartition(":")
    return (_plain(host.strip("[]")), int(number)) if number.isdecimal() else None


def _plain(host: str) -> str:
    """The address without the zone of IPv6, and without the prefix that IPv4 has on a port of both."""
    return host.partition("%")[0].removeprefix("::ffff:")
