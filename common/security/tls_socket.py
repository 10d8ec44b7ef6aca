"""TLS on one connected socket, with the files of a ``Tls``: the methods of a socket that streams use.

    Contexts --current()--> ssl context of the files as they are now --> TlsSocket --recv_into, sendmsg--> records

Rules of this file
  1. TLS 1.3 only. A server that has authorities asks each client for a certificate; a client verifies the name of the
     server.
  2. One thread may read while another one writes: OpenSSL's object is used by one at a time, and nobody waits for the
     network while holding it.
  3. Files that are being replaced and do not fit together leave the context that was there.

Source: https://docs.python.org/3/library/ssl.html#notes-on-non-blocking-sockets
"""

import contextlib
import select
import socket
import ssl
import threading
from collections.abc import Iterable, Sequence

from torch_ps.common.security.tls import Pem, Tls, load


class Contexts:
    """The ssl context of one process for one side, made anew when the files change.

    Args:
        tls: files of this process.
        server: whether it is for the side that accepts.
    """

    def __init__(self, tls: Tls, *, server: bool) -> None:
        self._tls, self._server = tls, server
        self._pem: Pem | None = None
        self._context: ssl.SSLContext | None = None

    def current(self) -> ssl.SSLContext:
        """The context of the files as they are now.

        Raises:
            OSError: they cannot be used, and no earlier ones were.
        """
        pem = self._tls.pem
        if self._context is None or pem != self._pem:
            try:
                self._context, self._pem = self._make(pem), pem
            except (OSError, ValueError):
                if self._context is None:
                    raise
        return self._context

    def _make(self, pem: Pem) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if self._server else ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        if pem.ca is not None:
            context.load_verify_locations(cadata=pem.ca.decode("ascii", "ignore"))
        elif not self._server:
            context.load_default_certs()
        if pem.cert is not None:
            load(context, self._tls.cert, self._tls.key)
        if self._server:
            context.num_tickets = 0  # no session is resumed
            context.verify_mode = ssl.CERT_REQUIRED if pem.ca is not None else ssl.CERT_NONE
        return context


class TlsSocket:
    """TLS over a connected socket, which it owns. Before anything else ``handshake`` has to be complete.

    Args:
        connection: connected socket.
        context: context of this side.
        server_name: name that the server's certificate has to have, on the client's side; None on the server's.
    """

    def __init__(self, connection: socket.socket, context: ssl.SSLContext, *, server_name: str | None) -> None:
        connection.setblocking(False)
        self._lock = threading.Lock()
        self._seconds: float | None = 0.0
        self._tls = context.wrap_socket(
            connection, server_side=server_name is None, server_hostname=server_name, do_handshake_on_connect=False
        )

    def handshake(self) -> None:
        """Go on with the handshake until it is complete.

        Raises:
            BlockingIOError: bytes have to come first, and calls do not wait.
            OSError: it has failed.
        """
        while True:
            with contextlib.suppress(ssl.SSLWantReadError, ssl.SSLWantWriteError):
                return self._tls.do_handshake()
            self._wait(select.POLLIN)

    def recv_into(self, buffer: memoryview, nbytes: int = 0, flags: int = 0) -> int:
        """Read what has come, as far as there is room. Returns 0 at the end.

        Args:
            buffer: memory that the bytes are written to.
            nbytes: ignored, as all of the buffer is room.
            flags: ``MSG_WAITALL`` waits until it is full, ``MSG_DONTWAIT`` does not wait.

        Raises:
            BlockingIOError: nothing has come, and calls do not wait or this one does not.
            OSError: the connection has failed.
        """
        count = 0
        while count < len(buffer):
            try:
                with self._lock:
                    record = self._tls.recv_into(buffer[count:])
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                if count and not flags & socket.MSG_WAITALL:
                    break
                if flags & socket.MSG_DONTWAIT:
                    raise BlockingIOError from None
                self._wait(select.POLLIN)
                continue
            if not record:
                break
            count += record
        return count

    def recv(self, nbytes: int) -> bytes:
        """Read at most ``nbytes`` of one record, as ``recv_into``."""
        buffer = bytearray(nbytes)
        return bytes(buffer[: self.recv_into(memoryview(buffer))])

    def sendmsg(self, buffers: Sequence[memoryview], ancillary: Iterable[object] = (), flags: int = 0) -> int:
        """Write a part of the first buffer that is not empty; returns how much. It has to be the first again then.

        Args:
            buffers: what is to be sent, as to ``socket.sendmsg``.
            ancillary: ignored, as TLS has no such data.
            flags: ``MSG_DONTWAIT`` does not wait.

        Raises:
            BlockingIOError: the network takes nothing now, and this call does not wait.
            OSError: the connection has failed.
        """
        first = next(filter(len, buffers), memoryview(b""))
        while True:
            with self._lock, contextlib.suppress(ssl.SSLWantReadError, ssl.SSLWantWriteError):
                return self._tls.send(first)
            if flags & socket.MSG_DONTWAIT:
                raise BlockingIOError
            self._wait(select.POLLOUT)

    def send(self, data: bytes) -> int:
        """As ``sendmsg`` of one buffer."""
        return self.sendmsg([memoryview(data)])

    def fileno(self) -> int:
        return self._tls.fileno()

    def shutdown(self, how: int) -> None:
        """Shut the connection down; what has come before is still decrypted."""
        socket.socket.shutdown(self._tls, how)  # that of SSLSocket would go on in the clear

    def settimeout(self, seconds: float | None) -> None:
        """Have calls wait for so long and then raise TimeoutError; 0, as at first: they raise BlockingIOError at once.

        Args:
            seconds: longest wait; None for as long as it takes.
        """
        self._seconds = seconds

    def close(self) -> None:
        self._tls.close()

    def _wait(self, events: int) -> None:
        if self._seconds == 0:
            raise BlockingIOError
        poll = select.poll()
        poll.register(self._tls.fileno(), events)
        if not poll.poll(None if self._seconds is None else 1000 * self._seconds):
            raise TimeoutError
