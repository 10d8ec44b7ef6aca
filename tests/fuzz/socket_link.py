"""One open Exchange over a socket, as ``server.Link`` is one over gRPC: the carrier reads and writes a real socket."""

import asyncio
import contextlib
import socket

from tests.fuzz.server import Server
from torch_ps.common.errors import PsError
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.wire.frames import Frame, Split, pack, unpack_all
from torch_ps.common.wire.socket_frames import Receiver, put
from torch_ps.ps.transport.socket_carrier import SocketCarrier


class SocketLink:
    """One end of a pair of sockets, of which the server has the other one. Make it within the event loop."""

    def __init__(self, server: Server) -> None:
        self._socket, theirs = socket.socketpair()
        self._socket.setblocking(False)
        self._carrier, self._receiver = SocketCarrier(theirs, "memory:0", "Unix socket"), Receiver()
        self.error: PsError | None = None
        self.task = asyncio.ensure_future(server.watch(self._serve(server)))

    async def _serve(self, server: Server) -> None:
        try:
            await server.servicer.exchange(self._carrier)
        except PsError as error:
            self.error = error
        finally:
            await self._carrier.close()
            self._carrier.dispose()
            self._socket.close()

    @property
    def open(self) -> bool:
        return not self.task.done()

    def send(self, message: bytes | None) -> None:
        """Send one message, its payload apart as a worker does; None ends the stream."""
        if message is None:
            self._socket.close()
        else:
            self.send_bytes(b"".join(put(_split(message))))

    def send_bytes(self, data: bytes) -> None:
        """Send bytes that may be no message."""
        with contextlib.suppress(OSError):  # the server has ended the stream
            self._socket.sendall(data)

    def take(self) -> list[pb.DownHeader]:
        """Headers that have come since the last call."""
        found: list[pb.DownHeader] = []
        with contextlib.suppress(OSError):
            while count := self._socket.recv_into(self._receiver.room()):
                self._receiver.add(count)
                while (message := self._receiver.next()) is not None:
                    found += [header for header, _ in unpack_all(message[0], pb.DownHeader)]
        return found


def _split(message: bytes) -> Frame:
    """The message as a worker sends it over a socket, if it is one frame with a payload."""
    frames = list(unpack_all(message, pb.UpHeader))
    header, payload = frames[-1]
    if len(frames) > 1 or not len(payload):
        return message
    return Split(pack(header), (payload,), None)
