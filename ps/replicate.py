"""A primary and its standby: what is decided here is known there before anybody hears of it.

    standby: Replicate --> model --> state of each bucket, in its lane's order --> complete
    lane:    step, answer ---+
    core:    roster, data ---+--> frames, numbered --> standby --received n--> answers, rosters up to n go out
    norms:   decided --------+

Rules of this file
  1. What is sent first is received first. Whatever discloses a change (an answer, a roster that takes effect, a norm)
     waits until the standby has said that it has all frames up to it.
  2. Nothing is sent, copied or kept while there is no standby.
  3. What waits here is bounded by what workers have under way, for they wait too: a slow standby slows the job down and
     does not fill the memory of its primary. A state is copied ``AT_A_TIME`` buckets at a time.

Source: primary-backup replication, Alsberg and Day, ICSE 1976; as records of a log, VMware FT, Scales et al., 2010.
"""

import asyncio
import functools
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from torch_ps.common.errors import PsError, Refused
from torch_ps.common.frames import pack
from torch_ps.common.optim import Hyper
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.plan import Bucket
from torch_ps.common.schema import to_proto
from torch_ps.ps import records
from torch_ps.ps.answers import Answer
from torch_ps.ps.core.effects import Apply, Group
from torch_ps.ps.core.roster import Roster
from torch_ps.ps.engine import Engine, Turn
from torch_ps.ps.job import Job
from torch_ps.ps.state import tensors_of

log = logging.getLogger("torch_ps.ps")

#: Buckets whose state is copied and not yet with the standby.
AT_A_TIME = 4


@dataclass(frozen=True, slots=True)
class _Waiting:
    """What is to be done when the standby has ``number`` frames; ``since`` is ``time.monotonic()``."""

    number: int
    since: float
    then: Callable[[], None]


class Follower:
    """One standby that is attached: frames to it, and how many of them it has."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.outbox: asyncio.Queue[bytes | PsError] = asyncio.Queue()
        self.sent = self.received = 0
        #: Buckets whose state has been copied; lanes read it.
        self.copied: set[int] = set()
        #: It has all, and what is acknowledged is acknowledged by both.
        self.complete = False

    def send(self, frames: Sequence[bytes]) -> None:
        for frame in frames:
            self.outbox.put_nowait(frame)
        self.sent += len(frames)


class Replication:
    """One shard's, as a primary. All methods but ``step`` and ``answered`` run on the event loop.

    Args:
        together: called when a standby has all; returns when nothing is acknowledged without it.
        alone: called when one is lost that had all; returns when this shard may acknowledge without it.
    """

    def __init__(
        self,
        job: Job,
        *,
        together: Callable[[Follower], Awaitable[None]],
        alone: Callable[[str], Awaitable[None]],
    ) -> None:
        self._job, self._together, self._alone = job, together, alone
        self._waiting: deque[_Waiting] = deque()
        self._held: asyncio.Task[None] | None = None  # until it is agreed that this shard goes on alone
        self.follower: Follower | None = None
        job.before_roster = self._roster
        job.clipping.before_answer = self._norm
        job.on_anew = self._anew

    # -------------------------------------------------------------- the standby

    async def attach(self, address: str) -> Follower:
        """Take a standby; ``fill`` makes it complete.

        Raises:
            Refused: there is one.
        """
        if self.follower is not None:
            raise Refused(f"shard {self._job.index} has a standby at {self.follower.address} already")
        if self._held is not None:
            raise Refused(f"shard {self._job.index} has lost its standby and does not go on without it yet; try again")
        self.follower = follower = Follower(address)
        log.info("a standby at %s follows", address)
        return follower

    async def fill(self, follower: Follower) -> None:
        """Send all that this shard is, and from then on what changes."""
        job = self._job
        await job.until_initialised()
        engine = job.engine
        if engine is None or self.follower is not follower:
            return
        follower.send([pack(pb.ReplicaHeader(model=to_proto(engine.model)))])
        follower.send([records.of_roster(self._handed(job.roster)), *self.data()])
        norms = job.clipping.norms
        if norms is not None:
            follower.send([records.of_norm(group, square) for group, square in norms.answers.items()])
        engine.recorder = self
        places, begin = asyncio.Semaphore(AT_A_TIME), time.monotonic()
        for number, bucket in enumerate(engine.buckets):
            await places.acquire()
            progress = engine.core.replicate(number)
            copy = functools.partial(self._copy, engine, follower, bucket, progress)
            engine.turn(bucket.index, Turn(copy, places.release))
        for _ in range(AT_A_TIME):
            await places.acquire()
        follower.send([pack(pb.ReplicaHeader(complete=pb.ReplicaComplete()))])
        follower.complete = True
        log.info("the standby at %s has all, after %.1f s", follower.address, time.monotonic() - begin)
        await self._together(follower)

    def received(self, follower: Follower, number: int) -> None:
        """It has so many frames."""
        follower.received = max(follower.received, min(number, follower.sent))
        self._release()

    def detach(self, follower: Follower, reason: str) -> None:
        """Its stream has ended."""
        if self.follower is not follower:
            return
        self.follower = None
        engine = self._job.engine
        if engine is not None:
            engine.core.replicate_none()
        if follower.complete:
            log.warning("the standby at %s is lost: %s; nothing is acknowledged for now", follower.address, reason)
            self._held = asyncio.create_task(self._go_alone(reason))
        else:
            log.info("the standby at %s has left before it had all: %s", follower.address, reason)
            self._free()

    async def _go_alone(self, reason: str) -> None:
        await self._alone(reason)
        self._held = None
        log.warning("shard %d goes on without a standby", self._job.index)
        self._free()

    def _free(self) -> None:
        """There is no standby any more that anything has to wait for."""
        while self._waiting:
            self._waiting.popleft().then()
        if self._job.engine is not None:
            self._job.engine.recorder = None

    def _anew(self) -> None:
        """The job begins again with other parameters: whoever follows has to begin again too."""
        if self.follower is not None:
            self.follower.outbox.put_nowait(Refused("the parameters are sent anew; attach again"))

    @property
    def lag(self) -> tuple[int, float]:
        """Frames that the standby has not said to have, and seconds that the oldest of them waits."""
        follower = self.follower
        records = follower.sent - follower.received if follower is not None else 0
        return records, time.monotonic() - self._waiting[0].since if self._waiting else 0.0

    # -------------------------------------------------------------- what it hears

    def _copy(self, engine: Engine, follower: Follower, bucket: Bucket, progress: Mapping[str, Any]) -> list[bytes]:
        """On the bucket's lane."""
        follower.copied.add(bucket.index)
        return records.of_state(bucket.index, tensors_of(engine, bucket, self._job.streams), progress)

    def step(self, bucket: Bucket, apply: Apply, mean: torch.Tensor | None, hyper: Hyper) -> list[bytes]:
        """On the bucket's lane: one optimizer step."""
        engine = self._job.engine
        if apply.progress is None or engine is None:
            return []
        frames = []
        if engine.compensator is not None and (squares := engine.compensator.squares(bucket.index)) is not None:
            frames.append(records.of_tensor(bucket.index, "squares", squares))
        job: Hyper = engine.model.groups[bucket.group].hyper if bucket.rule == "optimizer" else {}
        late, nonfinite = engine.late, engine.nonfinite
        step = records.of_step(bucket.index, apply, mean, hyper, job, late=late, nonfinite=nonfinite)
        return [*frames, step]

    def answered(self, bucket: Bucket, answer: Answer) -> list[bytes]:
        """On the bucket's lane: a worker with lossy pulls is about to be answered."""
        follower, stream = self.follower, answer.stream
        if not stream.codec.coarse or bucket.rule == "mean" or stream.worker is None:
            return []
        if follower is None or bucket.index not in follower.copied:
            return []
        whole = stream.copies.get(bucket.index) is None
        return [records.of_answer(bucket.index, stream.worker, stream.codec.name, whole=whole)]

    def data(self) -> list[bytes]:
        """Lead: which samples are whose."""
        engine = self._job.engine
        data = engine.core.data() if engine is not None else None
        return [] if data is None else [records.of_data(data)]

    def send(self, frames: Sequence[bytes], then: Callable[[], None]) -> None:
        """Send frames; ``then`` is called when the standby has all up to them."""
        if self.follower is not None:
            self.follower.send(frames)
            self._waiting.append(_Waiting(self.follower.sent, time.monotonic(), then))
            self._release()
        elif self._held is not None:
            self._waiting.append(_Waiting(0, time.monotonic(), then))
        else:
            then()

    def _release(self) -> None:
        follower = self.follower
        while follower is not None and self._waiting and self._waiting[0].number <= follower.received:
            self._waiting.popleft().then()

    def _roster(self, roster: Roster, then: Callable[[], None]) -> None:
        engine = self._job.engine
        if engine is None or engine.recorder is None:
            then()
        else:
            self.send([records.of_roster(self._handed(roster))], then)

    def _norm(self, group: Group, square: float | None, then: Callable[[], None]) -> None:
        engine = self._job.engine
        if engine is None or engine.recorder is None:
            then()
        else:
            self.send([records.of_norm(group, square)], then)

    def _handed(self, roster: Roster) -> dict[str, Any]:
        if self._job.membership is not None:
            return self._job.membership.hand_over()
        members = [[m.name, m.session, m.rank, m.first_step] for m in roster.members]
        return {"epoch": roster.epoch, "members": members, "open": roster.open}


async def write(follower: Follower, send: Callable[[bytes], Awaitable[None]]) -> None:
    """Send what is in the outbox, until an error is next.

    Raises:
        PsError: that one.
    """
    while True:
        item = await follower.outbox.get()
        if isinstance(item, PsError):
            raise item
        await send(item)


async def read(replication: Replication, follower: Follower, messages: AsyncIterator[bytes]) -> None:
    """Take what the standby says, until it ends the stream."""
    async for message in messages:
        up = pb.ReplicaUp.FromString(message)
        if up.HasField("received"):
            replication.received(follower, up.received)
