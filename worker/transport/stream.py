"""The contract of a carrier: what a stream of frames to one shard does, whatever carries it.

    send(frame) --> carrier --> server
    on_message(message) <-- reader thread <-- carrier <-- server

``grpc_stream.py`` carries frames over gRPC, ``socket_stream.py`` over a socket; ``Link.open`` chooses. A carrier knows
frames as bytes and never looks into one.
"""

from collections.abc import Callable
from typing import Protocol

from torch_ps.common.errors import PsError
from torch_ps.common.wire.frames import Frame

#: Takes one message, which holds one frame or several (``common.wire.frames.unpack_all``). Called on the reader thread,
#: one message at a time. A ``PsError`` that it raises ends the stream with this error.
OnMessage = Callable[[Frame], None]
#: Takes the error that ended the stream. Called once, on the reader thread, and never after ``close`` was called.
OnEnd = Callable[[PsError], None]


class Stream(Protocol):
    """One open stream to one shard. It begins to read when it is made, on a thread of its own.

    Frames arrive at the server in the order of ``send``, except those that overtake, each once or not at all. A stream
    that has ended stays ended; whoever needs another one opens it and sends again what was not answered.
    """

    def send(self, frame: Frame, *, overtake: bool = False) -> None:
        """Send one frame. Never raises: what goes wrong comes out at ``on_end``. May be called on any thread.

        Args:
            frame: frame to send. A split payload stays as it is until the frame is answered or the stream has ended.
            overtake: whether the frame passes those that still wait to leave.
        """

    @property
    def sending(self) -> bool:
        """Whether frames may still be read to be sent; if not, the payloads of all that were sent may change."""

    def close(self) -> None:
        """Deliver what was sent, end the stream, and wait for the reader thread, at most a second."""

    def fail(self, error: PsError) -> None:
        """End the stream as if the connection had broken; ``on_end`` gets ``error``."""
