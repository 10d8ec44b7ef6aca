"""Executes the effects of the core: connects the core, the tensors and the streams of one shard.

    frame --> check --> core.push --> effects --+--> lane of the bucket --> apply, encode --> streams
                                                +--> bookkeeping: held payloads, counters

Rules of this file
  1. Everything here runs on the event loop; ``bucket_jobs.py`` touches the tensors.
  2. Each bucket has one lane, which runs its steps and responses one at a time in the order of the core's decisions.
  3. Peer input is checked before the core sees it, so a refused frame changes nothing.
  4. Work per push and per response is independent of the number of buckets, workers and data sets.
"""

import functools
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from dataclasses import dataclass

import torch

from torch_ps.common import codecs
from torch_ps.common import optimizer_spec as optim
from torch_ps.common.errors import ConfigError, CorruptFrame, ProtocolError, PsError
from torch_ps.common.optimizer_spec import Hyper, changes_from_proto
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.plan import Bucket
from torch_ps.common.schema import Model
from torch_ps.common.trace import Trace
from torch_ps.ps.core.effects import Announce, Apply, Discard, Effect, Evict, Release, Wait
from torch_ps.ps.core.policy import Push
from torch_ps.ps.core.roster import Roster
from torch_ps.ps.core.shard import Shard
from torch_ps.ps.engine.bucket_jobs import (
    BucketJob,
    Done,
    JobRunner,
    Response,
    ResponseEncoder,
    Step,
    Turn,
    must_wait,
)
from torch_ps.ps.engine.delay_compensation import Compensator
from torch_ps.ps.engine.divergence_monitor import DivergenceMonitor
from torch_ps.ps.engine.equal_gradients import EqualGradients
from torch_ps.ps.engine.grad_clip import GradientClipper, RequestNorm, Update
from torch_ps.ps.engine.lanes import SMALL, Lanes
from torch_ps.ps.engine.norm_meter import NormMeter
from torch_ps.ps.engine.parameter_store import CPU, Gradient, Store
from torch_ps.ps.engine.shared_memory import Arenas
from torch_ps.ps.engine.written_weights import PushedWrites, WeightWriter, check_positions, of_push
from torch_ps.ps.observability.bug_reports import report_bug
from torch_ps.ps.observability.shard_metrics import Metrics
from torch_ps.ps.transport.sent_ahead import Encoded
from torch_ps.ps.transport.streams import Stream, Streams

log = logging.getLogger("torch_ps.ps")

#: Sets of hyperparameters of one group that are not checked again: workers on schedules of their own push by turns.
APPROVED = 8


@dataclass(frozen=True, slots=True)
class _Held:
    """A push that is in no ``Apply`` yet."""

    gradient: Gradient
    hyper: Hyper
    written: PushedWrites | None
    since: float  # on time.monotonic()


class Engine:
    """One shard, from the moment its model is known.

    Args:
        model: Model of the job.
        buckets: Buckets of this shard.
        core: State machine of this shard.
        executor: Apply threads.
        metrics: Metrics of this shard.
        streams: Open streams of this shard.
        clip_norm: Largest norm of an update; 0: no clipping.
        compensator: Delay compensation; None: off.
        request_norm: Obtains the norm of an update over all shards.
        on_failure: Called with an exception that ends the shard.
        advise: Shows a warning; called on any thread.
        monitor: Divergence monitor; None: off.
        equal_gradients: Comparison of the workers' gradients; None: off.
        device: Device of parameters and optimizer state.
        trace: Spans of the traced steps; None: no trace.
    """

    def __init__(
        self,
        model: Model,
        buckets: Iterable[Bucket],
        core: Shard,
        executor: Executor,
        metrics: Metrics,
        streams: Streams,
        *,
        clip_norm: float,
        compensator: Compensator | None,
        request_norm: RequestNorm,
        on_failure: Callable[[BaseException], None],
        advise: Callable[[str], None],
        monitor: DivergenceMonitor | None = None,
        equal_gradients: EqualGradients | None = None,
        device: torch.device = CPU,
        trace: Trace | None = None,
    ) -> None:
        self._trace = trace or Trace()
        self.buckets = buckets = tuple(buckets)
        self.model = model
        self.core = core
        in_place = device == CPU
        self.arenas = Arenas(buckets, in_place=in_place)
        self.store = Store(model, buckets, self.arenas.parameters if in_place else None, device)
        self._streams = streams
        self.staleness: Counter[int] = Counter()
        self.late = 0
        self.nonfinite = 0
        self.bytes_pushed = self.bytes_pulled = 0
        self.busy_seconds = 0.0  # sum of the runs of all lanes
        self.num_parameters = sum(bucket.numel for bucket in buckets if bucket.rule == "optimizer")
        self._buckets = {bucket.index: bucket for bucket in buckets}
        self._first = buckets[0].index if buckets else -1
        self._local = {bucket.index: number for number, bucket in enumerate(buckets)}
        self._index = [bucket.index for bucket in buckets]
        self._held: dict[tuple[str, int, int, int], _Held] = {}  # worker, session, bucket, step
        self._approved = [deque((group.hyper,), APPROVED) for group in model.groups]  # by group: values checked last
        self._metrics = metrics
        self.compensator = compensator
        self._equal_gradients = equal_gradients
        encoder = ResponseEncoder(
            self.store, self.arenas, compensator, first=self._first, epoch=lambda: core.roster.epoch
        )
        self._writer = writer = WeightWriter(self.store, model, streams, compensator, advise)
        self.work = JobRunner(self.store, encoder, writer, compensator, monitor, self._trace)
        self._lanes = Lanes[BucketJob, Done](
            buckets,
            executor,
            self.store.beside(self.work.run),
            small=SMALL if in_place else 0,
            must_wait=must_wait,
            on_done=self._done,
            on_failure=on_failure,
        )
        self._norms = NormMeter(buckets, self.store, executor, core, streams)
        self._clipper: GradientClipper | None = None
        if clip_norm:
            count = sum(bucket.rule == "optimizer" for bucket in buckets)
            self._clipper = GradientClipper(
                clip_norm,
                count,
                self.store,
                executor,
                request_norm,
                on_ready=self._lanes.start,
                on_lost=self._lost,
                on_failure=on_failure,
            )

    def disconnected(self, stream: Stream) -> None:
        """Note that a stream has ended: its pending responses are dropped, its pushes that the core has stay valid."""
        stream.sent_ahead.clear()
        if stream.worker is not None:
            self._norms.disconnected(stream.worker, stream.session)
            self.run(self.core.disconnected(stream.worker, stream.session))

    # -------------------------------------------------------------- requests of peers

    def push(self, stream: Stream, push: pb.Push, payload: memoryview, *, copy: bool = False) -> None:
        """Accept one bucket of one worker's gradient.

        Args:
            stream: Stream of the worker.
            push: Header of the frame.
            payload: Encoded gradient, or weights that the loop has written where the gradient is elsewhere.
            copy: Whether it came over another connection than the stream, where the push itself follows.

        Raises:
            ProtocolError: the frame is not for this shard, does not decode, or is refused; nothing has changed.
        """
        bucket = self._bucket(push.bucket)
        hyper, absent = self._hyper(bucket, push), _absent(bucket, push)
        written = of_push(bucket, stream.worker or "", stream.session, push, payload) if push.written else None
        if push.HasField("ahead"):
            _check_named(stream, push, payload[:0] if written else payload)
            self._count_pushed(stream, len(payload))
            take = functools.partial(self._commit, stream, push, hyper, absent, written)
            claim = stream.sent_ahead.claim_by_copy if copy else stream.sent_ahead.claim
            claim(push.bucket, push.ahead, push.step, take)
            return
        gradient = self._gradient(stream, bucket, push, payload[:0] if written else payload)
        size = len(gradient.payload) + (len(payload) if written else 0)
        self._commit(stream, push, hyper, absent, written, gradient)
        self._count_pushed(stream, size)

    def gradient_ahead(self, stream: Stream, ahead: pb.Ahead, payload: memoryview) -> None:
        """Hold one bucket of one worker's gradient until a push names it, or complete the push that waits for it.

        Args:
            stream: Stream of the worker.
            ahead: Header of the frame.
            payload: Encoded gradient.

        Raises:
            ProtocolError: the frame is not for this shard, does not decode, or is refused; nothing has changed.
        """
        bucket, codec = self._bucket(ahead.bucket), codecs.codec(ahead.codec)
        codec.check(payload, bucket.numel)
        self._count_pushed(stream, len(payload))
        stream.sent_ahead.arrive(ahead.bucket, ahead.number, Encoded(codec, payload))

    def _commit(
        self,
        stream: Stream,
        push: pb.Push,
        hyper: Hyper,
        absent: tuple[int, ...],
        written: PushedWrites | None,
        gradient: Encoded,
    ) -> None:
        """Have the core decide about a checked push."""
        worker, session, local = stream.worker or "", stream.session, self._local[push.bucket]
        covers, now = tuple([(each.number, each.samples) for each in push.covers]), time.monotonic()
        effects = self.core.push(
            Push(worker, session, push.step, local, push.base, push.weight, push.epoch, covers), now
        )
        if push.bucket == self._first:
            stream.samples += push.weight
        codec, payload = gradient.codec, gradient.payload
        missing = len(absent) == len(self._buckets[push.bucket].pieces)
        found = Gradient(worker, push.step, push.weight, codec, payload, missing, absent)
        if push.nonfinite and push.bucket == self._first and not any(isinstance(e, Discard) for e in effects):
            self._count_nonfinite()
            log.info("worker %s left out its gradient of step %d: it is not finite", worker, push.step)
        if written is not None and (reason := _loss(push, effects)):
            self._writer.tell_lost(self._buckets[push.bucket], written, reason)
        self._held.setdefault((worker, session, local, push.step), _Held(found, hyper, written, now))
        self.run(effects)
        if self.core.norms_waiting:
            self._norms.answer_due()

    def _gradient(self, stream: Stream, bucket: Bucket, push: pb.Push, payload: memoryview) -> Encoded:
        """The gradient of a push that names no other frame: in its own, in shared memory, or none that counts."""
        codec = codecs.codec(push.codec)
        if push.HasField("arena_bytes"):
            if len(payload):
                raise CorruptFrame(
                    f"worker {stream.worker!r} pushes the gradient of bucket {push.bucket} in shared memory and has "
                    "another one in its frame"
                )
            payload = self.arenas.payload(
                stream.worker or "", stream.session, push.bucket, push.arena_bytes, in_place=codec.name == "none"
            )
        if len(payload) or not (push.missing or push.weight == 0):
            codec.check(payload, bucket.numel)
        return Encoded(codec, payload)

    def measure(self, stream: Stream, measure: pb.Measure, payload: memoryview) -> None:
        """Take one bucket of a worker's question for the norm of the step's mean gradient.

        Args:
            stream: Stream of the worker.
            measure: Header of the frame.
            payload: Gradient, fp32; empty where it is elsewhere, or missing.

        Raises:
            ProtocolError: the frame is not for this shard, does not decode, or is refused; nothing has changed.
        """
        bucket, plain = self._bucket(measure.bucket), codecs.codec("none")
        gradient = Encoded(plain, payload)
        if len(payload) and (measure.missing or measure.HasField("ahead") or measure.HasField("arena_bytes")):
            raise CorruptFrame(
                f"worker {stream.worker!r} asks for the norm of a gradient of bucket {measure.bucket} that is missing "
                "or elsewhere, and has another one in its frame"
            )
        if measure.HasField("ahead"):
            gradient = stream.sent_ahead.look(measure.bucket, measure.ahead)
        elif measure.HasField("arena_bytes"):
            held = self.arenas.payload(
                stream.worker or "", stream.session, measure.bucket, measure.arena_bytes, in_place=True
            )
            gradient = Encoded(plain, held)
        if not measure.missing:
            gradient.codec.check(gradient.payload, bucket.numel)
        self._count_pushed(stream, len(payload))
        self._norms.take(stream, bucket, measure, gradient)

    def pull(self, stream: Stream, bucket: int) -> None:
        """Have the parameters of one bucket sent to a stream.

        Raises:
            ProtocolError: the bucket does not belong to this shard, or the core refuses.
        """
        local = self._local[self._bucket(bucket).index]
        self.run(self.core.pull(stream.worker, stream.session, local, time.monotonic()))

    def set_roster(self, roster: Roster) -> None:
        """Follow the lead to a new roster."""
        self.arenas.keep(roster)
        if self.compensator is not None:
            self.compensator.keep(roster)
        self.run(self.core.set_roster(roster))
        if self._clipper is not None:
            self._clipper.set_roster(roster)
        self._norms.set_roster(roster)

    # -------------------------------------------------------------- effects

    def run(self, effects: Iterable[Effect]) -> None:
        """Execute effects in the order in which the core returned them."""
        touched: dict[int, None] = {}  # an ordered set
        for effect in effects:
            match effect:
                case Apply():
                    bucket = self._buckets[self._index[effect.bucket]]
                    self._lanes.add(bucket.index, self._step(bucket, effect))
                    touched[bucket.index] = None
                case Release():
                    self._release(self._index[effect.bucket], effect)
                    touched[self._index[effect.bucket]] = None
                case Discard():
                    if self.work.recorder is not None and effect.bucket == 0:
                        self.tell_data()
                    if self._held.pop((effect.worker, effect.session, effect.bucket, effect.step), None) is None:
                        report_bug("the effects of the core", KeyError(f"no payload to forget: {effect}"))
                    log.debug("push of %s, step %d, is not applied: %s", effect.worker, effect.step, effect.reason)
                case Evict():
                    self._streams.evict(effect)
                case Wait() | Announce():  # the core keeps who waits; the lead announces rosters
                    pass
        for index in touched:
            self._lanes.start(index)

    def turn(self, bucket: int, turn: Turn) -> None:
        """Append an action to a bucket's lane. ``bucket`` is its index over all shards."""
        self._lanes.add(bucket, turn)
        self._lanes.start(bucket)

    def tell_data(self, done: Callable[[], None] = lambda: None) -> None:
        """Lead: send the standby the assignment of samples to workers, then call ``done``."""
        frames = self.work.recorder.data() if self.work.recorder is not None else []
        self.turn(self._first, Turn(lambda: frames, done))

    def _step(self, bucket: Bucket, apply: Apply) -> Step | Update:
        held = [self._held.pop((c.worker, c.session, apply.bucket, c.step)) for c in apply.contributions]
        for contribution, each in zip(apply.contributions, held, strict=True):
            self._trace.held(contribution.worker, contribution.step, bucket.index, each.since)
            self.staleness[contribution.staleness] += 1
            self._metrics.staleness.observe(contribution.staleness)
            stream = self._streams.get(contribution.worker, contribution.session) if apply.bucket == 0 else None
            if stream is not None:
                stream.staleness = contribution.staleness
        gradients, hyper = tuple(h.gradient for h in held), held[0].hyper if held else {}
        written = tuple([h.written for h in held if h.written is not None])
        if self._equal_gradients is not None and bucket.rule == "optimizer":
            self._equal_gradients.compare(bucket.index, gradients)
        if self._clipper is not None and bucket.rule == "optimizer":
            return self._clipper.add(bucket.index, apply, gradients, hyper, written)
        return Step(apply, gradients, hyper, written)

    def _release(self, bucket: int, release: Release) -> None:
        if not release.applied and release.step is not None:
            self.late += 1
            self._metrics.late.inc()
        stream = self._streams.get(release.worker, release.session)
        if stream is not None:
            self._lanes.add(bucket, Response(release, stream))

    @property
    def queued(self) -> int:
        """Number of buckets that have work."""
        return self._lanes.queued

    def _done(self, done: Done) -> None:
        if self.work.recorder is None:
            self._send(done)
        else:
            self.work.recorder.send(done.records, lambda: self._send(done))
        for worker, session, error in done.failed:
            self._end_stream(worker, session, error)
        self.busy_seconds += done.seconds
        self._metrics.step_seconds.observe(done.seconds)
        self._metrics.steps.inc(done.steps)
        for found in done.left_out:
            self._count_nonfinite()
            log.warning(
                "gradient of worker %s, step %d is not finite in tensor %r: left out of the mean",
                found.worker,
                found.step,
                found.tensor,
            )

    def _send(self, done: Done) -> None:
        for turn in done.turns:
            turn.done()
        for stream, frame, size in done.frames:
            stream.bytes_pulled += size
            self.bytes_pulled += size
            self._metrics.pulled.inc(size)
            stream.outbox.put_nowait(frame)

    def _end_stream(self, worker: str | None, session: int, error: PsError) -> None:
        """End the stream of a worker whose push, question or answer a bug has ended; it opens another one."""
        stream = self._streams.get(worker, session)
        if stream is not None:
            stream.outbox.put_nowait(error)

    def _lost(self, apply: Apply, error: Exception) -> None:
        """End the streams of the workers of a step whose mean could not be computed."""
        told = report_bug(f"the norm of step {apply.version} of bucket {self._index[apply.bucket]}", error)
        for each in apply.contributions:
            self._end_stream(each.worker, each.session, told)

    def _count_pushed(self, stream: Stream, size: int) -> None:
        stream.bytes_pushed += size
        self.bytes_pushed += size
        self._metrics.pushed.inc(size)

    def _count_nonfinite(self) -> None:
        self.nonfinite += 1
        self._metrics.nonfinite.inc()

    # -------------------------------------------------------------- checks

    def _bucket(self, index: int) -> Bucket:
        if index not in self._buckets:
            raise CorruptFrame(f"bucket {index} is not one of this shard's {len(self._buckets)}")
        return self._buckets[index]

    def _hyper(self, bucket: Bucket, push: pb.Push) -> Hyper:
        if bucket.rule != "optimizer":
            return {}
        hyper = job = self.model.groups[bucket.group].hyper
        if push.hyper:
            hyper = job | changes_from_proto(self.model.optimizer, push.hyper)
        if hyper not in (approved := self._approved[bucket.group]):
            try:
                optim.check_change(self.model.optimizer, job, hyper)
            except ConfigError as error:
                raise ProtocolError(str(error)) from None
            approved.append(hyper)
        return hyper


def _absent(bucket: Bucket, push: pb.Push) -> tuple[int, ...]:
    """Positions of the pieces that a push has no gradient for, or no buffer.

    Raises:
        ProtocolError: the bucket holds buffers, and the push has nothing for it.
        CorruptFrame: they are not positions of pieces in increasing order.
    """
    if push.missing:
        if bucket.rule != "optimizer":
            raise ProtocolError(f"bucket {bucket.index} holds buffers, for which no gradient can be missing")
        return tuple(range(len(bucket.pieces)))
    absent = tuple(push.absent)
    if absent:
        check_positions(bucket, absent)
    return absent


def _loss(push: pb.Push, effects: Iterable[Effect]) -> str:
    """Reason why a push will never be applied; empty if it may be, or was before."""
    if any(isinstance(effect, Release) and effect.step == push.step and effect.applied for effect in effects):
        return ""
    return next((effect.reason for effect in effects if isinstance(effect, Discard) and effect.step == push.step), "")


def _check_named(stream: Stream, push: pb.Push, payload: memoryview) -> None:
    """Refuse a push that names a gradient and brings another one, or what it cannot bring and might have to be held.

    Raises:
        CorruptFrame: it has one in ``payload`` or in shared memory.
        ProtocolError: it covers samples and is not of the first bucket.
    """
    if push.covers and push.bucket:
        raise ProtocolError(f"worker {stream.worker!r} covers samples with bucket {push.bucket}; bucket 0 does that")
    if len(payload) or push.HasField("arena_bytes"):
        where = "in shared memory" if push.HasField("arena_bytes") else "in its frame"
        raise CorruptFrame(
            f"worker {stream.worker!r} names gradient {push.ahead} of bucket {push.bucket} and has another one {where}"
        )
