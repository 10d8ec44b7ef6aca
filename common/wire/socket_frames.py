"""Messages on a Unix socket: the Exchange stream of a worker and a server on one host, without gRPC.

    worker: token, 16 bytes, then messages -->
                                           <-- messages, and StreamEnd with the reason as the last one

    message   length as little-endian uint32, then as many bytes; the highest bit of the length marks the StreamEnd

A round trip through gRPC takes 0.4 ms of two cores, most of it in hand-overs between its threads. A socket is read by
the thread that waits for the message.

Rules of this file
  1. The socket has no file: its name is random, in Linux's abstract namespace, and ends with the server.
  2. Knowing the name, which other users can see, gives no access: both ends ask the kernel for the user of the peer,
     and the worker sends the socket's token, which the server gave it in an authenticated call.
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
    """A message with its length in front; ``end`` marks the StreamEnd."""
    return LENGTH.pack(len(message) | (_END if end else 0)) + message


def length_of(head: bytes) -> tuple[int, bool]:
    """Length in bytes of the message that follows ``head``, and whether it is the StreamEnd.

    Raises:
        CorruptFrame: the message is longer than any that either side sends.
    """
    (number,) = LENGTH.unpack(head)
    length = number & ~_END
    if length > MAX_MESSAGE_BYTES:
        raise CorruptFrame(f"a message of {length} bytes; at most {MAX_MESSAGE_BYTES} are allowed")
    return length, bool(number & _END)


def same_user(connection: socket.socket) -> bool:
    """Whether the process at the other end belongs to this user."""
    _pid, uid, _gid = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return bool(uid == os.geteuid())
