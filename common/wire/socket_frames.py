"""Messages on a Unix socket: what a stream is between a worker and a server on one host, without gRPC between.

    worker: token, 16 bytes, then messages -->
                                           <-- messages, and at its end why it ends: StreamEnd

    message   uint32 of its length, little-endian, then as many bytes; the highest bit says that it is the StreamEnd

A round trip through gRPC takes 0.4 ms of two cores, most of it in the hands that its threads pass a message through. A
socket is read by whoever waits for it.

Rules of this file
  1. The socket has no file: its name is in Linux's abstract namespace, random, and gone with the server.
  2. Nobody is let in by the name, which others can see: both ends ask the kernel whose process the other is, and the
     worker shows the token, which it has been told in a call that the server has let in.
  3. Messages are those of Exchange; see ``torch_ps.common.wire.frames``.

Source: unix(7), "Abstract sockets" and SO_PEERCRED.
"""

import os
import socket
import struct

from torch_ps.common.errors import CorruptFrame
from torch_ps.common.wire.frames import MAX_MESSAGE_BYTES

TOKEN_BYTES = 16
LENGTH = struct.Struct("<I")
_END = 1 << 31


def put(message: bytes, *, end: bool = False) -> bytes:
    """A message as it travels."""
    return LENGTH.pack(len(message) | (_END if end else 0)) + message


def length_of(head: bytes) -> tuple[int, bool]:
    """Bytes of the message that follows ``head``, and whether it is the end.

    Raises:
        CorruptFrame: they are more than either side sends.
    """
    (number,) = LENGTH.unpack(head)
    length = number & ~_END
    if length > MAX_MESSAGE_BYTES:
        raise CorruptFrame(f"a message of {length} bytes; {MAX_MESSAGE_BYTES} are the most")
    return length, bool(number & _END)


def same_user(connection: socket.socket) -> bool:
    """Whether the process at the other end is one of this user."""
    _pid, uid, _gid = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return bool(uid == os.geteuid())
