"""A stream to a server on this host over a Unix socket.

    send(frame) --> socket --> server
    on_message(message) <-- reader thread <-- server

Rules of this file
  1. The thread that sends writes to the socket itself; no other thread has to run first.
  2. A server whose socket cannot be reached is no error: the stream goes over gRPC.

Source: the frames are those of ``torch_ps.common.wire.socket_frames``.
"""

import contextlib
import socket
import threading

from google.protobuf.message import DecodeError

from torch_ps.common import errors
from torch_ps.common.arena import host_id
from torch_ps.common.errors import CorruptFrame, NoSharedMemory, PsError, Unreachable
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.wire.address import Address
from torch_ps.common.wire.socket_frames import LENGTH, length_of, put, same_user
from torch_ps.worker.transport.stream import OnEnd, OnMessage

#: Seconds in which a server has to take the connection.
CONNECT_SECONDS = 5.0


def connect(offer: pb.SocketOffer) -> socket.socket:
    """Connect to the socket that a server offers.

    Raises:
        NoSharedMemory: the socket cannot be reached, as from another host or by another user; says why.
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
    """A ``Stream`` over a connected socket.

    Args:
        connection: socket that ``connect`` has returned; the stream closes it.
        address: address of the server for errors and for the name of the thread.
        on_message: function that takes each message.
        on_end: function that takes the error that ends the stream.
    """

    def __init__(self, connection: socket.socket, address: Address, on_message: OnMessage, on_end: OnEnd) -> None:
        self._socket, self._address = connection, address
        self._on_message, self._on_end = on_message, on_end
        self._closed = False
        self._failure: PsError | None = None
        self._sending = threading.Lock()
        self._reader = threading.Thread(target=self._read, name=f"read {address}", daemon=True)
        self._reader.start()

    def send(self, frame: bytes, *, overtake: bool = False) -> None:  # nothing waits here, so nothing is overtaken
        # An error of the socket is the reader's to report: it sees the connection end, too.
        with self._sending, contextlib.suppress(OSError):
            self._socket.sendall(put(frame))

    def close(self) -> None:
        self._closed = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
        self._reader.join(1.0)
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def fail(self, error: PsError) -> None:
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
        """Hand messages to ``on_message`` until the stream ends; returns why it did."""
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
