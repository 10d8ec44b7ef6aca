"""The primary's side of replication: logs changes to the standby, holds back what would disclose them before that.

    standby: Replicate --> model --> state of each bucket, in its lane's order --> complete
    lane:    step, answer ---+
    core:    roster, data ---+--> frames, numbered --> standby --received n--> answers, rosters up to n go out
    norms:   decided --------+

Rules of this file
  1. Frames arrive in the order in which they were sent. Whatever discloses a change (an answer, a roster that takes
     effect, a norm) waits until the standby has acknowledged all frames up to it.
  2. Nothing is sent, copied or held back while there is no standby.
  3. What waits here is bounded by the open calls of workers, which wait too: a slow standby slows the job down and does
     not fill the memory of its primary. A state is copied ``AT_A_TIME`` buckets at a time.

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

from torch_ps.common import version
from torch_ps.common.errors import ProtocolError, PsError, Refused, WaitTimeout
from torch_ps.common.optimizer_spec import Hyper
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.plan import Bucket
from torch_ps.common.schema import to_proto
from torch_ps.common.wire.ballots import address_of
from torch_ps.common.wire.frames import pack
from torch_ps.ps.core.effects import Apply, UpdateKey
from torch_ps.ps.core.failover.seat import ConfigChange, Role, Seat
from torch_ps.ps.core.roster import Roster, member_to_data
from torch_ps.ps.engine.bucket_jobs import Response, Turn
from torch_ps.ps.engine.engine import Engine
from torch_ps.ps.engine.parameter_store import Mean
from torch_ps.ps.engine.shard_state import tensors_of
from torch_ps.ps.engine.written_weights import Values
from torch_ps.ps.failover import records
from torch_ps.ps.failover.wait_alive import wait_alive
from torch_ps.ps.job.job import Job
from torch_ps.ps.job.lead_address import LeadAddress
from torch_ps.ps.job.listeners import JobListener
from torch_ps.ps.job.seat_driver import SeatDriver, SeatListener
from torch_ps.ps.observability.bug_reports import report_bug
from torch_ps.ps.observability.log_throttle import LogThrottle
from torch_ps.ps.transport.boundary import read_request

log = logging.getLogger("torch_ps.ps")

#: Buckets whose state is copied and not yet sent to the standby.
AT_A_TIME = 4


@dataclass(frozen=True, slots=True)
class _Waiting:
    """What to do when the standby has record ``number``; ``since`` is a time on ``time.monotonic()``."""

    number: int
    since: float
    then: Callable[[], None]


class Follower:
    """One standby that is attached: the frames to it, and how many of them it has.

    Args:
        server: Name of the standby.
        base: Number of the last record before its first frame.

    Attributes:
        received: Number of the last record that it has acknowledged.
        begun: It has been sent a model.
        copied: Indices of the buckets whose state has been copied; lanes read it.
        complete: It has the whole state, and the seat relies on it.
        broken: A frame could not be made; it gets no more.
    """

    def __init__(self, server: str, base: int) -> None:
        self.server, self._base = server, base
        self.outbox: asyncio.Queue[bytes | PsError] = asyncio.Queue()
        self.received = base
        self.begun = False
        self.copied: set[int] = set()
        self.complete = self.broken = False

    def number(self, frames: int) -> int:
        """Number of the last record after ``frames`` frames."""
        return self._base + frames

    @property
    def address(self) -> str:
        return address_of(self.server)


class Replication(JobListener, SeatListener):
    """The log of one primary. All methods but ``step`` and ``answered`` run on the event loop.

    Listens to the job and to the seat driver, and is the engine's ``Recorder`` while a standby follows.

    Args:
        lead: Where another shard than the lead finds it; None on the lead.
    """

    def __init__(self, job: Job, driver: SeatDriver, lead: LeadAddress | None) -> None:
        self._job, self._driver, self._lead = job, driver, lead
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[_Waiting] = deque()
        self._comings, self._goings = LogThrottle(), LogThrottle()  # a standby that cannot follow tries again for ever
        self.follower: Follower | None = None

    @property
    def _seat(self) -> Seat:
        return self._driver.seat

    # -------------------------------------------------------------- the standby

    async def serve(
        self, first: bytes, messages: AsyncIterator[bytes], send: Callable[[bytes], Awaitable[None]]
    ) -> None:
        """Serve one standby, from its hello to the end of its stream.

        Args:
            first: First message of the standby, its hello.
            messages: What it sends after that.
            send: Sends it one frame.

        Raises:
            Refused: There is another one, or the last one is lost and that is not settled yet.
        """
        hello = read_request(first, pb.ReplicaUp)
        version.check(f"the standby {hello.hello.server!r}", hello.hello.version, "its primary")
        follower = self._attach(hello.hello.server)
        work = [self._fill(follower), self._read(follower, messages), _write(follower, send)]
        tasks = [asyncio.create_task(each) for each in work]
        reason = "it has ended its stream"
        try:
            while not any(task.done() for task in tasks[1:]):
                await asyncio.wait([t for t in tasks if not t.done()], return_when=asyncio.FIRST_COMPLETED)
                for task in tasks:
                    if task.done():
                        task.result()
        except PsError as error:
            reason = str(error)
            raise
        finally:
            for task in tasks:
                task.cancel()
            self._detach(follower, reason)
            await asyncio.gather(*tasks, return_exceptions=True)  # so that nobody reads from the stream any more

    def _attach(self, server: str) -> Follower:
        index = self._job.settings.index
        if not server:
            raise ProtocolError("the first message of a standby has to say its name")
        if self.follower is not None:
            raise Refused(
                f"shard {index} has a standby at {self.follower.address} already and takes one at a time; this one "
                "waits for its place, so stop it if it is not meant as a spare"
            )
        if self._seat.role is not Role.ALONE:
            raise Refused(f"shard {index} has lost its standby, and whether it goes on alone is not settled; try again")
        self.follower = follower = Follower(server, self._seat.recorded)
        if self._comings.admit(time.monotonic()) is not None:
            log.info("a standby at %s follows", follower.address)
        return follower

    async def _fill(self, follower: Follower) -> None:
        """Send the whole state of this shard; its changes follow from then on."""
        job = self._job
        await job.seeding.until_initialised()
        engine = job.engine
        if engine is None:
            return
        engine.work.recorder, follower.begun = self, True
        norms = job.clipping.norms.answers if job.clipping.norms is not None else {}
        frames = [
            pack(pb.ReplicaHeader(model=to_proto(engine.model))),
            records.of_roster(self._handed(job.roster)),
            *self.data(whole=True),
            *(records.of_norm(group, square) for group, square in norms.items()),
        ]
        self.send(frames, lambda: None)
        places, begin = asyncio.Semaphore(AT_A_TIME), time.monotonic()
        for number, bucket in enumerate(engine.buckets):
            await places.acquire()
            progress = engine.core.replicate(number)
            copy = functools.partial(self._copy, engine, follower, bucket, progress)
            engine.turn(bucket.index, Turn(copy, places.release))
        has_all = asyncio.Event()
        for _ in range(AT_A_TIME):
            await places.acquire()
        end = pb.ReplicaComplete(number=self._seat.recorded + 1)
        self.send([pack(pb.ReplicaHeader(complete=end))], has_all.set)
        await has_all.wait()
        follower.complete = True
        log.info("the standby at %s has all, after %.1f s", follower.address, time.monotonic() - begin)
        self._driver.obey(self._seat.attach(follower.server))

    async def _read(self, follower: Follower, messages: AsyncIterator[bytes]) -> None:
        while message := await self._next(follower, messages):
            told = read_request(message, pb.ReplicaUp)
            if told.HasField("failed"):
                raise ProtocolError(f"it cannot follow: {told.failed}")
            follower.received = max(follower.received, follower.number(told.received))
            if follower.received > self._seat.recorded:
                raise ProtocolError(f"the standby says to have record {follower.received}; there is none yet")
            self._driver.obey(self._seat.receipt(follower.server, follower.received))
            self._release()

    async def _next(self, follower: Follower, messages: AsyncIterator[bytes]) -> bytes:
        try:
            return await wait_alive(anext(messages, b""), self._job.settings.lease)
        except TimeoutError:
            raise WaitTimeout(
                f"no sign of life of the standby at {follower.address} for {self._job.settings.lease:g} s (the lease)"
            ) from None

    def _detach(self, follower: Follower, reason: str) -> None:
        """Forget a standby whose stream has ended."""
        self.follower = None
        if self._job.engine is not None:
            self._job.engine.core.replicate_none()
        if self._seat.role is Role.ALONE:
            if (held_back := self._goings.admit(time.monotonic())) is not None:
                more = f" ({held_back} more times since the last line)" if held_back else ""
                log.info("the standby at %s has left before it had all: %s%s", follower.address, reason, more)
        else:
            log.warning("the standby at %s is lost: %s; asking the workers to go on alone", follower.address, reason)
        self._driver.obey(self._seat.lost(follower.server))
        self._release()

    def _release(self) -> None:
        """Release what no longer has to wait for the standby."""
        follower, safe = self.follower, self._seat.safe
        if follower is not None and not follower.complete:
            safe = min(safe, follower.received)  # nothing relies on it, but a slow one must not fill the memory
        while self._waiting and self._waiting[0].number <= safe:
            self._waiting.popleft().then()
        engine, seat = self._job.engine, self._seat
        if engine is None or seat.follows:
            return
        if seat.lapses:
            engine.work.recorder = self  # a primary alone may have to hold back later, too
        elif follower is None and seat.role is Role.ALONE and not self._waiting:
            engine.work.recorder = None

    def on_engine_built(self, engine: Engine) -> None:
        """Have a standby of the engine before attach again."""
        self._release()
        if self.follower is not None and self.follower.begun:
            self.follower.outbox.put_nowait(Refused("the parameters are sent anew; attach again"))

    def on_stop(self, error: PsError) -> None:
        if self.follower is not None:
            self.follower.outbox.put_nowait(error)

    def lag(self) -> tuple[int, float]:
        """Records that the standby has not acknowledged, and seconds that the oldest answer has waited for it."""
        follower = self.follower
        behind = self._seat.recorded - follower.received if follower is not None else 0
        return behind, time.monotonic() - self._waiting[0].since if self._waiting else 0.0

    # -------------------------------------------------------------- records

    def _copy(self, engine: Engine, follower: Follower, bucket: Bucket, progress: Mapping[str, Any]) -> list[bytes]:
        """On the bucket's lane."""
        follower.copied.add(bucket.index)
        return records.of_state(bucket.index, tensors_of(engine, bucket, self._job.streams), progress)

    def step(self, bucket: Bucket, apply: Apply, mean: Mean | None, hyper: Hyper, written: Values) -> list[bytes]:
        """On the bucket's lane: frames about one optimizer step."""
        engine = self._job.engine
        if apply.progress is None or engine is None or self.follower is None:
            return []
        frames = []
        if engine.compensator is not None and (squares := engine.compensator.squares(bucket.index)) is not None:
            frames.append(records.of_tensor(bucket.index, "squares", squares))
        if written:
            frames.append(records.of_written(bucket.index, written))
        job: Hyper = engine.model.groups[bucket.group].hyper if bucket.rule == "optimizer" else {}
        late, nonfinite = engine.late, engine.nonfinite
        step = records.of_step(bucket.index, apply, mean, hyper, job, sorted(written), late=late, nonfinite=nonfinite)
        return [*frames, step]

    def answered(self, bucket: Bucket, response: Response) -> list[bytes]:
        """On the bucket's lane, before an answer is encoded: frames where the copy of the worker matters later."""
        follower, stream, engine = self.follower, response.stream, self._job.engine
        matters = stream.codec.coarse or (engine is not None and engine.compensator is not None)
        if not matters or bucket.rule != "optimizer" or stream.worker is None:
            return []
        if follower is None or bucket.index not in follower.copied:
            return []
        whole = stream.codec.coarse and stream.copies.get(bucket.index) is None
        return [records.of_answer(bucket.index, stream.worker, stream.codec.name, whole=whole)]

    def data(self, *, whole: bool = False) -> list[bytes]:
        """Lead: a frame about which samples are whose, or about what has changed in that."""
        engine = self._job.engine
        data = engine.core.data(whole=whole) if engine is not None else None
        return [] if data is None else [records.of_data(data)]

    def fail(self, error: Exception) -> None:
        """On the bucket's lane: end the stream of the standby, which has not all of a step; nothing more is sent."""
        told, follower = report_bug("a record for the standby", error), self.follower
        if follower is not None:
            follower.broken = True
            self._loop.call_soon_threadsafe(follower.outbox.put_nowait, told)

    def send(self, frames: Sequence[bytes], then: Callable[[], None]) -> None:
        """Send frames; ``then`` is called when others may know of all up to them."""
        follower, now = self.follower, time.monotonic()
        if self._seat.follows:
            return  # another server serves: nothing is disclosed from here any more
        if follower is not None and not follower.broken:
            for frame in frames:
                follower.outbox.put_nowait(frame)
                self._record()
        elif self._seat.role is not Role.ALONE or self._seat.lapses:
            self._record()  # something may have changed without a frame
        self._waiting.append(_Waiting(self._seat.recorded, now, then))
        self._release()

    def _record(self) -> None:
        self._driver.obey(self._seat.record()[1])

    def on_acknowledge(self) -> None:
        self._release()

    def on_change(self, change: ConfigChange) -> None:
        if self.follower is not None:
            self.follower.outbox.put_nowait(records.of_change(change))

    def on_roster_decided(self, roster: Roster, take_effect: Callable[[], None]) -> None:
        def known() -> None:
            take_effect()
            self._driver.obey(self._seat.set_roster((m.name, m.session) for m in roster.members))

        if self._recording:
            self.send([records.of_roster(self._handed(roster))], known)
        else:
            known()

    def on_norm_decided(self, group: UpdateKey, square: float | None, answer: Callable[[], None]) -> None:
        if self._recording:
            self.send([records.of_norm(group, square)], answer)
        else:
            answer()

    @property
    def _recording(self) -> bool:
        return self._seat.lapses or (self._job.engine is not None and self._job.engine.work.recorder is not None)

    def _handed(self, roster: Roster) -> dict[str, Any]:
        job = self._job
        if job.membership is not None:
            return job.membership.hand_over() | {"shards": sorted(job.incarnation.digests.items())}
        told = {"epoch": roster.epoch, "members": [member_to_data(m) for m in roster.members], "open": roster.open}
        lead = {"lead": list(self._lead), "secret": self._lead.secret.hex()} if self._lead is not None else {}
        return told | {"cut": roster.cut} | lead


async def _write(follower: Follower, send: Callable[[bytes], Awaitable[None]]) -> None:
    """Send what is in the outbox, until an error comes out of it.

    Raises:
        PsError: That error.
    """
    while True:
        item = await follower.outbox.get()
        if isinstance(item, PsError):
            raise item
        await send(item)
