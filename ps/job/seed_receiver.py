"""Receives the first parameters of one shard from a worker: bucket by bucket, until none is missing."""

import logging

from torch_ps.common import codecs
from torch_ps.common.errors import CorruptFrame, ProtocolError
from torch_ps.common.plan import Bucket
from torch_ps.common.schema import Model
from torch_ps.ps.engine.engine import Engine
from torch_ps.ps.job.job import Job

log = logging.getLogger("torch_ps.ps")


class SeedReceiver:
    """Fills the engine of one shard. All methods run on the event loop."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._engine: Engine | None = None  # while a worker sends its parameters
        self._buckets: dict[int, Bucket] = {}
        self._missing: set[int] = set()

    async def begin(self, worker: str, session: int, secret: bytes, model: Model) -> None:
        """Build the engine that the parameters of this shard go into.

        Raises:
            UnknownWorker: The worker is not in the roster.
            ProtocolError: Training has begun, or another worker seeds.
        """
        job = self._job
        await job.until_member(worker, session, secret)
        if job.engine is not None and job.engine.core.begun:
            raise ProtocolError(f"worker {worker!r} cannot seed shard {job.settings.index}: training has begun")
        if job.membership is not None and (job.seeding.initialised or (worker, session) != job.seeding.seeder):
            raise ProtocolError(f"worker {worker!r} was not asked to seed the parameters")
        job.seeding.begin()
        self._engine = job.begin(model)
        self._engine.set_roster(job.roster)
        self._buckets = {bucket.index: bucket for bucket in self._engine.buckets}
        self._missing = set(self._buckets)

    def take(self, bucket: int, payload: memoryview) -> None:
        """Take the fp32 parameters of one bucket.

        Raises:
            CorruptFrame: The bucket is not of this shard, or the payload has not its size.
        """
        if self._engine is None:
            raise CorruptFrame(
                f"bucket {bucket} comes to shard {self._job.settings.index} before the model that it is of"
            )
        if bucket not in self._buckets:
            raise CorruptFrame(f"bucket {bucket} is not one of shard {self._job.settings.index}")
        plain = codecs.codec("none")
        plain.check(payload, self._buckets[bucket].numel)
        self._engine.store.load(bucket, plain, payload)
        self._missing.discard(bucket)

    def end(self, worker: str) -> None:
        """Finish, after the last bucket.

        Raises:
            CorruptFrame: Buckets are missing.
        """
        engine = self._engine
        if engine is None:
            raise CorruptFrame(f"worker {worker!r} has sent nothing to shard {self._job.settings.index}")
        if self._missing:
            raise CorruptFrame(
                f"worker {worker!r} left out {len(self._missing)} buckets of shard {self._job.settings.index}"
            )
        log.info(
            "received the parameters from worker %s: %d in %d buckets on this shard; optimizer %s",
            worker,
            sum(bucket.numel for bucket in engine.buckets),
            len(engine.buckets),
            engine.model.optimizer,
        )
        self._engine = None
        self._job.finish_seeding()
