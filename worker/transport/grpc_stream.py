"""A stream to a server over gRPC.

    send(frame) --> queue --> gRPC's thread --> server
    on_message(message) <-- reader thread <-- server

Frames that wait in the queue together travel as one message. Those that overtake have a queue of their own, which is
emptied first: before each message, not before each bunch of messages.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from torch_ps.common.errors import PsError, Unreachable
from torch_ps.common.rpc.status import error_of
from torch_ps.common.wire.address import Address
from torch_ps.common.wire.frames import Frame, join, take_message
from torch_ps.worker.transport.stream import OnEnd, OnMessage

#: Begins the call Exchange: takes the messages to send, returns the call, which iterates over the messages that come.
StartCall = Callable[[Iterator[bytes]], Any]


class GrpcStream:
    """A ``Stream`` over one call of gRPC.

    Args:
        start_call: begins the call.
        server: address for errors and for the name of the thread.
        on_message: function that takes each message.
        on_end: function that takes the error that ends the stream.
    """

    def __init__(self, start_call: StartCall, server: Address, on_message: OnMessage, on_end: OnEnd) -> None:
        self._server, self._on_message, self._on_end = server, on_message, on_end
        self._frames: deque[Frame] = deque()
        self._first: deque[Frame] = deque()  # frames that overtake the others
        self._lock = threading.Lock()  # Ctrl-C never leaves it half taken, as it does a Condition
        self._put = threading.Condition(self._lock)
        self._closed = self._ended = False
        self._failure: PsError | None = None
        self._call = start_call(self._messages())
        self._reader = threading.Thread(target=self._read, name=f"read {server}", daemon=True)
        self._reader.start()

    def send(self, frame: Frame, *, overtake: bool = False) -> None:
        with self._lock:
            (self._first if overtake else self._frames).append(frame)
            self._put.notify()

    def read(self, done: Callable[[], object], seconds: float) -> None:
        """Return: the reader thread takes all messages."""

    @property
    def sending(self) -> bool:
        return True  # gRPC's thread joins frames when it likes

    def close(self) -> None:
        self._closed = True
        self._end()
        self._reader.join(1.0)
        self._call.cancel()

    def fail(self, error: PsError) -> None:
        self._failure = error
        self._call.cancel()

    def _messages(self) -> Iterator[bytes]:
        """What waits to be sent, several frames as one message where they fit. Runs on gRPC's thread."""
        while True:
            with self._put:
                self._put.wait_for(lambda: self._first or self._frames or self._ended)
                if not (self._first or self._frames):
                    return
                message = take_message(self._first or self._frames)
            yield join(message)

    def _end(self) -> None:
        """Let ``_messages`` end once everything that waits has left."""
        with self._lock:
            self._ended = True
            self._put.notify()

    def _read(self) -> None:
        try:
            for message in self._call:
                self._on_message(message)
            end: PsError = Unreachable(f"server {self._server} closed the stream")
        except grpc.RpcError as failure:
            end = self._failure or error_of(failure, str(self._server))
        except PsError as error:
            self._call.cancel()
            end = error
        except Exception as error:  # noqa: BLE001 - a bug here must end the wait, not leave it to its deadline
            self._call.cancel()
            end = PsError(f"a frame of server {self._server} could not be taken: {error!r}")
            end.__cause__ = error
        finally:
            self._end()
        if not self._closed:
            self._on_end(end)
