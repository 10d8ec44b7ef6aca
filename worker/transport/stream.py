"""The contract of a carrier: what a stream of frames to one shard does, whatever carries it.

    send(frame) --> carrier --> server
    on_message(message) <-- reader thread, or one in ``read`` <-- carrier <-- server

``grpc_stream.py`` carries frames over gRPC, ``socket_stream.py`` over a socket; ``Link.open`` chooses. A carrier knows
frames as bytes and never looks into one.
"""

from collections.abc import Callable
from typing import Protocol

from torch_ps.common.errors import PsError, Unreachable
from torch_ps.common.wire.frames import Frame


class EndedHere(Unreachable):
    """This process has ended the stream; the connection was not lost."""


#: Takes one message, which holds one frame or several (``common.wire.frames.unpack_all``). Called on the reader thread,
#: or on one that reads, one message at a time. Returns whether the reader thread has to read on, as more is awaited now
#: or may be while no thread waits. Else it may leave the next messages to ``Stream.read``. A ``PsError`` that it raises
#: ends the stream with this error.
OnMessage = Callable[[Frame], bool]
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

    def read(self, done: Callable[[], object], seconds: float) -> None:
        """Take messages on this thread where the reader thread has left them to it; else return at once.

        Args:
            done: function that says whether what this thread waits for has come; called between two messages.
            seconds: longest time to read.
        """

    @property
    def sending(self) -> bool:
        """Whether frames may still be read to be sent; if not, the payloads of all that were sent may change."""

    def close(self) -> None:
        """Deliver what was sent, end the stream, and wait for the reader thread, at most a second."""

    def fail(self, error: PsError) -> None:
        """End the stream as if the connection had broken; ``on_end`` gets ``error``."""
