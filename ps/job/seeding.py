"""The first parameters of one shard, as a worker sends them: bucket by bucket, until none is missing."""

import logging

from torch_ps.common import codecs
from torch_ps.common.errors import CorruptFrame, ProtocolError
from torch_ps.common.plan import Bucket
from torch_ps.common.schema import Model
from torch_ps.ps.engine.engine import Engine
from torch_ps.ps.job.job import Job

log = logging.getLogger("torch_ps.ps")


class Seeding:
    """How one shard gets its first parameters. All methods run on the event loop."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._engine: Engine | None = None  # while a worker sends them
        self._buckets: dict[int, Bucket] = {}
        self._missing: set[int] = set()

    async def begin(self, worker: str, session: int, model: Model) -> None:
        """Get ready for the parameters of this shard.

        Raises:
            UnknownWorker: the worker is not in the roster.
            ProtocolError: training has begun, or another worker seeds.
        """
        job = self._job
        await job.until_member(worker, session)
        if job.engine is not None and job.engine.core.begun:
            raise ProtocolError(f"worker {worker!r} cannot seed shard {job.index}: training has begun")
        if job.membership is not None and (job.initialised or (worker, session) != job.seeder):
            raise ProtocolError(f"worker {worker!r} was not asked to seed the parameters")
        job.initialised = False
        self._engine = job.begin(model)
        self._engine.set_roster(job.roster)
        self._buckets = {bucket.index: bucket for bucket in self._engine.buckets}
        self._missing = set(self._buckets)

    def take(self, bucket: int, payload: memoryview) -> None:
        """Take the fp32 parameters of one bucket.

        Raises:
            CorruptFrame: no such bucket here, or not its size.
        """
        if self._engine is None:
            raise CorruptFrame(f"bucket {bucket} comes to shard {self._job.index} before the model that it is of")
        if bucket not in self._buckets:
            raise CorruptFrame(f"bucket {bucket} is not one of shard {self._job.index}")
        plain = codecs.codec("none")
        plain.check(payload, self._buckets[bucket].numel)
        self._engine.store.load(bucket, plain, payload)
        self._missing.discard(bucket)

    def end(self, worker: str) -> None:
        """All buckets of this shard have come.

        Raises:
            CorruptFrame: some have not.
        """
        engine = self._engine
        if engine is None:
            raise CorruptFrame(f"worker {worker!r} has sent nothing to shard {self._job.index}")
        if self._missing:
            raise CorruptFrame(f"worker {worker!r} left out {len(self._missing)} buckets of shard {self._job.index}")
        log.info(
            "parameters of worker %s are here: %d in %d buckets on this shard; optimizer %s",
            worker,
            sum(bucket.numel for bucket in engine.buckets),
            len(engine.buckets),
            engine.model.optimizer,
        )
        self._engine = None
        self._job.seeded()
