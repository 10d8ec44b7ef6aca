"""Watches the connections of a gRPC port for strangers, and closes those that ``strangers.py`` says.

    sockets of the port --each PERIOD--> bytes received --> excessive --> shut down; host banned
    call accepted --peer--> its connection is no stranger's any more

gRPC offers no way to see or close a connection, but its sockets are file descriptors of this process, and the kernel
counts what arrives on each, with TLS or without.

Rules of this file
  1. It decides nothing. gRPC frees a connection that is shut down as if the peer had gone.
  2. A look at a port without strangers and without new connections costs one system call.
  3. It never ends the server: where the system has no descriptor left to look with, it looks again later.
  4. It looks on a thread of its own, as the event loop may be busy with what strangers have sent; the loop only adds to
     two queues.
"""

import asyncio
import contextlib
import errno
import logging
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc

from torch_ps.common.allocator import give_back_freed_memory
from torch_ps.ps.observability.bug_reports import report_bug
from torch_ps.ps.observability.log_throttle import LogThrottle
from torch_ps.ps.observability.shard_metrics import Metrics
from torch_ps.ps.transport import banned_hosts, port_sockets
from torch_ps.ps.transport.port_sockets import Peer
from torch_ps.ps.transport.strangers import EVERYBODY, Bans, Stranger, excessive

log = logging.getLogger("torch_ps.ps")

#: Seconds between two looks. A peer on a fast link sends megabytes in that time.
PERIOD = 0.02
#: Seconds after which all sockets are looked at, even if their number is what it was.
LONGEST = 0.25
#: Seconds after a connection was closed for what it had sent until what gRPC has freed of it goes back to the system.
TRIM_SECONDS = 0.25


@dataclass(frozen=True, slots=True)
class _Connection:
    descriptor: int
    peer: Peer
    stranger: Stranger


class StrangerWatch:
    """The connections of one port.

    Args:
        metrics: Metrics of the shard.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics, self._throttle, self._blind = metrics, LogThrottle(), LogThrottle()
        self._available = port_sockets.available()  # else nobody would empty what is noted
        self._strangers: dict[int, _Connection] = {}  # by inode, in the order they came
        self._others: set[int] = set()  # inodes of sockets that are no strangers'
        self._friends: dict[Peer, int] = {}  # inodes of those of them that have had a call accepted
        self._listening: dict[int, int] = {}  # inode and descriptor of sockets among them
        self._num_open, self._next_search = -1, float("-inf")
        self._bans, self._banned = Bans(), frozenset[str]()
        self._trim_at = math.inf
        self._accepted, self._refused = deque[Peer](), deque[Peer]()  # since the last look, by the event loop's thread
        self._arrived: set[Peer] = set()  # peers of accepted calls whose connections are not known yet
        self._over = threading.Event()

    def accepted(self, peer: str) -> None:
        """Note that a call of ``peer``, as gRPC names it, was accepted."""
        if self._available and (known := port_sockets.parse_peer(peer)) is not None:
            self._accepted.append(known)

    def refused(self, peer: str) -> None:
        """Note that a call of ``peer`` was refused for want of a token."""
        if self._available and (known := port_sockets.parse_peer(peer)) is not None:
            self._refused.append(known)

    async def run(self, port: int) -> None:
        """Look at the connections of ``port`` again and again, until cancelled."""
        if not self._available:
            log.warning("this system does not tell what connections send: a peer without the token can fill the memory")
            return
        try:
            await asyncio.to_thread(self._watch, port)
        finally:
            self._over.set()

    def _watch(self, port: int) -> None:
        while not self._over.is_set():
            time.sleep(PERIOD)  # cheaper than to wait for the event
            try:
                self._look(port, time.monotonic())
            except Exception as error:  # noqa: BLE001 - the job goes on without the watch
                report_bug("the watch of connections", error)

    def _look(self, port: int, now: float) -> None:
        num_open = port_sockets.num_open()
        self._arrived |= set(_drained(self._accepted)) - self._friends.keys()
        if num_open != self._num_open or self._arrived or now >= self._next_search:
            try:
                self._search(port, now)
            except OSError as error:  # no descriptor is free to list them with
                if self._blind.admit(now) is not None:
                    log.warning("new connections are not watched: %s; raise the limit of open files", error)
            self._num_open, self._next_search = num_open, now + LONGEST
        if now >= self._trim_at:
            self._trim_at = math.inf
            give_back_freed_memory()  # each flood may have filled another heap of the allocator
        if not (self._strangers or self._refused or self._banned):
            return
        refused = Counter(_drained(self._refused))
        for inode, connection in list(self._strangers.items()):
            stranger = connection.stranger
            stranger.refused += refused[connection.peer]
            try:
                with port_sockets.borrowed(connection.descriptor) as borrowed:
                    stranger.bytes = max(stranger.bytes, port_sockets.bytes_received(borrowed))
            except OSError:  # it has been closed
                del self._strangers[inode]
        self._close(now)
        if (banned := self._bans.banned(now)) != self._banned:
            self._ban(banned)

    def _search(self, port: int, now: float) -> None:
        """Bring the sets of connections up to date."""
        found = port_sockets.find_all()
        accepted, self._arrived = self._arrived, set()
        self._others &= found.keys()
        self._strangers = {inode: each for inode, each in self._strangers.items() if inode in found}
        self._listening = {inode: found[inode] for inode in self._listening if inode in found}
        self._friends = {peer: inode for peer, inode in self._friends.items() if inode in found}
        for inode, descriptor in found.items():
            if inode not in self._others and inode not in self._strangers:
                self._classify(inode, descriptor, port, now)
        for inode, connection in list(self._strangers.items()):
            if connection.peer in accepted:
                del self._strangers[inode]
                self._others.add(inode)
                self._friends[connection.peer] = inode

    def _classify(self, inode: int, descriptor: int, port: int, now: float) -> None:
        with contextlib.suppress(OSError), port_sockets.borrowed(descriptor) as connection:
            if not port_sockets.is_of(connection, port):
                self._others.add(inode)
            elif port_sockets.listens(connection):
                self._others.add(inode)
                self._listening[inode] = descriptor
            else:
                peer = port_sockets.peer_of(connection)
                self._strangers[inode] = _Connection(descriptor, peer, Stranger(peer[0], now))

    def _close(self, now: float) -> None:
        inodes = {id(connection.stranger): inode for inode, connection in self._strangers.items()}
        for stranger, reason in excessive([each.stranger for each in self._strangers.values()], now):
            inode = inodes[id(stranger)]
            try:
                port_sockets.shut(self._strangers[inode].descriptor, inode)
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE):
                    continue  # the next look tries again
            del self._strangers[inode]
            self._others.add(inode)
            if stranger.abusive:
                self._bans.note(banned_hosts.host_of(stranger.host), now, stranger.bytes)
                self._trim_at = min(self._trim_at, now + TRIM_SECONDS)
            self._metrics.strangers.inc()
            if (held_back := self._throttle.admit(now)) is not None:
                more = f" ({held_back} more were closed since the last line)" if held_back else ""
                log.warning("closed a connection of %s without an accepted call: %s%s", stranger.host, reason, more)

    def _ban(self, banned: frozenset[str]) -> None:
        """Let nobody connect from ``banned``, and everybody else."""
        try:
            for descriptor in self._listening.values():
                with port_sockets.borrowed(descriptor) as listening:
                    if EVERYBODY in banned:
                        banned_hosts.refuse_all(listening)
                    else:
                        banned_hosts.attach(listening, banned)
        except OSError as error:
            log.warning("hosts that flood this server cannot be kept from connecting: %s", error)
        for host in banned - self._banned:
            log.warning("%s may not connect for a while: much was sent, and no call to accept", host)
        self._banned = banned


def _drained(peers: deque[Peer]) -> Iterator[Peer]:
    """Take out everything that is there; another thread may go on to add."""
    while peers:
        yield peers.popleft()


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
