"""The open Exchange streams of one shard, by worker and session."""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch_ps.common.codecs import Codec
from torch_ps.common.codecs.copies import Copies
from torch_ps.common.errors import PsError, UnknownWorker
from torch_ps.ps.core.effects import Evict
from torch_ps.ps.metrics import Metrics


@dataclass(eq=False)
class Stream:
    """One open Exchange: what it takes to answer it.

    ``worker`` is None for an observer, whose ``session`` is a number of this shard's own. ``outbox`` holds frames to
    send; an error in it ends the stream. ``copies`` is what the worker has, if its codec is coarse.
    """

    worker: str | None
    session: int
    codec: Codec
    outbox: asyncio.Queue[bytes | PsError] = field(default_factory=asyncio.Queue)
    copies: Copies = field(default_factory=Copies)
    bytes_pushed: int = 0
    bytes_pulled: int = 0


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
