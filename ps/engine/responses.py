"""What goes back to workers: the parameters of one bucket as a frame, encoded once for all who get the same.

    Release, Stream --frame()--> where the parameters are: in the frame, in shared memory, or what a copy lacks

Rules of this file
  1. Runs on the bucket's lane, so the parameters are those of the version that the core has named.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from torch_ps.common import codecs
from torch_ps.common.codecs import Codec
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.plan import Bucket
from torch_ps.common.wire.frames import pack
from torch_ps.ps.core.effects import Release
from torch_ps.ps.engine.delay_compensation import Compensator
from torch_ps.ps.engine.parameter_store import Store
from torch_ps.ps.engine.shared_memory import Arenas
from torch_ps.ps.transport.streams import Stream

#: By header: the frame and the bytes of its payload, since the last step.
Shared = dict[bytes, tuple[bytes, int]]


@dataclass(slots=True)
class Answer:
    """One answer in its bucket's lane."""

    release: Release
    stream: Stream


class Answers:
    """Of one shard.

    Args:
        first: its first bucket, whose answers name the contributors.
        epoch: gives the newest roster epoch that the shard knows.
    """

    def __init__(
        self, store: Store, arenas: Arenas, compensator: Compensator | None, *, first: int, epoch: Callable[[], int]
    ) -> None:
        self._store, self._arenas, self._compensator = store, arenas, compensator
        self._first, self._epoch = first, epoch

    def frame(self, bucket: Bucket, answer: Answer, shared: Shared) -> tuple[bytes, int]:
        """The frame of one answer, and the bytes of its payload. Workers with the same answer share one."""
        store, stream, release = self._store, answer.stream, answer.release
        codec = codecs.codec("none") if bucket.rule == "mean" else stream.codec
        place = pb.FRAME
        if codec.name == "none":
            place = self._arenas.place(release, bucket.index, store.host)
        lacks = store.encode_lacking(bucket.index, codec, stream.copies, release.version)
        if lacks is not None:
            if (whole := stream.copies.lost(bucket.index)) is not None:
                codec, lacks = codecs.codec("none"), codecs.codec("none").encode(whole)
            header = self._header(bucket, release, codec, delta=whole is None)
            frame, size = pack(header, lacks), sum(map(len, lacks))
        else:
            codec = codecs.codec("none") if codec.coarse else codec
            header = self._header(bucket, release, codec, place=place)
            key = header.SerializeToString()
            if key not in shared:
                parts = store.encode(bucket.index, codec) if place == pb.FRAME else ()
                shared[key] = pack(header, parts), sum(map(len, parts)) or 4 * bucket.numel
            frame, size = shared[key]
        if self._compensator is not None:
            self._note_pulled(self._compensator, bucket, answer, codec, memoryview(frame)[len(frame) - size :])
        return frame, size

    def _header(self, bucket: Bucket, release: Release, codec: Codec, **where: Any) -> pb.DownHeader:
        return pb.DownHeader(
            bucket=bucket.index,
            version=release.version,
            next_step=release.next_step,
            step=release.step,
            staleness=release.staleness,
            applied=release.applied,
            samples=release.samples,
            codec=codec.name,
            **where,
            epoch=self._epoch(),
            contributor=release.contributors if bucket.index == self._first else (),
        )

    def _note_pulled(
        self, compensator: Compensator, bucket: Bucket, answer: Answer, codec: Codec, payload: memoryview
    ) -> None:
        """Tell the compensator what this worker has now: what it decodes, not what was encoded."""
        stream, version = answer.stream, answer.release.version
        if stream.worker is None or bucket.rule != "optimizer":
            return
        values = stream.copies.get(bucket.index) if stream.codec.coarse else None
        if values is None and codec.name == "none":
            values = self._store.values(bucket.index)
        elif values is None:
            values = codec.decode(payload, torch.empty(bucket.numel))
        compensator.pulled(bucket.index, stream.worker, stream.session, version, values.to(self._store.device))
