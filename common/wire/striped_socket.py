"""Several connections as one: blocks of the bytes that are sent go over them in turn.

    bytes  | block 0 | block 1 | block 2 | block 3 | ...
              |         |         |         |
    over   connection 0 1         0         1

A connection carries at most a window of bytes per round trip. Where round trips are long, several carry more.

Rules of this file
  1. Both ends count the bytes, so blocks need no header, and what is received is in the order in which it was sent.
  2. The next block is sent when the one before has left, and read when the one before has come. What runs ahead of that
     waits in the kernel, whose buffers bound it.
  3. A connection that ends ends all.

Source: Allcock et al., "The Globus Striped GridFTP Framework and Server", SC 2005; blocks in turn are RAID 0.
"""

import contextlib
import socket
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

#: Bytes of a block.
BLOCK = 1 << 18


class Connection(Protocol):
    """One connected socket, in the clear or with TLS: the methods of ``socket.socket`` that streams use."""

    def recv_into(self, buffer: memoryview, nbytes: int = 0, flags: int = 0) -> int: ...
    def recv(self, nbytes: int, /) -> bytes: ...
    def sendmsg(self, buffers: Sequence[memoryview], ancillary: Iterable[Any] = (), flags: int = 0, /) -> int: ...
    def send(self, data: bytes, /) -> int: ...
    def settimeout(self, seconds: float | None, /) -> None: ...
    def fileno(self) -> int: ...
    def shutdown(self, how: int, /) -> None: ...
    def close(self) -> None: ...


class StripedSocket:
    """The methods of a socket that streams use, over connections that it owns. Both ends have them in one order.

    Args:
        connections: connected sockets over which no byte of the stream has gone, all waiting or none.
    """

    def __init__(self, connections: Sequence[Connection]) -> None:
        self._connections = tuple(connections)
        self._reading, self._writing = _Turn(len(connections)), _Turn(len(connections))

    def recv_into(self, buffer: memoryview, nbytes: int = 0, flags: int = 0) -> int:
        """Read what has come, as far as there is room. Returns 0 at the end.

        Args:
            buffer: memory that the bytes are written to.
            nbytes: ignored, as all of the buffer is room.
            flags: ``MSG_WAITALL`` waits until it is full.

        Raises:
            BlockingIOError: nothing has come, and calls do not wait.
            OSError: a connection has failed.
        """
        count, turn = 0, self._reading
        while count < len(buffer):
            block = buffer[count : count + turn.left]
            try:
                came = self._connections[turn.place].recv_into(block, 0, flags)
            except BlockingIOError:
                if not count:
                    raise
                break
            count += came
            turn.pass_(came)
            if not flags & socket.MSG_WAITALL:
                if came < len(block):
                    break
                flags |= socket.MSG_DONTWAIT
            elif not came:
                break
        return count

    def sendmsg(self, buffers: Sequence[memoryview], ancillary: Iterable[object] = (), flags: int = 0) -> int:
        """Write of the buffers what one connection takes, at most the rest of its block; returns how many bytes.

        What is left has to come first in the next call.

        Args:
            buffers: what is to be sent, as to ``socket.sendmsg``.
            ancillary: ignored, as streams have no such data.
            flags: ``MSG_DONTWAIT`` does not wait.

        Raises:
            BlockingIOError: the network takes nothing now, and this call does not wait.
            OSError: the connection has failed.
        """
        turn = self._writing
        sent = self._connections[turn.place].sendmsg(list(_first(buffers, turn.left)), (), flags)
        turn.pass_(sent)
        return sent

    def fileno(self) -> int:
        """Descriptor of the connection that is read next; changes as bytes are read."""
        return self._connections[self._reading.place].fileno()

    def writing_fileno(self) -> int:
        """Descriptor of the connection that is written next; changes as bytes are sent."""
        return self._connections[self._writing.place].fileno()

    def shutdown(self, how: int) -> None:
        """Shut all connections down, those too that come after one that has failed."""
        for each in self._connections:
            with contextlib.suppress(OSError):
                each.shutdown(how)

    def close(self) -> None:
        for each in self._connections:
            each.close()


class _Turn:
    """Which of ``count`` connections the next byte goes over, and how many go over it before the next one's turn."""

    def __init__(self, count: int) -> None:
        self._count, self.place, self.left = count, 0, BLOCK

    def pass_(self, num_bytes: int) -> None:
        self.left -= num_bytes
        if not self.left:
            self.place, self.left = (self.place + 1) % self._count, BLOCK


def _first(buffers: Iterable[memoryview], size: int) -> Iterator[memoryview]:
    """The first ``size`` bytes of the buffers."""
    for each in buffers:
        if size <= 0:
            return
        yield each[:size]
        size -= len(each)
