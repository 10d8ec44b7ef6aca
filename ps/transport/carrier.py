"""Carrier: the transport of one Exchange stream, as the servicer sees it.

    accepted --receive()--> Hello --carry()--> messages to ``on_message``, frames of the outbox to the peer
                                                                 '--error--> end(error): the peer is told why

``grpc_carrier.py`` and ``socket_carrier.py`` implement it. A carrier decides nothing about a stream.
"""

from collections.abc import Awaitable, Callable
from typing import Protocol

from torch_ps.common.errors import PsError
from torch_ps.common.wire.frames import Frame
from torch_ps.ps.transport.streams import Stream

#: Called with every message of an open stream; each holds one or more frames (``torch_ps.common.wire.frames``).
MessageHandler = Callable[[Frame], None]


class Carrier(Protocol):
    """One stream of messages in both directions.

    Back-pressure: while ``Stream.crowded``, ``carry`` reads no message; it takes frames out of the outbox only as fast
    as the peer reads them, and the outbox bounds what may wait there.
    """

    #: Who speaks, for people: "worker 'w1'"; empty before its Hello.
    speaker: str

    @property
    def peer(self) -> str:
        """Address of the peer for people: "ipv4:10.0.0.7:41234"; what follows the last colon names no host."""

    @property
    def kind(self) -> str:
        """Kind of the carrier for people: "gRPC", "socket" or "Unix socket"."""

    @property
    def reason(self) -> str:
        """Reason of the worker why it uses no faster carrier, for people; empty if there is none."""

    @property
    def by_reference(self) -> bool:
        """Whether a split frame is sent from where its payload is; else it is joined first."""

    async def receive(self) -> Frame:
        """Next message, before ``carry``; b"" once the peer has ended the stream.

        Raises:
            CorruptFrame: the peer announces a message that is too long.
        """

    async def carry(self, stream: Stream, on_message: MessageHandler) -> None:
        """Pass every message to ``on_message`` and every frame of the outbox to the peer, until the peer ends.

        Raises:
            PsError: ``on_message`` raised it, or it was in the outbox.
        """

    async def close(self) -> None:
        """Stop reading and release what was read; ``end`` may follow."""

    async def end(self, error: PsError) -> None:
        """Tell the peer why the stream ends. Nothing can be sent after it."""


#: Serves one stream from its Hello to its end.
Serve = Callable[[Carrier], Awaitable[None]]
