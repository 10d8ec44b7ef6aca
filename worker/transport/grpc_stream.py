"""A stream to a server over gRPC; ``near.py`` has the same over a Unix socket.

    send(frame) --> queue --> gRPC's thread --> server
    on_message(frame) <-- reader thread <-- server

Frames are bytes; what they mean is the session's business. Several may travel as one message.
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

OnMessage = Callable[[bytes], None]
OnEnd = Callable[[PsError], None]
Exchange = Callable[[Iterator[bytes]], Any]


class GrpcStream:
    """One open Exchange. ``on_message`` and, once unless closed, ``on_end`` are called on the reader thread.

    Args:
        exchange: begins the call with the messages to send; gives those that come.
        server: for errors.
    """

    def __init__(self, exchange: Exchange, server: Address, on_message: OnMessage, on_end: OnEnd) -> None:
        self._server, self._on_message, self._on_end = server, on_message, on_end
        self._frames: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._closed = False
        self._failure: PsError | None = None
        self._call = exchange(self._messages())
        self._reader = threading.Thread(target=self._read, name=f"read {server}", daemon=True)
        self._reader.start()

    def send(self, frame: bytes) -> None:
        self._frames.put(frame)

    def _messages(self) -> Iterator[bytes]:
        """On gRPC's thread: what waits to be sent, together where it can be."""
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

    def close(self) -> None:
        """End the stream; frames that were sent are delivered first."""
        self._closed = True
        self._frames.put(None)
        self._reader.join(1.0)
        self._call.cancel()

    def fail(self, error: PsError) -> None:
        """End the stream as if the connection had broken, with ``error``."""
        self._failure = error
        self._call.cancel()

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
