"""A TCP proxy that can be severed: what stands between a worker and its server in the tests of broken connections.

worker --> Proxy --> server
sever_after(n): passes n more bytes in either direction, then resets both ends
sever(): resets all connections now
vanish(): from now on nothing passes on the connections that there are, whose ends hear nothing; new ones are forwarded
hold(), release(): keeps back what the server sends, and lets it through again
slow(n): passes n bytes a second of each worker's connection, in their order; connections do not wait for each other
"""

import contextlib
import selectors
import socket
import threading
import time
from types import TracebackType
from typing import Self

from torch_ps.common.wire import address
from torch_ps.common.wire.address import Address


class Proxy:
    """Forwards every connection to ``target`` until it is severed; new connections are taken at any time."""

    def __init__(self, target: str) -> None:
        self._target = address.parse(target)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = str(Address("127.0.0.1", self._listener.getsockname()[1]))
        self._peer: dict[socket.socket, socket.socket] = {}
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._wake, woken = socket.socketpair()
        self._selector.register(woken, selectors.EVENT_READ)
        self._woken = woken
        self._far: set[socket.socket] = set()  # ends at the server
        self._resting: dict[socket.socket, float] = {}  # ends of a slow proxy, until when
        self._lost: list[socket.socket] = []
        self._rate = 0
        self._held, self._done = False, threading.Event()
        self._lock = threading.Lock()
        self._left: int | None = None
        self.num_severed = 0
        self.num_bytes = 0  # forwarded so far, in both directions
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def sever_after(self, num_bytes: int) -> None:
        with self._lock:
            self._left = num_bytes

    def sever(self) -> None:
        self._wake.send(b"!")

    def hold(self) -> None:
        """From its return on nothing of the server's comes through."""
        self._done.clear()
        self._wake.send(b"h")
        assert self._done.wait(10)

    def vanish(self) -> None:
        """From its return on the connections that there are lead nowhere, as where a host was unplugged."""
        self._done.clear()
        self._wake.send(b"v")
        assert self._done.wait(10)

    def slow(self, bytes_per_second: int) -> None:
        self._rate = bytes_per_second

    def release(self) -> None:
        with contextlib.suppress(OSError):  # closed
            self._wake.send(b"r")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End all connections and take no more."""
        self._wake.close()
        self._thread.join(10)
        for end in self._lost:
            end.close()

    def _run(self) -> None:
        while True:
            for key, _ in self._selector.select(self._rest()):
                end = key.fileobj
                if end is self._woken:
                    told = self._woken.recv(1)
                    if told == b"v":
                        self._abandon()
                        continue
                    if told in (b"h", b"r"):
                        self._hold(told == b"h")
                        continue
                    self._drop()
                    if told:
                        self.num_severed += 1
                        continue
                    for each in (self._listener, self._woken):
                        each.close()
                    self._selector.close()
                    return
                if end is self._listener:
                    self._accept()
                elif isinstance(end, socket.socket) and end in self._peer:
                    self._forward(end)

    def _rest(self) -> float | None:
        """Read again from ends that have rested; seconds until the next one has."""
        now = time.monotonic()
        for end in [end for end, until in self._resting.items() if until <= now]:
            del self._resting[end]
            if end in self._peer:
                self._selector.register(end, selectors.EVENT_READ)
        return max(min(self._resting.values()) - now, 0.0) if self._resting else None

    def _hold(self, held: bool) -> None:
        for end in self._far if held != self._held else ():
            if held:
                self._selector.unregister(end)
            else:
                self._selector.register(end, selectors.EVENT_READ)
        self._held = held
        self._done.set()

    def _abandon(self) -> None:
        for end in self._peer:
            with contextlib.suppress(KeyError):
                self._selector.unregister(end)
        self._lost += [*self._peer]  # not closed: nobody hears of it
        self._peer.clear()
        self._far.clear()
        self._done.set()

    def _accept(self) -> None:
        near, _ = self._listener.accept()
        try:
            far = socket.create_connection(self._target, 5)
        except OSError:
            near.close()
            return
        for end, peer in ((near, far), (far, near)):
            self._peer[end] = peer
            if end is near or not self._held:
                self._selector.register(end, selectors.EVENT_READ)
        self._far.add(far)

    def _forward(self, end: socket.socket) -> None:
        try:
            data = end.recv(max(self._rate // 10, 1) if self._rate else 1 << 16)
            with self._lock:
                severed = self._left is not None and len(data) >= self._left
                if severed:
                    data, self._left = data[: self._left], None
                elif self._left is not None:
                    self._left -= len(data)
            if data:
                self._peer[end].sendall(data)
                self.num_bytes += len(data)
                if self._rate and end not in self._far:
                    self._selector.unregister(end)
                    self._resting[end] = time.monotonic() + len(data) / self._rate
        except OSError:
            data, severed = b"", False
        if severed:
            self.num_severed += 1
            self._drop()
        elif not data:
            self._close(end)

    def _drop(self) -> None:
        for end in list(self._peer):
            self._close(end)

    def _close(self, end: socket.socket) -> None:
        peer = self._peer.pop(end, None)
        if peer is None:
            return
        self._peer.pop(peer, None)
        self._far -= {end, peer}
        for each in (end, peer):
            with contextlib.suppress(KeyError):
                self._selector.unregister(each)
            each.close()
