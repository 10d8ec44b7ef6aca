"""A stream to a server on this host over a Unix socket: what ``stream.py`` is over gRPC.

    send(frame) --> socket --> server
    on_message(frame) <-- reader thread <-- server

Rules of this file
  1. Whoever sends writes to the socket itself: no other thread has to run first.
  2. A server that cannot be reached so is no error: gRPC reaches it.

Source: see ``torch_ps.common.wire.socket_frames``.
"""

import contextlib
import socket
import threading
from collections.abc import Callable

from google.protobuf.message import DecodeError

from torch_ps.common import errors
from torch_ps.common.arena import host_id
from torch_ps.common.errors import CorruptFrame, NoSharedMemory, PsError, Unreachable
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.wire.address import Address
from torch_ps.common.wire.socket_frames import LENGTH, length_of, put, same_user

#: Seconds in which a server has to take the connection, and in which it has to make room for a frame.
CONNECT_SECONDS, SEND_SECONDS = 5.0, 60.0


def connect(offer: pb.SocketOffer) -> socket.socket:
    """The socket of a server on this host.

    Raises:
        NoSharedMemory: it cannot be reached; says why.
    """
    if not offer.name or offer.host != host_id():
        raise NoSharedMemory("it is on another host")
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(CONNECT_SECONDS)
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


class UnixStream:
    """One open Exchange on a connected socket; as ``Stream``."""

    def __init__(
        self,
        connection: socket.socket,
        address: Address,
        on_message: Callable[[bytes], None],
        on_end: Callable[[PsError], None],
    ) -> None:
        self._socket, self._address = connection, address
        self._on_message, self._on_end = on_message, on_end
        self._closed = False
        self._failure: PsError | None = None
        self._sending = threading.Lock()
        self._reader = threading.Thread(target=self._read, name=f"read {address}", daemon=True)
        self._reader.start()

    def send(self, frame: bytes) -> None:
        """Send; if the server is gone, the reader says so."""
        with self._sending, contextlib.suppress(OSError):
            self._socket.sendall(put(frame))

    def close(self) -> None:
        """End the stream; frames that were sent are delivered first."""
        self._closed = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
        self._reader.join(1.0)
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def fail(self, error: PsError) -> None:
        """End the stream as if the connection had broken, with ``error``."""
        self._failure = error
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def _read(self) -> None:
        try:
            end = self._until_end()
        except OSError as error:
            end = Unreachable(f"server {self._address} does not answer: {error}")
        except PsError as error:
            end = error
        except Exception as error:  # noqa: BLE001 - a bug here must end the wait, not leave it to its deadline
            end = PsError(f"a frame of server {self._address} could not be taken: {error!r}")
            end.__cause__ = error
        finally:
            self._socket.close()
        if not self._closed:
            self._on_end(self._failure or end)

    def _until_end(self) -> PsError:
        """Hand out messages; returns why there are no more."""
        received, at = bytearray(), 0
        while data := self._socket.recv(1 << 16):
            received += data
            while len(received) - at >= LENGTH.size:
                length, end = length_of(bytes(received[at : at + LENGTH.size]))
                begin = at + LENGTH.size
                if len(received) - begin < length:
                    break
                at = begin + length
                message = bytes(memoryview(received)[begin:at])
                if end:
                    return _error(message)
                self._on_message(message)
            del received[:at]
            at = 0
        return Unreachable(f"server {self._address} closed the stream")


def _error(message: bytes) -> PsError:
    try:
        end = pb.StreamEnd.FromString(message)
    except DecodeError:
        return CorruptFrame(f"{len(message)} bytes are not a StreamEnd")
    return errors.BY_NAME.get(end.error, PsError)(end.text)
