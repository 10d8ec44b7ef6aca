"""Carrier of an Exchange over a socket: a Unix socket of a worker on this host, or a TCP connection to the data port.

    listener: accepted, authenticated --> Exchange: Hello read --> carry: socket --Receiver--> on_message
                                                                   socket <-- put() <-- outbox

Rules of this file
  1. A message is handled where it is read, and frames leave at the end of the loop's iteration: neither wakes a task.
  2. Payloads are received into memory of their own and sent from where they are; the system's calls that copy them
     release the interpreter's lock.
  3. The next frame is taken out of the outbox when those before have left, so that the outbox bounds what waits.
  4. Whatever a peer does ends its own carrier and nothing else.

Source: see ``torch_ps.common.wire.socket_frames``.
"""

import asyncio
import contextlib
import socket
import ssl
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from torch_ps.common.errors import PsError
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.security.tls_socket import TlsSocket
from torch_ps.common.wire.frames import Frame, Split, messages
from torch_ps.common.wire.socket_frames import Receiver, put, same_user
from torch_ps.common.wire.striped_socket import Connection, StripedSocket
from torch_ps.ps.transport.carrier import MessageHandler
from torch_ps.ps.transport.streams import Stream

#: Reads of one connection in a row, before others have their turn.
READS = 8
#: Buffers that one system call sends, and bytes that are taken out of the outbox at a time.
BUFFERS, TAKEN_BYTES = 64, 1 << 18
#: Seconds in which a peer has to read why its stream ends, and to close its end.
END_SECONDS = 2.0


class SocketCarrier:
    """A ``Carrier`` over one socket, which it closes in ``dispose``. All methods run on the event loop.

    Args:
        connection: Connected socket.
        peer: Address of the peer for people.
        kind: Kind of the carrier for people, such as "Unix socket".
    """

    by_reference, reason = True, ""

    def __init__(self, connection: socket.socket, peer: str, kind: str) -> None:
        self.peer, self.kind, self.speaker = peer, kind, ""
        self._socket: Connection | StripedSocket = connection
        connection.setblocking(False)
        self._loop = asyncio.get_running_loop()
        self._receiver, self._changed = Receiver(), asyncio.Event()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._stream: Stream | None = None
        self._on_message: MessageHandler = lambda message: None
        self._reading = self._writing = -1  # descriptor that the loop watches; -1: none
        self._flush_is_due = False
        self._leaving: deque[_Leaving] = deque()

    def dispose(self) -> None:
        """Close the socket."""
        self._read(False)
        self._write(False)
        self._finish(None)
        self._ended.exception()  # looked at, so that asyncio does not report it
        self._socket.close()

    # -------------------------------------------------------------- before the stream is open

    async def start_tls(self, context: ssl.SSLContext) -> None:
        """Complete the handshake of TLS.

        Raises:
            OSError: It has failed.
        """
        if isinstance(self._socket, socket.socket):
            self._socket = tls = TlsSocket(self._socket, context, server_name=None)
            while True:
                try:
                    return tls.handshake()
                except BlockingIOError:
                    await self._until_readable()

    async def stripe(self, others: Sequence["SocketCarrier"], ready: bytes) -> bool:
        """Carry the stream over the connections of other carriers, too, in this order; each keeps its own to close.

        Args:
            others: Carriers whose peer is that of this one.
            ready: Bytes that tell the peer; sent over this connection alone.

        Returns:
            Whether that is possible: not where the peer has sent something before it was told.

        Raises:
            OSError: The peer cannot be told.
        """
        carriers = (self, *others)
        if not all(each._receiver.empty for each in carriers):
            return False
        await self.send_bytes(ready)
        self._socket = StripedSocket([each._socket for each in carriers if not isinstance(each._socket, StripedSocket)])
        self.kind = f"{len(carriers)} {self.kind}s"
        return True

    async def _until_readable(self) -> None:
        readable = self._loop.create_future()
        self._loop.add_reader(self._socket, _resolve, readable)
        try:
            await readable
        finally:
            self._loop.remove_reader(self._socket)

    async def receive_bytes(self, count: int) -> bytes:
        """The next ``count`` bytes, at most 4096, which are no message; b"" once the peer has ended the connection."""
        while (found := self._receiver.take(count)) is None:
            if self._ended.done():
                return b""
            await self._until_changed()
        return found

    async def send_bytes(self, data: bytes) -> None:
        """Send a few bytes, which are no message and fit into the buffer of a new connection.

        Raises:
            OSError: They cannot be sent.
        """
        if self._socket.sendmsg([memoryview(data)]) != len(data):
            raise BlockingIOError("the peer reads nothing")

    async def receive(self) -> Frame:
        while (found := self._receiver.next()) is None or found[1]:
            if found is not None or self._ended.done():
                return b""
            await self._until_changed()
        return found[0]

    async def _until_changed(self) -> None:
        self._changed.clear()
        self._read(True)
        try:
            await self._changed.wait()
        finally:
            self._read(False)

    # -------------------------------------------------------------- an open stream

    async def carry(self, stream: Stream, on_message: MessageHandler) -> None:
        self._stream, self._on_message = stream, on_message
        stream.outbox.on_put = self._schedule
        self._read(True)
        self._schedule()
        self._deliver()
        try:
            await asyncio.shield(self._ended)
        finally:
            stream.outbox.on_put = None
            self._stream, self._on_message = None, lambda message: None

    async def close(self) -> None:
        self._read(False)
        self._finish(None)
        self._receiver = Receiver()

    async def end(self, error: PsError) -> None:
        reason = pb.StreamEnd(error=type(error).__name__, text=str(error))
        self._leaving += [(memoryview(each), None) for each in put(reason.SerializeToString(), end=True)]
        self._write(False)
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(END_SECONDS):
                await self._until_sent()
                # Closed with unread bytes, TCP would reset the connection, and the peer could lose the reason.
                self._socket.shutdown(socket.SHUT_WR)
                await self._until_closed()

    async def _until_closed(self) -> None:
        """Drop what the peer sends until it has closed its end."""
        dropped = memoryview(bytearray(1 << 16))
        while True:
            try:
                if not self._socket.recv_into(dropped):
                    return
            except BlockingIOError:
                await self._until_readable()

    async def _until_sent(self) -> None:
        while self._send():
            writable = self._loop.create_future()
            self._loop.add_writer(self._writing_fileno(), _resolve, writable)
            try:
                await writable
            finally:
                self._loop.remove_writer(self._writing_fileno())

    def _finish(self, error: Exception | None) -> None:
        """End reading and sending. ``error`` is the reason; None: the worker closed the socket."""
        self._changed.set()
        if self._ended.done():
            return
        if error is None:
            self._ended.set_result(None)
        else:
            self._ended.set_exception(error)

    # -------------------------------------------------------------- reading

    def _read(self, wanted: bool) -> None:
        """Watch the connection that is read next, or none any more."""
        descriptor = self._socket.fileno() if wanted else -1
        if descriptor == self._reading:
            return
        if self._reading >= 0:
            self._loop.remove_reader(self._reading)
        self._reading = descriptor
        if descriptor >= 0:
            self._loop.add_reader(descriptor, self._readable)
            self._read_on()

    def _read_on(self) -> None:
        """Read on soon where TLS may have decrypted what nobody has taken: of that the loop would not tell."""
        if not isinstance(self._socket, socket.socket):
            self._loop.call_soon(self._readable)

    def _readable(self) -> None:
        if self._reading < 0:
            return
        full = False
        for _ in range(READS):
            room, fills = self._receiver.room(), self._receiver.fills
            try:
                count = self._socket.recv_into(room)
            except (BlockingIOError, InterruptedError):
                full = False
                break
            except OSError:
                count = 0
            if not count:
                self._read(False)
                self._finish(None)
                return
            self._receiver.add(count)
            self._changed.set()
            full = count == len(room)
            if self._stream is not None:
                self._deliver()
            if self._reading < 0 or not full or not fills:
                break
        if self._reading >= 0:
            self._read(True)
            if full:
                self._read_on()

    def _deliver(self) -> None:
        """Hand over the messages that have come whole."""
        try:
            while self._stream is not None and not self._ended.done():
                if self._stream.crowded:
                    self._read(False)  # until the next flush
                    return
                found = self._receiver.next()
                if found is None:
                    return
                message, end = found
                if end:
                    self._finish(None)
                    return
                self._on_message(message)
        except Exception as error:  # noqa: BLE001 - carry raises it
            self._finish(error)

    # -------------------------------------------------------------- sending

    def _schedule(self) -> None:
        """Send the outbox at the end of this iteration of the loop, so that frames share a message."""
        if not self._flush_is_due and self._stream is not None:
            self._flush_is_due = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_is_due = False
        stream = self._stream
        if stream is not None and self._writing >= 0 and stream.outbox.error is not None:
            self._finish(stream.outbox.error)  # the peer may never read what is before it
        if stream is None or self._ended.done() or self._writing >= 0:
            return
        try:
            while not (self._leaving or self._ended.done() or stream.outbox.empty()):
                for message in messages(self._taken(stream)):
                    self._leaving += _leaving(message)
                if self._send():
                    self._write(True)
        except OSError:
            self._finish(None)
        if not stream.crowded and self._reading < 0 and not self._ended.done():
            self._read(True)
            self._deliver()

    def _taken(self, stream: Stream) -> Iterator[Frame]:
        """The next frames of the outbox, about ``TAKEN_BYTES``."""
        taken = 0
        while taken < TAKEN_BYTES and not self._ended.done() and not stream.outbox.empty():
            item = stream.outbox.get_nowait()
            if isinstance(item, PsError):
                self._finish(item)
                return
            stream.note_sent(1)
            taken += len(item)
            yield item

    def _send(self) -> bool:
        """Send what the socket takes; returns whether something is left.

        Raises:
            OSError: The connection has ended, or must: a payload has changed while it was sent. The peer has not got
                all of it; it opens another stream and asks again.
        """
        leaving = self._leaving
        while leaving:
            check = leaving[0][1]
            if check is not None and not check():
                leaving.clear()
                raise ConnectionAbortedError("a payload has changed while it was sent")
            try:
                sent = self._socket.sendmsg(list(_sendable(leaving)))
            except (BlockingIOError, InterruptedError):
                return True
            while leaving and sent >= len(leaving[0][0]):
                sent -= len(leaving.popleft()[0])
            if sent:
                leaving[0] = leaving[0][0][sent:], None
        return False

    def _write(self, wanted: bool) -> None:
        """Watch the connection that is written next, or none any more."""
        descriptor = self._writing_fileno() if wanted else -1
        if descriptor == self._writing:
            return
        if self._writing >= 0:
            self._loop.remove_writer(self._writing)
        self._writing = descriptor
        if descriptor >= 0:
            self._loop.add_writer(descriptor, self._writable)

    def _writing_fileno(self) -> int:
        return self._socket.writing_fileno() if isinstance(self._socket, StripedSocket) else self._socket.fileno()

    def _writable(self) -> None:
        try:
            if self._send():
                return self._write(True)
        except OSError:
            self._finish(None)
        self._write(False)
        self._schedule()

    # -------------------------------------------------------------- the socket

    def of_same_user(self) -> bool:
        """Whether the peer of a Unix socket is a process of this user."""
        return isinstance(self._socket, socket.socket) and same_user(self._socket)


#: What is left to send, and what has to hold before.
_Leaving = tuple[memoryview, Callable[[], bool] | None]


def _leaving(message: Frame) -> list[_Leaving]:
    """The buffers of a message. The last byte of a payload that may change is kept back until it is known not to."""
    buffers: list[_Leaving] = [(memoryview(each), None) for each in put(message)]
    if isinstance(message, Split) and message.intact is not None:
        last, _ = buffers.pop()
        buffers += [(last[:-1], None), (memoryview(bytes(last[-1:])), message.intact)]
    return buffers


def _sendable(leaving: deque[_Leaving]) -> Iterator[memoryview]:
    """The buffers that may be sent together: up to one before which something has to be checked."""
    for number, (buffer, check) in enumerate(leaving):
        if number == BUFFERS or (number and check is not None):
            return
        yield buffer


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
