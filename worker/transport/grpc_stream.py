"""A stream to a server over gRPC.

    send(frame) --> queue --> gRPC's thread --> server
    on_message(message) <-- reader thread <-- server

Frames that wait in the queue together travel as one message.
"""

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from torch_ps.common.errors import PsError, Unreachable
from torch_ps.common.rpc.status import error_of
from torch_ps.common.wire.address import Address
from torch_ps.common.wire.frames import messages
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
        self._frames: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._closed = False
        self._failure: PsError | None = None
        self._call = start_call(self._messages())
        self._reader = threading.Thread(target=self._read, name=f"read {server}", daemon=True)
        self._reader.start()

    def send(self, frame: bytes) -> None:
        self._frames.put(frame)

    def close(self) -> None:
        self._closed = True
        self._frames.put(None)
        self._reader.join(1.0)
        self._call.cancel()

    def fail(self, error: PsError) -> None:
        self._failure = error
        self._call.cancel()

    def _messages(self) -> Iterator[bytes]:
        """What waits to be sent, several frames as one message where they fit. Runs on gRPC's thread."""
        frame = self._frames.get()
        while frame is not None:
            waiting = []
            with contextlib.suppress(queue.Empty):
                while frame is not None:
                    waiting.append(frame)
                    frame = self._frames.get_nowait()
            yield from messages(waiting)
            if frame is not None:
                frame = self._frames.get()

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
            self._frames.put(None)
        if not self._closed:
            self._on_end(end)
