"""What ps-status shows: the numbers of a job, its workers and its shards, computed from the status of every shard.

    StatusReply of every shard --Poll--> JobView(workers: WorkerView, shards: ShardView) --> table or JSON
    error of a shard that does not answer --> MissingView

Rules of this file
  1. A rate is a difference between two polls divided by the server's own clock; it is None if there is no earlier poll
     or a counter was reset in between.
  2. A shard that does not answer is named; the others are shown. Where it is the lead, what only the lead knows is
     missing: silence of workers, samples, checkpoints.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch_ps.common import version
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.wire import ballots
from torch_ps.worker.transport.wait_reasons import describe_wait, format_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerView:
    """One worker. Times are seconds, sizes are bytes, rates are per second."""

    name: str
    rank: int
    connected: bool
    clock: int
    steps_per_second: float | None
    samples_per_second: float | None
    staleness: int | None
    pushed_bytes: int
    pulled_bytes: int
    pushed_bytes_per_second: float | None
    pulled_bytes_per_second: float | None
    plane: str
    silent_seconds: float
    waiting_seconds: float
    waits: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardView:
    """One shard. ``cores``: CPU seconds per second. ``busy``: share of time in which the apply threads work, 0 to 1."""

    shard: int
    shards: int
    address: str
    standby: str
    parameters: int
    buckets: int
    version: int
    versions_per_second: float | None
    staleness_mean: float
    staleness_max: int
    late: int
    not_finite: int
    queued: int
    cores: float | None
    busy: float | None
    memory_bytes: int
    pushed_bytes_per_second: float | None
    pulled_bytes_per_second: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class MissingView:
    """One shard that does not answer: where it was looked for, and what came instead."""

    shard: int
    addresses: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class JobView:
    """The whole job at one poll; the names of the fields are the keys of ``ps-status --json``.

    Attributes:
        job: name of the job; "" if it has none.
        more_workers: number of workers that the reply of the server had no room for.
    """

    job: str
    mode: str
    initialised: bool
    open: bool
    epoch: int
    uptime_seconds: float
    samples: float
    samples_per_second: float | None
    advice: tuple[str, ...]
    checkpoint: str
    workers: tuple[WorkerView, ...]
    more_workers: int
    shards: tuple[ShardView, ...]
    missing: tuple[MissingView, ...]

    def json(self) -> dict[str, Any]:
        return asdict(self)


class Poll:
    """The status of every shard at one moment.

    Args:
        addresses: address of the server that sent each reply.
        replies: status of each shard, shard 0 first; None where the shard does not answer. At least one answers.
        before: an earlier poll of the same job, for rates; None gives no rates.
        job: name of the job.
        missing: shards that do not answer.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        replies: Sequence[pb.StatusReply | None],
        before: "Poll | None" = None,
        *,
        job: str = "",
        missing: Sequence[MissingView] = (),
    ) -> None:
        self._job, self._missing = job, tuple(missing)
        self._addresses, self._replies = addresses, replies
        self._answers = [reply for reply in replies if reply is not None]
        self._before = before._replies if before is not None and len(before._replies) == len(replies) else None

    def view(self) -> JobView:
        lead = self._answers[0]  # or, where that one is missing, the next shard
        return JobView(
            job=self._job,
            mode=lead.mode_details or lead.mode,
            initialised=lead.initialised,
            open=lead.open,
            epoch=lead.epoch,
            uptime_seconds=lead.uptime_seconds,
            samples=lead.samples,
            samples_per_second=self._rate(0, lambda reply: reply.samples),
            advice=(
                *(advice for reply in self._answers for advice in (*reply.advice, *_version(reply))),
                *_slow(self._answers),
            ),
            checkpoint=_checkpoint(lead.checkpoint) if lead.HasField("checkpoint") else "",
            workers=tuple(self._worker(worker) for worker in lead.worker),
            more_workers=lead.more_workers,
            shards=tuple(self._shard(index, reply) for index, reply in enumerate(self._replies) if reply is not None),
            missing=self._missing,
        )

    def _worker(self, worker: pb.WorkerStatus) -> WorkerView:
        views = [w for reply in self._answers for w in reply.worker if w.worker == worker.worker]
        shards = [index for index, reply in enumerate(self._replies) if reply is not None]

        def total(count: Any) -> float | None:
            rates = [self._rate(shard, lambda reply: count(_view(reply, worker))) for shard in shards]
            return None if None in rates else sum(rate for rate in rates if rate is not None)

        return WorkerView(
            name=worker.worker,
            rank=worker.rank,
            connected=worker.connected,
            clock=worker.clock,
            steps_per_second=self._rate(0, lambda reply: _view(reply, worker).clock),
            samples_per_second=self._rate(0, lambda reply: _view(reply, worker).samples),
            staleness=worker.staleness if worker.HasField("staleness") else None,
            pushed_bytes=sum(view.bytes_pushed for view in views),
            pulled_bytes=sum(view.bytes_pulled for view in views),
            pushed_bytes_per_second=total(lambda view: view.bytes_pushed),
            pulled_bytes_per_second=total(lambda view: view.bytes_pulled),
            plane=_plane(views),
            silent_seconds=worker.silent_seconds,
            waiting_seconds=max((view.waiting_seconds for view in views), default=0.0),
            waits=describe_wait(worker.worker, self._answers),
        )

    def _shard(self, index: int, reply: pb.StatusReply) -> ShardView:
        load = reply.load
        count = sum(reply.staleness.values())
        busy = self._rate(index, lambda reply: reply.load.apply_seconds)
        return ShardView(
            shard=reply.shard,
            shards=reply.num_shards,
            address=self._addresses[index],
            standby=_standby(reply.standby),
            parameters=reply.num_parameters,
            buckets=reply.num_buckets,
            version=reply.version,
            versions_per_second=self._rate(index, lambda reply: reply.version),
            staleness_mean=sum(k * n for k, n in reply.staleness.items()) / count if count else 0.0,
            staleness_max=max(reply.staleness, default=0),
            late=reply.late,
            not_finite=reply.nonfinite,
            queued=load.queued,
            cores=self._rate(index, lambda reply: reply.load.cpu_seconds),
            busy=None if busy is None else busy / max(load.apply_threads, 1),
            memory_bytes=load.memory_bytes,
            pushed_bytes_per_second=self._rate(index, lambda reply: reply.load.bytes_pushed),
            pulled_bytes_per_second=self._rate(index, lambda reply: reply.load.bytes_pulled),
        )

    def _rate(self, shard: int, count: Any) -> float | None:
        """Growth per second of ``count(reply)`` of one shard since the poll before."""
        if self._before is None:
            return None
        now, then = self._replies[shard], self._before[shard]
        if now is None or then is None:
            return None
        seconds, grown = now.uptime_seconds - then.uptime_seconds, count(now) - count(then)
        return float(grown / seconds) if seconds > 0 and grown >= 0 else None


def _view(reply: pb.StatusReply, worker: pb.WorkerStatus) -> pb.WorkerStatus:
    """Status of a worker at one shard, all zero if that shard does not know this session of it."""
    found = (each for each in reply.worker if (each.worker, each.session) == (worker.worker, worker.session))
    return next(found, pb.WorkerStatus())


def _version(reply: pb.StatusReply) -> Iterator[str]:
    """What is wrong with the version of a server, as a sentence; nothing if it fits."""
    if wrong := version.mismatch(f"the server of shard {reply.shard}", reply.software, "this ps-status"):
        yield f"{wrong}; figures may be missing or wrong"


def _checkpoint(kept: pb.CheckpointStatus) -> str:
    """One line about the newest complete checkpoint and the last failure."""
    age = f", {format_seconds(kept.age_seconds)} ago" if kept.age_seconds else ""
    good = f"version {kept.version}{age}" if kept.version else "none yet"
    failed = f"; {kept.failures} failed, the last: {kept.error}" if kept.error else ""
    return f"last good checkpoint: {good}, in {kept.folder}{failed}"


def _standby(standby: pb.StandbyStatus) -> str:
    """Address of the standby, its replication lag, the role of this server and the term; "" without a standby."""
    configuration = standby.configuration
    if not configuration.term.number:
        return ""
    if not configuration.standby:
        return f"none ({standby.role}, term {configuration.term.number})"
    where = ballots.address_of(configuration.standby)
    behind = f"{standby.lag_records} records, {standby.lag_seconds:.1f} s behind" if standby.lag_records else "has all"
    return f"{where} {behind} ({standby.role}, term {configuration.term.number})"


def _plane(views: Sequence[pb.WorkerStatus]) -> str:
    """Data plane of a worker: "memory", else what carries its frames; several if its shards differ."""
    planes = ["memory" if view.shares_memory else _network(view.carrier) for view in views]
    return " and ".join(dict.fromkeys(planes))


def _network(carrier: str) -> str:
    return f"network, {carrier}" if carrier else "network"


def _slow(replies: Sequence[pb.StatusReply]) -> tuple[str, ...]:
    """Why workers use gRPC where a socket would be faster, as sentences; the workers of one reason share one."""
    workers: dict[str, list[str]] = {}
    for each in (worker for reply in replies for worker in reply.worker if worker.carrier_reason):
        workers.setdefault(each.carrier_reason, []).append(each.worker)
    return tuple(
        f"gRPC carries the frames of {', '.join(dict.fromkeys(names))}: {reason}" for reason, names in workers.items()
    )
