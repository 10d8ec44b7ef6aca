"""The open Exchange streams of one shard, by worker and session."""

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from torch_ps.common.codecs import Codec
from torch_ps.common.codecs.pulled_copies import Copies
from torch_ps.common.errors import Overloaded, PsError, UnknownWorker
from torch_ps.ps.core.effects import Evict
from torch_ps.ps.core.roster import Roster
from torch_ps.ps.observability.metrics import Metrics
from torch_ps.ps.transport import limits


class Outbox(asyncio.Queue[bytes | PsError]):
    """Frames that wait to be sent; an error in it ends the stream.

    Attributes:
        most: bytes that may wait. With more the peer does not read: the frames are dropped and the stream ends.
        on_put: called when something has been put in; None: somebody waits in ``get``.
    """

    _queue: deque[bytes | PsError]

    def __init__(self) -> None:
        super().__init__()
        self.most = limits.WORKER_BYTES
        self.bytes = 0
        self.on_put: Callable[[], None] | None = None
        self._full = False

    def _put(self, item: bytes | PsError) -> None:
        if self._full:
            return
        self.bytes += 0 if isinstance(item, PsError) else len(item)
        if self.bytes > self.most:
            item = Overloaded(f"{self.bytes} bytes of answers wait and are not read; the stream ends")
            self._queue.clear()
            self.bytes, self._full = 0, True
        self._queue.append(item)
        if self.on_put is not None:
            self.on_put()

    def _get(self) -> bytes | PsError:
        item = self._queue.popleft()
        self.bytes -= 0 if isinstance(item, PsError) else len(item)
        return item


class Watch(asyncio.Queue[Roster | None]):
    """Rosters that wait for one watcher, None: the shard stops. One that does not read misses the oldest of them."""

    def _init(self, maxsize: int) -> None:
        self._queue: deque[Roster | None] = deque(maxlen=limits.MAX_ROSTERS)


@dataclass(eq=False)
class Stream:
    """One open Exchange: what it takes to answer it.

    ``worker`` is None for an observer, whose ``session`` is a number of this shard's own. ``outbox`` holds frames to
    send; an error in it ends the stream. ``copies`` is what the worker has, if its codec is coarse.
    """

    worker: str | None
    session: int
    codec: Codec
    outbox: Outbox = field(default_factory=Outbox)
    copies: Copies = field(default_factory=Copies)
    bytes_pushed: int = 0
    bytes_pulled: int = 0
    samples: float = 0.0  # weights of pushes of the shard's first bucket
    staleness: int | None = None  # of the last of them that was applied
    pulls: int = 0  # of an observer, not answered yet
    answered: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def crowded(self) -> bool:
        """Whether an observer has to read before its next message is taken. A worker is bounded by its outbox."""
        return self.pulls >= limits.OBSERVER_PULLS

    async def room(self) -> None:
        """Wait until it is not crowded."""
        while self.crowded:
            self.answered.clear()
            await self.answered.wait()

    def pulled(self) -> None:
        """A pull was taken."""
        self.pulls += self.worker is None

    def wrote(self, num_frames: int) -> None:
        """So many frames have left."""
        if self.worker is None:
            self.pulls -= num_frames
            self.answered.set()


class Streams:
    def __init__(self, metrics: Metrics) -> None:
        self._streams: dict[tuple[str | None, int], Stream] = {}
        self._metrics = metrics

    def __iter__(self) -> Iterator[Stream]:
        return iter(tuple(self._streams.values()))

    def get(self, worker: str | None, session: int) -> Stream | None:
        return self._streams.get((worker, session))

    def connected(self, worker: str) -> bool:
        return any(name == worker for name, _ in self._streams)

    def add(self, stream: Stream) -> None:
        """Register a stream; one that the same session had before is closed, for its worker has reconnected."""
        before = self._streams.get((stream.worker, stream.session))
        if before is not None:
            before.outbox.put_nowait(UnknownWorker(f"worker {stream.worker!r} has opened a newer stream"))
        self._streams[stream.worker, stream.session] = stream
        self._metrics.connected.set(len(self._streams))

    def remove(self, stream: Stream) -> bool:
        """Forget a stream; False if it was not (or no longer) registered."""
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
