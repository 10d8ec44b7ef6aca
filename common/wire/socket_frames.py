"""Messages on a socket: the Exchange stream of a worker and a server without gRPC.

    message   prefix: length of the head, length of the payload, both little-endian uint32; then head, then payload
              the highest bit of the first length marks the StreamEnd, the last message, with the reason in its head

    bytes of the socket --room()--> Receiver --next()--> messages, whole

A round trip through gRPC takes 0.4 ms of two cores, most of it in hand-overs between its threads, and megabytes cost
four times as much CPU as a socket. A socket is read by the thread that waits for the message.

Rules of this file
  1. No I/O: who has a socket reads into ``room`` and says how much came.
  2. A payload is received into memory in which it stays; only what comes with its head is copied.
  3. Lengths are checked before anything is allocated for them.
  4. Messages are those of Exchange, see ``torch_ps.common.wire.frames``: the head is a frame's header, or several
     frames without payload.
"""

import os
import socket
import struct
from collections.abc import Callable

import numpy as np

from torch_ps.common.errors import CorruptFrame
from torch_ps.common.wire.frames import MAX_MESSAGE_BYTES, Frame, Split

TOKEN_BYTES = 16
PREFIX = struct.Struct("<II")
_END = 1 << 31
#: Bytes that are read at once while no payload is awaited.
READ_AHEAD = 1 << 16
#: Seconds of silence after which TCP asks whether the peer is there, between two such questions, and after which
#: a peer that acknowledges nothing counts as gone. The heartbeats notice it sooner.
_IDLE, _INTERVAL, _GONE = 5, 5, 60
#: Takes the head of a message and the bytes of its payload; returns memory of that size, which only this message has
#: until it was taken, or None.
FindPlace = Callable[[bytes, int], memoryview | None]
#: Least room for a read.
_LEAST_ROOM = 1 << 12


def put(message: Frame, *, end: bool = False) -> list[bytes | memoryview]:
    """A message as the buffers that are sent for it; ``end`` marks the StreamEnd."""
    if isinstance(message, Split):
        size = sum(map(len, message.payload))
        return [PREFIX.pack(len(message.head), size) + message.head, *message.payload]
    return [PREFIX.pack(len(message) | (_END if end else 0), 0) + message]


def lengths_of(prefix: bytes | memoryview) -> tuple[int, int, bool]:
    """Bytes of the head and of the payload that follow ``prefix``, and whether they are the StreamEnd.

    Raises:
        CorruptFrame: the message is longer than any that either side sends.
    """
    number, payload = PREFIX.unpack(prefix)
    head = number & ~_END
    if head + payload > MAX_MESSAGE_BYTES:
        raise CorruptFrame(f"a message of {head + payload} bytes; at most {MAX_MESSAGE_BYTES} are allowed")
    return head, payload, bool(number & _END)


class Receiver:
    """Cuts messages out of the bytes of one socket.

    Args:
        place: finds where a payload is to be received; where it finds nothing the payload gets memory of its own.
    """

    def __init__(self, place: FindPlace = lambda head, size: None) -> None:
        self._place = place
        self._buffer = memoryview(bytearray(READ_AHEAD))
        self._begin = self._end = 0  # of the bytes that are not taken yet
        self._head, self._filled = b"", 0
        self._payload: memoryview | None = None  # of the message that is being received

    def room(self) -> memoryview:
        """Where the next bytes of the socket go; never empty."""
        return self._buffer[self._end :] if self._payload is None else self._payload[self._filled :]

    @property
    def empty(self) -> bool:
        """Whether nothing has come that was not taken."""
        return self._begin == self._end and self._payload is None

    @property
    def fills(self) -> bool:
        """Whether nothing can be taken before ``room`` is full."""
        return self._payload is not None

    def add(self, count: int) -> None:
        """Note that ``count`` bytes have come into ``room``."""
        if self._payload is None:
            self._end += count
        else:
            self._filled += count

    def take(self, count: int) -> bytes | None:
        """The next ``count`` bytes, at most 4096, which are no message; None if they have not all come."""
        if self._end - self._begin < count:
            self._make_room(count)
            return None
        self._begin += count
        return bytes(self._buffer[self._begin - count : self._begin])

    def next(self) -> tuple[Frame, bool] | None:
        """The next message, and whether it is the StreamEnd; None if it has not come whole.

        Raises:
            CorruptFrame: it is too long.
        """
        if self._payload is not None:
            if self._filled < len(self._payload):
                return None
            message, self._payload = Split(self._head, (self._payload,)), None
            return message, False
        available = self._end - self._begin
        if available < PREFIX.size:
            self._make_room(PREFIX.size)
            return None
        begin = self._begin + PREFIX.size
        head, size, end = lengths_of(self._buffer[self._begin : begin])
        if available - PREFIX.size < head:
            self._make_room(PREFIX.size + head)
            return None
        self._head = bytes(self._buffer[begin : begin + head])
        self._begin = begin + head
        if not size:
            return self._head, end
        place = self._place(self._head, size)
        self._payload = np.empty(size, np.uint8).data if place is None else place
        self._filled = min(size, self._end - self._begin)
        self._payload[: self._filled] = self._buffer[self._begin : self._begin + self._filled]
        self._begin += self._filled
        if self._begin == self._end:
            self._begin = self._end = 0
        return self.next()

    def _make_room(self, needed: int) -> None:
        """Have room for the rest of ``needed`` bytes from the first that is not taken."""
        waiting = self._buffer[self._begin : self._end]
        if needed > len(self._buffer):
            self._buffer = memoryview(bytearray(needed + _LEAST_ROOM))
        elif waiting and len(self._buffer) - self._begin >= max(needed, len(waiting) + _LEAST_ROOM):
            return
        self._buffer[: len(waiting)] = bytes(waiting)
        self._begin, self._end = 0, len(waiting)


def same_user(connection: socket.socket) -> bool:
    """Whether the process at the other end of a Unix socket belongs to this user."""
    _pid, uid, _gid = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return bool(uid == os.geteuid())


def tune(connection: socket.socket) -> None:
    """Set the options of a TCP connection: small messages leave at once, and a peer that vanished is noticed."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_KEEPIDLE"):  # Linux
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _IDLE)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _INTERVAL)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _GONE // _INTERVAL)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * _GONE)
