"""Peers that mean harm, or do it: connections left half-open, noise, calls that are opened and left, floods.

    with attack(server, whole_attack): ...       200 connections at a time, all from this process

Each lives until the ``with`` ends and does not read what it is sent unless it has to.
"""

import contextlib
import os
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.rpc import channel
from torch_ps.common.wire import address
from torch_ps.common.wire.frames import pack

#: One connection for each channel: gRPC would share one between all of a process.
ALONE = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1)]
LARGE = 4 << 20

Attacker = Callable[[str, contextlib.ExitStack], None]


@contextlib.contextmanager
def attack(server: str, attackers: list[Attacker]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for attacker in attackers:
            attacker(server, stack)
        yield


def half_open(server: str, stack: contextlib.ExitStack) -> None:
    stack.enter_context(socket.create_connection(address.parse(server), 10))


def noise(server: str, stack: contextlib.ExitStack) -> None:
    connection = stack.enter_context(socket.create_connection(address.parse(server), 10))
    with contextlib.suppress(OSError):  # the server hangs up when it has read enough
        connection.sendall(os.urandom(1 << 16))


def preface(server: str, stack: contextlib.ExitStack) -> None:
    """The beginning of HTTP/2 and no more."""
    stack.enter_context(socket.create_connection(address.parse(server), 10)).sendall(
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    )


def half_handshake(server: str, stack: contextlib.ExitStack) -> None:
    """The first flight of TLS and no more."""
    connection = stack.enter_context(socket.create_connection(address.parse(server), 10))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    sent = ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), sent, server_hostname="localhost").do_handshake()
    connection.sendall(sent.read())


class Caller:
    """A gRPC client of its own connection; ``credentials`` None speaks in the clear."""

    def __init__(self, credentials: grpc.ChannelCredentials | None = None) -> None:
        self._credentials = credentials

    def connect(self, server: str, stack: contextlib.ExitStack) -> grpc.Channel:
        made = (
            grpc.insecure_channel(server, options=ALONE)
            if self._credentials is None
            else grpc.secure_channel(server, self._credentials, options=ALONE)
        )
        return stack.enter_context(made)

    def flood(self, method: str, message: bytes, times: int) -> Attacker:
        """So many calls with one large message each, all at once; nobody waits for the answers."""

        def act(server: str, stack: contextlib.ExitStack) -> None:
            call: Any = self.connect(server, stack).unary_unary(channel.method(method), _same, _same)
            for _ in range(times):
                stack.callback(call.future(message, timeout=60).cancel)

        return act

    def open_and_leave(self, frames: list[bytes]) -> Attacker:
        """An Exchange that sends these frames, stays open and reads nothing."""

        def act(server: str, stack: contextlib.ExitStack) -> None:
            call: Any = self.connect(server, stack).stream_stream(channel.method("Exchange"), _same, _same)
            end = threading.Event()

            def sent() -> Iterator[bytes]:
                yield from frames
                end.wait(60)

            stack.callback(call(sent(), timeout=60).cancel)
            stack.callback(end.set)

        return act


def pulls(buckets: int, times: int, incarnation: int) -> list[bytes]:
    """The frames of an observer that pulls everything, again and again."""
    pull = [pack(pb.UpHeader(pull=pb.Pull(bucket=bucket))) for bucket in range(buckets)]
    return [pack(pb.UpHeader(hello=pb.Hello(incarnation=incarnation))), *(pull * times)]


def giant(tensors: int, numel: int, incarnation: int) -> bytes:
    """A Join with a model of so many tensors."""
    model = pb.Model(optimizer="SGD", group=[pb.ParameterGroup()])
    for number in range(tensors):
        model.group[0].tensor.add(name=f"t{number}", shape=[numel], dtype="float32")
    return pb.JoinRequest(worker="giant", model=model, incarnation=incarnation).SerializeToString()


def _same(data: bytes) -> bytes:
    return data
