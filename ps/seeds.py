"""The first parameters of one shard, as a worker sends them: bucket by bucket, until none is missing."""

import logging
from collections.abc import Sequence

from torch_ps.common import codecs
from torch_ps.common.errors import CorruptFrame
from torch_ps.common.plan import Bucket
from torch_ps.ps.engine import Engine

log = logging.getLogger("torch_ps.ps")


class Seeds:
    """One try of one worker to seed ``buckets``, those of shard ``index``."""

    def __init__(self, engine: Engine, buckets: Sequence[Bucket], index: int) -> None:
        self._engine, self._index = engine, index
        self._buckets = {bucket.index: bucket for bucket in buckets}
        self._missing = set(self._buckets)

    def take(self, bucket: int, payload: memoryview) -> None:
        """Take the fp32 parameters of one bucket.

        Raises:
            CorruptFrame: no such bucket here, or not its size.
        """
        if bucket not in self._buckets:
            raise CorruptFrame(f"bucket {bucket} is not one of shard {self._index}")
        plain = codecs.codec("none")
        plain.check(payload, self._buckets[bucket].numel)
        self._engine.store.load(bucket, plain, payload)
        self._missing.discard(bucket)

    def end(self, worker: str) -> None:
        """All buckets have come.

        Raises:
            CorruptFrame: some have not.
        """
        if self._missing:
            raise CorruptFrame(f"worker {worker!r} left out {len(self._missing)} buckets of shard {self._index}")
        log.info(
            "parameters of worker %s are here: %d in %d buckets on this shard; optimizer %s",
            worker,
            sum(bucket.numel for bucket in self._buckets.values()),
            len(self._buckets),
            self._engine.model.optimizer,
        )
