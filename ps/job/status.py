"""The state of a shard in numbers, for ``ps-status``, the message of a worker's timeout and ``/metrics``."""

import os
import time
from pathlib import Path

from torch_ps.common import version
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.wire.ballots import configuration_to_proto
from torch_ps.ps.core.failover.seat import Seat
from torch_ps.ps.core.roster import Member, Roster
from torch_ps.ps.core.shard import MemberView
from torch_ps.ps.engine.shard_state import CheckpointFacts
from torch_ps.ps.job.job import Job
from torch_ps.ps.job.replication_status import ReplicationStatus
from torch_ps.ps.job.seat_driver import SeatDriver

#: Bytes of the workers in one reply. A message of gRPC has room for them and the rest, whatever names the workers have.
MAX_WORKER_BYTES = 4 << 20


class StatusReporter:
    """Reads the figures of one shard. All methods run on the event loop.

    Args:
        checkpoints: Facts about the checkpoints; None where none are written.
    """

    def __init__(
        self, job: Job, driver: SeatDriver, replication: ReplicationStatus, checkpoints: CheckpointFacts | None
    ) -> None:
        self._job, self._driver, self._checkpoints = job, driver, checkpoints
        self.replication = replication

    @property
    def seat(self) -> Seat:
        """The seat of this server."""
        return self._driver.seat

    def reply(self, now: float) -> pb.StatusReply:
        """The figures at ``now``, a time on ``time.monotonic()``. Cost: O(workers x buckets); no tensor is read."""
        job, settings = self._job, self._job.settings
        reply = pb.StatusReply(
            shard=settings.index,
            num_shards=settings.num_shards,
            mode=settings.mode.name,
            mode_details=str(settings.mode),
            initialised=job.seeding.initialised,
            epoch=job.roster.epoch,
            open=job.roster.open,
            uptime_seconds=now - job.started,
            advice=job.advice.sentences,
            software=version.current(),
        )
        if job.membership is not None:
            reply.joins = job.membership.num_joins
        if (kept := self._checkpoints) is not None:
            reply.checkpoint.version, reply.checkpoint.folder = kept.version, kept.url
            reply.checkpoint.age_seconds = now - kept.written if kept.written else 0.0
            reply.checkpoint.failures, reply.checkpoint.error = kept.failures, kept.error
        seat = self.seat
        if seat.configuration.term.number or self.replication.closed:
            standby = reply.standby
            standby.role = seat.role.value
            standby.configuration.CopyFrom(configuration_to_proto(seat.configuration))
            standby.version, standby.complete = self.replication.progress()
            standby.lag_records, standby.lag_seconds = self.replication.lag()
        engine = job.engine
        if engine is not None:
            reply.version = engine.core.open_step
            reply.num_buckets = len(engine.core.versions)
            reply.num_parameters = engine.num_parameters
            reply.staleness.update(engine.staleness)
            reply.late, reply.nonfinite = engine.late, engine.nonfinite
            reply.samples = engine.core.samples
            reply.load.queued, reply.load.apply_seconds = engine.queued, engine.busy_seconds
            reply.load.bytes_pushed, reply.load.bytes_pulled = engine.bytes_pushed, engine.bytes_pulled
        reply.load.apply_threads, reply.load.cpu_seconds = settings.apply_threads, time.process_time()
        reply.load.memory_bytes = resident_bytes()
        self._add_workers(reply, now)
        return reply

    def _add_workers(self, reply: pb.StatusReply, now: float) -> None:
        """Add the workers in rank order, as many as ``MAX_WORKER_BYTES`` have room for; others are counted."""
        members, room = self._job.roster.members, MAX_WORKER_BYTES
        views = {view.worker: view for view in self._job.engine.core.status().workers} if self._job.engine else {}
        for rank, member in enumerate(members):
            worker = self._worker(rank, member, views.get(member.name), now)
            room -= worker.ByteSize()
            if room < 0:
                reply.more_workers = len(members) - rank
                return
            reply.worker.append(worker)

    def _worker(self, rank: int, member: Member, view: MemberView | None, now: float) -> pb.WorkerStatus:
        job = self._job
        worker = pb.WorkerStatus(worker=member.name, session=member.session, rank=rank)
        stream = job.streams.get(member.name, member.session)
        if stream is not None:
            worker.connected = True
            worker.bytes_pushed, worker.bytes_pulled = stream.bytes_pushed, stream.bytes_pulled
            worker.samples = stream.samples
            worker.carrier, worker.carrier_reason = stream.carrier, stream.carrier_reason
            if stream.staleness is not None:
                worker.staleness = stream.staleness
        worker.shares_memory = job.engine is not None and job.engine.arenas.has(member.name, member.session)
        if job.membership is not None and job.membership.roster.member(member.name):
            worker.silent_seconds = job.membership.silent_for(member.name, now)
        if view is not None:
            worker.clock = view.clock
            wait = view.hold or job.sample_requests.waiting(member.name, member.session)
            if wait is not None:
                worker.waiting_seconds = max(now - wait.since, 1e-3)  # 0 says: does not wait
                worker.waiting_for.extend(
                    job.roster.rank_of(each) for each in wait.waiting_for if job.roster.member(each)
                )
                worker.reason = wait.reason
        return worker


def roster_view(roster: Roster) -> pb.RosterView:
    """The roster as WatchRoster sends it."""
    return pb.RosterView(
        epoch=roster.epoch,
        open=roster.open,
        member=[
            pb.RosterMember(
                worker=m.name,
                session=m.session,
                rank=m.rank,
                first_step=m.first_step,
                digest=m.digest,
                seeds=m.seeds,
            )
            for m in roster.members
        ],
        cut=roster.cut,
    )


def resident_bytes() -> int:
    """Resident memory of this process in bytes; 0 where the system does not say."""
    try:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    except OSError:
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
