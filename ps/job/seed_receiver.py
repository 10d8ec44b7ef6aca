"""Receives the first parameters of one shard from the worker that the lead has told to send them.

    Seed --begin--> SeedStream --take, bucket by bucket--> end: the parameters are there
                               --the stream breaks-------> dropped; the worker may begin again

Rules of this file
  1. Only the member that the roster marks as the seeder is heard, on every shard. What it has sent whole counts once: a
     repeat, after an answer that was lost, changes nothing. The model is the one with which it has joined.
  2. Another worker's parameters take the place of those of a seeder that has left before the job could begin.
  3. A stream that another one has taken the place of holds no memory, also where its worker neither sends nor ends it.
"""

import gc
import logging

from torch_ps.common import codecs
from torch_ps.common.errors import CorruptFrame, ProtocolError
from torch_ps.common.schema import Model
from torch_ps.ps.core.roster import SessionKey
from torch_ps.ps.engine.engine import Engine
from torch_ps.ps.job.job import Job
from torch_ps.ps.job.seeding import check_seeded

log = logging.getLogger("torch_ps.ps")


class SeedStream:
    """One call of Seed, on the event loop.

    Args:
        engine: Engine that the parameters go into; None for a repeat, of which nothing is kept.
    """

    def __init__(self, job: Job, key: SessionKey, engine: Engine | None) -> None:
        self.key, self.engine = key, engine
        self._job, self._plain = job, codecs.codec("none")
        self._buckets = {bucket.index: bucket for bucket in engine.buckets} if engine is not None else {}
        self._missing = set(self._buckets)
        self._replaced = False

    def replace(self) -> None:
        """Another stream takes its place: let go of the memory of the parameters."""
        self.engine, self._replaced = None, True

    def check(self) -> None:
        """Refuse what comes on a stream that another one has taken the place of.

        Raises:
            ProtocolError: The worker has begun to send its parameters on another stream.
        """
        if self._replaced or (self.engine is not None and self.engine is not self._job.engine):
            raise ProtocolError(f"worker {self.key[0]!r} sends the parameters on another stream now")

    @property
    def missing(self) -> int:
        """Number of buckets that have not come."""
        return len(self._missing)

    def take(self, bucket: int, payload: memoryview) -> None:
        """Take the fp32 parameters of one bucket.

        Raises:
            CorruptFrame: The bucket is not of this shard, came before, or the payload has not its size.
            ProtocolError: The worker has begun to send its parameters on another stream.
        """
        self.check()
        if self.engine is None:
            return
        if bucket not in self._missing:
            what = "came twice" if bucket in self._buckets else f"is not one of shard {self._job.settings.index}"
            raise CorruptFrame(f"bucket {bucket} of the parameters of worker {self.key[0]!r} {what}")
        self._plain.check(payload, self._buckets[bucket].numel)
        self.engine.store.load(bucket, self._plain, payload)
        self._missing.discard(bucket)


class SeedReceiver:
    """Fills the engine of one shard. All methods run on the event loop."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._sent: SessionKey = ("", 0)  # who has sent all parameters of this shard
        self._stream: SeedStream | None = None  # the last one that was begun, if it has not ended

    async def begin(self, worker: str, session: int, secret: bytes, model: Model) -> SeedStream:
        """Build the engine that the parameters of this shard go into.

        Raises:
            UnknownWorker: The worker is not in the roster, or the secret is not its own.
            ProtocolError: The lead has not told this worker to send them.
            ModelMismatch: It is not the model with which the worker has joined.
        """
        job, key = self._job, (worker, session)
        await job.until_member(worker, session, secret)
        if key == self._sent:
            return SeedStream(job, key, None)
        if job.engine is not None and job.engine.core.begun:
            raise ProtocolError(f"worker {worker!r} cannot seed shard {job.settings.index}: training has begun")
        member = job.roster.member(worker)
        if member is None or not member.seeds or (job.membership is not None and job.seeding.initialised):
            raise ProtocolError(f"worker {worker!r} was not told to send the parameters of shard {job.settings.index}")
        check_seeded(member, model, f"shard {job.settings.index}")
        if self._stream is not None:
            self._stream.replace()
        job.seeding.begin()
        again, engine = job.engine is not None, job.begin(model)
        if again:
            gc.collect()  # the engine before, whose parts know each other
        engine.set_roster(job.roster)
        self._stream = SeedStream(job, key, engine)
        return self._stream

    def end(self, stream: SeedStream) -> None:
        """Finish, after the last bucket.

        Raises:
            CorruptFrame: Buckets are missing.
            ProtocolError: The worker has begun to send its parameters on another stream.
        """
        stream.check()
        engine, (worker, _), index = stream.engine, stream.key, self._job.settings.index
        if engine is None:
            return
        if stream.missing:
            raise CorruptFrame(f"worker {worker!r} left out {stream.missing} buckets of shard {index}")
        log.info(
            "received the parameters from worker %s: %d in %d buckets on this shard; optimizer %s",
            worker,
            sum(bucket.numel for bucket in engine.buckets),
            len(engine.buckets),
            engine.model.optimizer,
        )
        self._sent, self._stream = stream.key, None
        self._job.finish_seeding()
