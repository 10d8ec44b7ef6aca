"""Sockets of this process that another library has opened: found, asked and shut down by their file descriptors.

    /proc/self/fd --> inode and descriptor of each socket --> peer, bytes received --> shutdown

Rules of this file
  1. A descriptor may be closed and used again at any time. What is asked of one that was may be wrong once; nothing is
     changed through one that was: the inode is compared again on a duplicate.

Source: proc(5); tcp(7), TCP_INFO; linux/tcp.h for the layout of tcp_info.
"""

import contextlib
import os
import socket
import stat
import struct
from collections.abc import Iterator
from urllib.parse import unquote

#: Host without port, and port.
Peer = tuple[str, int]

_DESCRIPTORS = "/proc/self/fd"
#: Offset of tcpi_bytes_received in tcp_info, and the size up to its end.
_RECEIVED, _SIZE = 128, 136


def available() -> bool:
    """Whether this system tells of its sockets what this file asks."""
    return hasattr(socket, "TCP_INFO") and os.path.isdir(_DESCRIPTORS)


def num_open() -> int:
    """Number of open descriptors of this process; 0 on Linux before 6.2, which does not tell."""
    return os.stat(_DESCRIPTORS).st_size


def find_all() -> dict[int, int]:
    """Descriptors of all sockets of this process, by inode."""
    found: dict[int, int] = {}
    for name in os.listdir(_DESCRIPTORS):
        with contextlib.suppress(OSError):  # it was closed in between
            status = os.fstat(int(name))
            if stat.S_ISSOCK(status.st_mode):
                found[status.st_ino] = int(name)
    return found


@contextlib.contextmanager
def borrowed(descriptor: int) -> Iterator[socket.socket]:
    """A socket of a descriptor that somebody else closes."""
    connection = socket.socket(fileno=descriptor)
    try:
        yield connection
    finally:
        connection.detach()


def is_of(connection: socket.socket, port: int) -> bool:
    """Whether this is a TCP socket of that port of this machine."""
    tcp = connection.family in (socket.AF_INET, socket.AF_INET6) and connection.type == socket.SOCK_STREAM
    return tcp and connection.getsockname()[1] == port


def listens(connection: socket.socket) -> bool:
    """Whether a TCP socket accepts connections."""
    return bool(connection.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def peer_of(connection: socket.socket) -> Peer:
    """Other end of a TCP connection.

    Raises:
        OSError: There is none any more.
    """
    host, port = connection.getpeername()[:2]
    return _plain(host), port


def parse_peer(text: str) -> Peer | None:
    """Read gRPC's "ipv4:10.0.0.7:41234" or "ipv6:%5B::1%5D:41234"; None: gRPC does not know the peer any more."""
    host, _, number = unquote(text).partition(":")[2].rpartition(":")
    return (_plain(host.strip("[]")), int(number)) if number.isdecimal() else None


def bytes_received(connection: socket.socket) -> int:
    """Number of bytes that have arrived on a TCP connection; 0 on Linux before 4.1, which does not tell."""
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _SIZE)
    return int(struct.unpack_from("=Q", info, _RECEIVED)[0]) if len(info) == _SIZE else 0


def shut(descriptor: int, inode: int) -> None:
    """End a connection for both sides, if ``descriptor`` still is the socket ``inode``; its owner then closes it.

    Raises:
        OSError: It has ended already.
    """
    with socket.socket(fileno=os.dup(descriptor)) as connection:
        if os.fstat(connection.fileno()).st_ino == inode:
            # Otherwise the kernel keeps what was sent to a peer that does not read.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.shutdown(socket.SHUT_RDWR)


def _plain(host: str) -> str:
    """The address without the zone of IPv6, and without the prefix that IPv4 has on a port of both."""
    return host.partition("%")[0].removeprefix("::ffff:")
