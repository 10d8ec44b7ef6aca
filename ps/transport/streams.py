"""The open Exchange streams of one shard, their outboxes, and the queues of those who watch the roster."""

import asyncio
import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from torch_ps.common.codecs import Codec
from torch_ps.common.codecs.pulled_copies import Copies
from torch_ps.common.errors import Overloaded, PsError, UnknownWorker
from torch_ps.common.wire.frames import Frame
from torch_ps.ps.core.effects import Evict
from torch_ps.ps.core.roster import Roster
from torch_ps.ps.observability.shard_metrics import Metrics
from torch_ps.ps.transport import limits
from torch_ps.ps.transport.sent_ahead import SentAhead


class Outbox(asyncio.Queue[Frame | PsError]):
    """Frames that wait to be sent. An error in the outbox ends the stream.

    Attributes:
        most: Largest number of bytes that may wait. Beyond it the outbox drops its frames and ends the stream, as the
            peer does not read.
        bytes: Number of bytes that wait.
        on_put: Called after each put; None: the carrier waits in ``get``.
        error: The first error that was put.
    """

    def __init__(self) -> None:
        super().__init__()
        self.most = limits.WORKER_BYTES
        self.bytes = 0
        self.on_put: Callable[[], None] | None = None
        self.error: PsError | None = None
        self._full = False

    def _init(self, maxsize: int) -> None:
        self._queue = deque[Frame | PsError]()

    def _put(self, item: Frame | PsError) -> None:
        if self._full:
            return
        self.bytes += 0 if isinstance(item, PsError) else len(item)
        if self.bytes > self.most:
            item = Overloaded(f"{self.bytes} bytes of answers wait and are not read; the stream ends")
            self._queue.clear()
            self.bytes, self._full = 0, True
        if isinstance(item, PsError):
            self.error = self.error or item
        self._queue.append(item)
        if self.on_put is not None:
            self.on_put()

    def _get(self) -> Frame | PsError:
        item = self._queue.popleft()
        self.bytes -= 0 if isinstance(item, PsError) else len(item)
        return item


class RosterQueue(asyncio.Queue[Roster | None]):
    """Rosters that wait for one watcher; None: the shard stops. A watcher that does not read loses the oldest."""

    def _init(self, maxsize: int) -> None:
        self._queue: deque[Roster | None] = deque(maxlen=limits.MAX_ROSTERS)


@dataclass(eq=False)
class Stream:
    """One open Exchange.

    Attributes:
        worker: Name of the worker; None: an observer, which may only pull.
        session: Session of the worker; for an observer a number that this shard chose.
        codec: Codec of the responses.
        outbox: Frames to send.
        copies: The worker's values, if its codec is lossy and sends differences.
        sent_ahead: Gradients that no push has named yet, and pushes that wait for theirs.
        renew_at: Time on ``time.monotonic()`` from which the next message renews the worker's lease.
        bytes_pushed, bytes_pulled: Payload bytes so far.
        samples: Sum of the weights of the pushes of the shard's first bucket.
        staleness: Staleness of the last applied one of them, in versions; None: none was applied.
        pulls: An observer's pulls whose responses have not left.
        carrier: Kind of its carrier, for people.
        carrier_reason: Reason of the worker why it uses no faster carrier; empty if there is none.
        by_reference: Whether responses may leave from where the parameters are.
    """

    worker: str | None
    session: int
    codec: Codec
    outbox: Outbox = field(default_factory=Outbox)
    copies: Copies = field(default_factory=Copies)
    sent_ahead: SentAhead = field(default_factory=SentAhead)
    bytes_pushed: int = 0
    bytes_pulled: int = 0
    samples: float = 0.0
    staleness: int | None = None
    pulls: int = 0
    renew_at: float = -math.inf
    carrier: str = ""
    carrier_reason: str = ""
    by_reference: bool = False
    _sent: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def crowded(self) -> bool:
        """Whether an observer must read responses before its next message is read. The outbox bounds a worker."""
        return self.pulls >= limits.OBSERVER_PULLS

    async def until_room(self) -> None:
        """Wait until the stream is not crowded."""
        while self.crowded:
            self._sent.clear()
            await self._sent.wait()

    def note_pull(self) -> None:
        """Count a pull that was accepted."""
        self.pulls += self.worker is None

    def note_sent(self, num_frames: int) -> None:
        """Count frames that have left."""
        if self.worker is None:
            self.pulls -= num_frames
            self._sent.set()


class Streams:
    """The open streams of one shard, by worker and session.

    Args:
        metrics: Metrics of the shard.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._streams: dict[tuple[str | None, int], Stream] = {}
        self._metrics = metrics

    def __iter__(self) -> Iterator[Stream]:
        return iter(tuple(self._streams.values()))

    def get(self, worker: str | None, session: int) -> Stream | None:
        """The stream of a session; None: it has none."""
        return self._streams.get((worker, session))

    def connected(self, worker: str) -> bool:
        """Whether any session of this worker has a stream."""
        return any(name == worker for name, _ in self._streams)

    def add(self, stream: Stream) -> None:
        """Register a stream. An older stream of the same session is closed: its worker has reconnected."""
        before = self._streams.get((stream.worker, stream.session))
        if before is not None:
            before.outbox.put_nowait(UnknownWorker(f"worker {stream.worker!r} has opened a newer stream"))
        self._streams[stream.worker, stream.session] = stream
        self._metrics.connected.set(len(self._streams))

    def remove(self, stream: Stream) -> bool:
        """Unregister a stream; returns False if it is not registered (any more)."""
        if self._streams.get((stream.worker, stream.session)) is not stream:
            return False
        del self._streams[stream.worker, stream.session]
        self._metrics.connected.set(len(self._streams))
        return True

    def evict(self, evict: Evict) -> None:
        """Close the stream of a session that has left the roster."""
        stream = self._streams.get((evict.worker, evict.session))
        if stream is not None:
            stream.outbox.put_nowait(UnknownWorker(evict.reason))

    def close(self, error: PsError) -> None:
        """Close every stream with ``error``."""
        for stream in self:
            stream.outbox.put_nowait(error)
