"""The worker's end of the wire: one ``Link`` per shard. The only module of this folder that knows gRPC.

    send(frame) --> queue --> gRPC's thread --> server
    on_message(frame) <-- reader thread <-- server

Rules of this file
  1. Frames are bytes; what they mean is the session's business. Several may travel as one message.
  2. Every call has a deadline, and every failure comes out as an error of ``torch_ps.common.errors``.
"""

import contextlib
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message

from torch_ps.common import channel
from torch_ps.common.address import Address
from torch_ps.common.errors import PsError, Unreachable, WaitTimeout
from torch_ps.common.frames import messages
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.status import error_of

Reply = TypeVar("Reply", bound=Message)

OnMessage = Callable[[bytes], None]
OnEnd = Callable[[PsError], None]


class Stream:
    """One open Exchange. ``on_message`` and, once unless closed, ``on_end`` are called on the reader thread."""

    def __init__(self, link: "Link", on_message: OnMessage, on_end: OnEnd) -> None:
        self._link, self._on_message, self._on_end = link, on_message, on_end
        self._frames: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._closed = False
        self._call = link.exchange(self._messages())
        self._reader = threading.Thread(target=self._read, name=f"read {link.address}", daemon=True)
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

    def _read(self) -> None:
        try:
            for message in self._call:
                self._on_message(message)
            end: PsError = Unreachable(f"server {self._link.address} closed the stream")
        except grpc.RpcError as failure:
            end = error_of(failure, str(self._link.address))
        except PsError as error:
            self._call.cancel()
            end = error
        except Exception as error:  # noqa: BLE001 - a bug here must end the wait, not leave it to its deadline
            self._call.cancel()
            end = PsError(f"a frame of server {self._link.address} could not be taken: {error!r}")
            end.__cause__ = error
        finally:
            self._frames.put(None)
        if not self._closed:
            self._on_end(end)


class Link:
    """The connection to one shard.

    Args:
        address: of the shard.
    """

    def __init__(self, address: Address) -> None:
        self.address = address
        self._channel = grpc.insecure_channel(str(address), options=channel.OPTIONS)
        exchange: Any = self._channel.stream_stream(channel.method("Exchange"), None, None)  # raw frames both ways
        self.exchange: Callable[[Iterator[bytes]], Any] = exchange

    def describe(self, seconds: float) -> pb.JobDescription:
        """What the shard is; waits until it answers.

        Raises:
            Unreachable: it did not within ``seconds``; names the address and the reason.
        """
        try:
            return self._unary("Describe", pb.DescribeRequest(), pb.JobDescription, seconds, wait=True)
        except WaitTimeout:
            reason = self._why()
        raise Unreachable(
            f"no server answers at {self.address} within {seconds:g} s ({reason}); "
            "check the address and that ps-serve runs there"
        )

    def _why(self) -> str:
        """What goes wrong at this address; a call that waits for the server does not say, so ask without waiting."""
        try:
            self._unary("Describe", pb.DescribeRequest(), pb.JobDescription, 1.0)
        except PsError as error:
            return str(error)
        return "it has just begun to answer"

    def join(self, request: pb.JoinRequest, seconds: float) -> pb.JoinReply:
        return self._unary("Join", request, pb.JoinReply, seconds)

    def share(self, request: pb.ShareRequest, seconds: float) -> pb.ShareReply:
        return self._unary("Share", request, pb.ShareReply, seconds)

    def data(self, request: pb.DataRequest, seconds: float) -> pb.DataReply:
        return self._unary("Data", request, pb.DataReply, seconds)

    def leave(self, request: pb.LeaveRequest, seconds: float) -> pb.LeaveReply:
        return self._unary("Leave", request, pb.LeaveReply, seconds)

    def status(self, seconds: float) -> pb.StatusReply:
        return self._unary("Status", pb.StatusRequest(), pb.StatusReply, seconds)

    def seed(self, frames: Iterable[bytes], seconds: float) -> None:
        call: Callable[..., Any] = self._channel.stream_unary(channel.method("Seed"), None, pb.SeedReply.FromString)
        try:
            call(iter(frames), timeout=seconds)
        except grpc.RpcError as failure:
            raise error_of(failure, str(self.address)) from None

    def rosters(self, seconds: float) -> Iterator[pb.RosterView]:
        """Every roster of the lead, the current one first.

        Raises:
            WaitTimeout: ``seconds`` are over.
        """
        watch = self._channel.unary_stream(
            channel.method("WatchRoster"), pb.WatchRequest.SerializeToString, pb.RosterView.FromString
        )
        call = watch(pb.WatchRequest(), timeout=seconds)
        try:
            yield from call
        except grpc.RpcError as failure:
            raise error_of(failure, str(self.address)) from None
        finally:
            call.cancel()

    def close(self) -> None:
        self._channel.close()

    def _unary(self, name: str, request: Message, reply: type[Reply], seconds: float, *, wait: bool = False) -> Reply:
        call: Callable[..., Reply] = self._channel.unary_unary(
            channel.method(name), type(request).SerializeToString, reply.FromString
        )
        try:
            return call(request, timeout=seconds, wait_for_ready=wait)
        except grpc.RpcError as failure:
            raise error_of(failure, str(self.address)) from None
