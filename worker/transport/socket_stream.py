"""A stream to a server over a socket: a Unix socket on this host, or a TCP connection to the server's data port.

    send(frame) --socket is free--> socket --> server
                '--else--> queue --> sending thread --> socket
    on_message(message) <-- reader thread, or the one that waits <-- Receiver <-- server

Rules of this file
  1. A small frame leaves on the thread that sends it, if nothing is before it: no other thread has to run first. A
     larger one leaves on the sending thread, while its caller prepares the next.
  2. Payloads are sent from where they are and received where they stay.
  3. Those that overtake have a queue of their own, which is emptied first: before each message. A frame that has
     begun to leave is finished first.
  4. One thread reads at a time. When nothing is awaited any more the reader thread steps aside, and a thread that waits
     for answers reads them itself: handing them over would take longer than a small answer. What is large, or is sent
     over a longer time, has the reader thread back, which receives while other buckets are prepared.

Source: the frames are those of ``torch_ps.common.wire.socket_frames``.
"""

import contextlib
import math
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable

from google.protobuf.message import DecodeError

from torch_ps.common import errors
from torch_ps.common.errors import CorruptFrame, PsError, Unreachable
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.wire.address import Address
from torch_ps.common.wire.frames import Frame, join, take_message
from torch_ps.common.wire.socket_frames import FindPlace, Receiver, put
from torch_ps.common.wire.striped_socket import Connection, StripedSocket
from torch_ps.worker.transport.stream import EndedHere, OnEnd, OnMessage

#: Bytes of a frame up to which the thread that sends it writes to the socket itself.
SMALL = 1 << 16
#: Seconds of sending after which the reader thread is to receive meanwhile.
LONG_SEND_SECONDS = 0.001
#: Seconds after which the reader thread reads again if nobody else has: a server may say something by itself.
ASIDE_SECONDS = 0.2
#: Seconds in which ``close`` lets what was sent leave, and the reader end.
CLOSE_SECONDS = 1.0


class SocketStream:
    """A ``Stream`` over a connected socket.

    Args:
        connection: socket, or several as one, whose calls wait, connected and authenticated; the stream closes it.
        address: address of the server for errors and for the names of the threads.
        on_message: function that takes each message.
        on_end: function that takes the error that ends the stream.
        place: function that finds where a payload is to be received; called where ``on_message`` is.
    """

    def __init__(
        self,
        connection: Connection | StripedSocket,
        address: Address,
        on_message: OnMessage,
        on_end: OnEnd,
        place: FindPlace = lambda head, size: None,
    ) -> None:
        self._socket, self._address = connection, address
        self._on_message, self._on_end = on_message, on_end
        self._closed = False
        self._failure: PsError | None = None
        self._frames: deque[Frame] = deque()
        self._first: deque[Frame] = deque()  # frames that overtake the others
        self._rest: list[memoryview] = []  # of a frame that has begun to leave
        self._lock = threading.Lock()  # Ctrl-C never leaves it half taken, as it does a Condition
        self._put = threading.Condition(self._lock)
        self._busy = self._ended = False  # whether a thread sends now, and whether none may any more
        self._receiver = Receiver(place)
        self._reading = threading.Lock()  # held by the thread that reads
        self._aside = False  # whether the reader thread has stepped aside
        self._resumed = threading.Event()  # set when it has to come back
        self._read_here = False  # whether another thread has read since it stepped aside, or since it looked
        self._end: PsError | None = None  # why the stream has ended, once it has
        self._sending_since = math.inf  # first send since the last message, on time.monotonic()
        self._poll: select.poll | None = None  # where another thread can read with a deadline
        if isinstance(connection, socket.socket):
            self._poll = select.poll()
            self._poll.register(connection, select.POLLIN)
        self._reader = threading.Thread(target=self._read, name=f"read {address}", daemon=True)
        self._sender = threading.Thread(target=self._write, name=f"send {address}", daemon=True)
        self._sender.start()  # the reader waits for its end
        self._reader.start()

    def send(self, frame: Frame, *, overtake: bool = False) -> None:
        if self._aside:
            now = time.monotonic()
            self._sending_since = min(self._sending_since, now)
            if len(frame) > SMALL or now - self._sending_since > LONG_SEND_SECONDS:
                self._resumed.set()
        begun = False
        try:
            with self._lock:
                before = self._busy or self._ended or self._rest or self._first or self._frames
                if before or len(frame) > SMALL:
                    (self._first if overtake else self._frames).append(frame)
                    self._put.notify()
                    return
                self._busy = begun = True
            # An error of the socket is the reader's to report: it sees the connection end, too.
            rest = _views(frame)
            with contextlib.suppress(OSError):
                rest = _send(self._socket, rest, socket.MSG_DONTWAIT)
            with self._lock:
                self._rest, self._busy, begun = rest, False, False
                if rest or self._first or self._frames:
                    self._put.notify()
        except BaseException:  # Ctrl-C: how much of the frame has left is not known, so the stream cannot go on
            self.fail(EndedHere(f"sending to server {self._address} was interrupted"))
            with self._lock:
                self._busy = self._busy and not begun
                self._put.notify()
            raise

    def read(self, done: Callable[[], object], seconds: float) -> None:
        if self._poll is None or not self._reading.acquire(blocking=False):
            return
        taking = False
        try:
            deadline, receiver = time.monotonic() + seconds, self._receiver
            while self._end is None and not done():
                if receiver.fills and len(receiver.room()) > SMALL:
                    break  # the reader thread waits for all of it in one call
                self._read_here = True
                left = deadline - time.monotonic()
                if self._poll.poll(1000 * max(0.0, min(left, ASIDE_SECONDS))):
                    taking = True
                    self._take(self._socket.recv_into(receiver.room()))
                    taking = False
                elif left <= 0:
                    return
            else:
                if self._end is None:
                    return
        except OSError as error:
            self._end = self._lost(error)
        except BaseException:  # Ctrl-C in the middle of a message, which is lost
            if taking:
                self._end = EndedHere(f"reading from server {self._address} was interrupted")
                self._resumed.set()
            raise
        finally:
            self._reading.release()
        self._resumed.set()

    @property
    def sending(self) -> bool:
        with self._put:
            return bool(self._busy or self._rest or self._first or self._frames)

    def close(self) -> None:
        self._closed = True
        self._resumed.set()
        with self._put:
            self._ended = True
            self._put.notify()
        self._sender.join(CLOSE_SECONDS)
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
        self._reader.join(CLOSE_SECONDS)
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def fail(self, error: PsError) -> None:
        self._failure = error
        self._resumed.set()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    # -------------------------------------------------------------- the sending thread

    def _write(self) -> None:
        """Send what waits, until ``close`` was called and everything has left, or the connection has ended."""
        with contextlib.suppress(OSError):
            while (views := self._next()) is not None:
                while views:
                    views = _send(self._socket, views)
                with self._put:
                    self._busy = False

    def _next(self) -> list[memoryview] | None:
        """The buffers that leave next; waits for some. None: there will be none."""
        with self._put:
            self._put.wait_for(lambda: not self._busy and (self._rest or self._first or self._frames or self._ended))
            if self._rest:
                views, self._rest = self._rest, []
            elif self._first or self._frames:
                views = _views(take_message(self._first or self._frames))
            else:
                return None
            self._busy = True
        return views

    # -------------------------------------------------------------- the reader thread

    def _read(self) -> None:
        try:
            end = self._until_end()
        except OSError as error:
            end = self._end = self._lost(error)
        finally:
            with contextlib.suppress(OSError):  # the sending thread may be in the middle of a frame
                self._socket.shutdown(socket.SHUT_RDWR)
            with self._put:
                self._ended = True
                self._frames.clear()
                self._first.clear()
                self._put.notify()
            self._sender.join(CLOSE_SECONDS)
            with self._reading:
                self._socket.close()
        if not self._closed:
            self._on_end(self._failure or end)

    def _until_end(self) -> PsError:
        """Hand messages to ``on_message`` until the stream ends; returns why it did."""
        while True:
            with self._reading:
                more = True
                while self._end is None and more:
                    flags = socket.MSG_WAITALL if self._receiver.fills else 0
                    more = self._take(self._socket.recv_into(self._receiver.room(), flags=flags))
                if self._end is not None:
                    return self._end
            self._step_aside()

    def _step_aside(self) -> None:
        """Let threads that wait read, until ``_resumed`` is set, or for a while nobody has."""
        self._aside = True
        while not self._resumed.wait(ASIDE_SECONDS) and (self._read_here or self._reading.locked()):
            self._read_here = False
        self._aside = False
        self._resumed.clear()

    def _take(self, count: int) -> bool:
        """Hand over the messages that are whole with ``count`` bytes more; the caller holds ``_reading``.

        Returns:
            Whether the reader thread has to read on. ``_end`` is set if the stream has ended.
        """
        if not count:
            self._end = Unreachable(f"server {self._address} closed the stream")
            return False
        more, self._sending_since = True, math.inf
        try:
            self._receiver.add(count)
            while (found := self._receiver.next()) is not None:
                message, end = found
                if end:
                    self._end = _error(join(message))
                    return False
                more = self._on_message(message)
                del found, message  # its memory is free for the next one
        except PsError as error:
            self._end = error
        except Exception as error:  # noqa: BLE001 - a bug here must end the wait, not leave it to its deadline
            self._end = PsError(f"a frame of server {self._address} could not be taken: {error!r}")
            self._end.__cause__ = error
        return more or self._poll is None

    def _lost(self, error: OSError) -> PsError:
        return Unreachable(f"server {self._address} does not answer: {error}")


def _views(message: Frame) -> list[memoryview]:
    return [memoryview(each) for each in put(message)]


def _send(connection: Connection | StripedSocket, views: list[memoryview], flags: int = 0) -> list[memoryview]:
    """Send once; returns what has not left.

    Raises:
        OSError: the connection has ended.
    """
    try:
        sent = connection.sendmsg(views, (), flags)
    except BlockingIOError:
        return views
    for place, view in enumerate(views):
        if sent < len(view):
            return [view[sent:], *views[place + 1 :]]
        sent -= len(view)
    return []


def _error(message: bytes) -> PsError:
    try:
        end = pb.StreamEnd.FromString(message)
    except DecodeError:
        return CorruptFrame(f"{len(message)} bytes are not a StreamEnd")
    return errors.BY_NAME.get(end.error, PsError)(end.text)
