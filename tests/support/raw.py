"""A peer that may send anything: frames and requests that no client of ours would send, over plain gRPC."""

import contextlib
import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import grpc
import pytest
import torch

from torch_ps.common import schema
from torch_ps.common.errors import PsError
from torch_ps.common.optimizer_spec import Hyper
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.rpc import channel
from torch_ps.common.rpc.status import error_of
from torch_ps.common.schema import Group, Model, TensorSpec
from torch_ps.common.wire.frames import pack

SECONDS = 30.0


def described(params: dict[str, torch.Tensor], optimizer: str = "SGD", hyper: Hyper | None = None) -> pb.Model:
    """A model of these tensors in one group; hyperparameters that are not named are torch's."""
    return schema.to_proto(
        Model(optimizer, (Group(tuple(TensorSpec.of(k, v) for k, v in params.items()), hyper or {}),))
    )


def secret_of(worker: str) -> bytes:
    """The secret of every session of a worker that these tests speak for."""
    return hashlib.sha256(f"secret of {worker}".encode()).digest()[:16]


class Raw:
    """One connection to one server."""

    def __init__(self, connection: grpc.Channel, server: str) -> None:
        self._channel, self.server = connection, server
        call = self._channel.unary_unary(channel.method("Describe"), pb.DescribeRequest.SerializeToString, _description)
        #: Of the server, when this connection was opened.
        self.description: pb.JobDescription = call(pb.DescribeRequest(), timeout=SECONDS, wait_for_ready=True)
        self.incarnation: int = self.description.incarnation

    def join(self, request: pb.JoinRequest) -> pb.JoinReply:
        """Join, in the incarnation that the server is of.

        Raises:
            PsError: what the server answers instead.
        """
        request.incarnation = self.incarnation
        request.secret = request.secret or secret_of(request.worker)
        call = self._channel.unary_unary(channel.method("Join"), pb.JoinRequest.SerializeToString, _join_reply)
        try:
            return call(request, timeout=SECONDS)
        except grpc.RpcError as failure:
            raise error_of(failure, self.server) from None

    def share(self, request: pb.ShareRequest) -> pb.ShareReply:
        call = self._channel.unary_unary(channel.method("Share"), pb.ShareRequest.SerializeToString, _share_reply)
        return call(request, timeout=SECONDS)

    def leave(self, worker: str, session: int) -> None:
        call = self._channel.unary_unary(channel.method("Leave"), pb.LeaveRequest.SerializeToString, bytes)
        call(pb.LeaveRequest(worker=worker, session=session, secret=secret_of(worker)), timeout=SECONDS)

    def exchange(self, *frames: bytes) -> PsError:
        """Open an Exchange, send frames; the error that it ends with."""
        return self.error("Exchange", frames)

    def call(self, method: str, frames: Iterable[bytes]) -> Any:
        """A call of a stream of frames: an iterator of the frames that come back, with ``cancel``."""
        return self._channel.stream_stream(channel.method(method), _same, _same)(iter(frames), timeout=SECONDS)

    def error(self, method: str, frames: Iterable[bytes]) -> PsError:
        call = self._channel.stream_stream(channel.method(method), _same, _same)
        with pytest.raises(grpc.RpcError) as caught:
            list(call(iter(frames), timeout=SECONDS))
        return error_of(caught.value, self.server)

    def hello(self, worker: str = "", session: int = 0, pull_codec: str = "none") -> bytes:
        """First frame of an Exchange."""
        hello = pb.Hello(worker=worker, session=session, pull_codec=pull_codec, incarnation=self.incarnation)
        hello.secret = secret_of(worker)
        return pack(pb.UpHeader(hello=hello))

    @contextlib.contextmanager
    def worker(self, name: str, params: dict[str, torch.Tensor]) -> Iterator[bytes]:
        """A worker of the job; gives the Hello frame of its Exchange."""
        session = self.join(pb.JoinRequest(worker=name, model=described(params))).session
        try:
            yield self.hello(name, session)
        finally:
            self.leave(name, session)


@contextlib.contextmanager
def raw(server: str) -> Iterator[Raw]:
    """A connection of its own, with room to send messages that are too long."""
    with grpc.insecure_channel(server, options=[("grpc.max_send_message_length", -1)]) as connection:
        yield Raw(connection, server)


def _same(frame: bytes) -> bytes:
    return frame


def _description(data: bytes) -> pb.JobDescription:
    return pb.JobDescription.FromString(data)


def _share_reply(data: bytes) -> pb.ShareReply:
    return pb.ShareReply.FromString(data)


def _join_reply(data: bytes) -> pb.JoinReply:
    return pb.JoinReply.FromString(data)
