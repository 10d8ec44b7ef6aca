"""Carries out what the core decides: the core, the tensors and the streams of one shard meet here and nowhere else.

    frame --> check --> core.push --> effects --+--> lane of the bucket --> executor: apply, encode --> streams
                                                +--> bookkeeping (payloads held, waits, rosters)

Rules of this file
  1. Everything runs on the event loop except ``_work``, which touches one bucket's tensors: on the executor, unless
     the bucket is small (``torch_ps.ps.lanes``).
  2. Each bucket has one lane: its applies and answers run in the order in which the core decided them, one at a time.
  3. What a peer sent is checked before the core sees it, so a refused frame leaves no trace.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

import torch

from torch_ps.common import codecs, optim
from torch_ps.common.codecs.copies import Copies
from torch_ps.common.errors import ConfigError, CorruptFrame, ProtocolError
from torch_ps.common.optim import Hyper, hyper_from_proto
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.plan import Bucket
from torch_ps.common.schema import Model
from torch_ps.common.trace import Trace
from torch_ps.ps.answers import Answer, Answers, Shared
from torch_ps.ps.arenas import Arenas
from torch_ps.ps.clip import Ask, Clip, Update
from torch_ps.ps.compensate import Compensator
from torch_ps.ps.core.effects import Announce, Apply, Discard, Effect, Evict, Release, Wait
from torch_ps.ps.core.policy import Push
from torch_ps.ps.core.roster import Roster
from torch_ps.ps.core.shard import Shard
from torch_ps.ps.doctor import Doctor
from torch_ps.ps.lanes import SMALL, Lanes
from torch_ps.ps.metrics import Metrics
from torch_ps.ps.recorder import Recorder
from torch_ps.ps.store import CPU, Gradient, NonFinite, Store
from torch_ps.ps.streams import Stream, Streams

log = logging.getLogger("torch_ps.ps")


#: Bytes of a frame that is not held up for others.
LARGE_FRAME = 4096


@dataclass(frozen=True, slots=True)
class _Held:
    """A push whose bucket has not closed yet."""

    gradient: Gradient
    hyper: Hyper
    since: float  # on time.monotonic()


@dataclass(frozen=True, slots=True)
class _Step:
    """An ``Apply`` with the gradients it averages."""

    apply: Apply
    gradients: tuple[Gradient, ...]
    hyper: Hyper


@dataclass(frozen=True, slots=True)
class Turn:
    """Something else to do with one bucket in its lane's order: on the executor, then ``done`` on the event loop."""

    run: Callable[[], Sequence[bytes]]  # gives frames for the standby
    done: Callable[[], None] = lambda: None


_Job = _Step | Update | Answer | Turn


@dataclass(frozen=True, slots=True)
class _Done:
    """What one run of a lane has made: frames to send with their payload's size, gradients left out, steps."""

    frames: list[tuple[Stream, bytes, int]]
    left_out: list[NonFinite]
    steps: int
    seconds: float
    records: list[bytes]  # for the standby
    turns: list[Turn]

    @property
    def large(self) -> bool:
        return any(len(frame) > LARGE_FRAME for _, frame, _ in self.frames)


class Engine:
    """One shard at work, from the moment its model is known."""

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
        ask: Ask,
        on_failure: Callable[[BaseException], None],
        doctor: Doctor | None = None,
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
        self.busy_seconds = 0.0  # that lanes have worked
        self.num_parameters = sum(bucket.numel for bucket in buckets if bucket.rule == "optimizer")
        self._buckets = {bucket.index: bucket for bucket in buckets}
        self._first = buckets[0].index if buckets else -1
        self._local = {bucket.index: number for number, bucket in enumerate(buckets)}
        self._index = [bucket.index for bucket in buckets]
        self._held: dict[tuple[str, int, int, int], _Held] = {}  # worker, session, bucket, step
        self._arguments = optim.arguments_of(model.optimizer)
        self._approved = [group.hyper for group in model.groups]  # per group, the values that were checked last
        self._metrics = metrics
        self.compensator, self._doctor = compensator, doctor
        first, core_epoch = self._first, lambda: core.roster.epoch
        self._answers = Answers(self.store, self.arenas, compensator, first=first, epoch=core_epoch)
        self._lanes = Lanes[_Job, _Done](
            buckets,
            executor,
            self.store.beside(self._work),
            small=SMALL if in_place else 0,
            waits=_waits,
            on_done=self._done,
            on_failure=on_failure,
        )
        #: Called on a bucket's lane when it has come to a cut, with its record.
        self.take: Callable[[Bucket, Mapping[str, Any]], None] | None = None
        self.recorder: Recorder | None = None  # while answers wait for a standby
        self.unsettled: dict[int, Sequence[Copies]] = {}  # of a standby that took over: copies to settle, by bucket
        self._clip: Clip | None = None
        if clip_norm:
            count = sum(bucket.rule == "optimizer" for bucket in buckets)
            self._clip = Clip(
                clip_norm, count, self.store, executor, ask, on_ready=self._lanes.start, on_failure=on_failure
            )

    def disconnected(self, stream: Stream) -> None:
        """The stream ended: what it waits for cannot be delivered any more; what it pushed stays valid."""
        if stream.worker is not None:
            self.run(self.core.disconnected(stream.worker, stream.session))

    # -------------------------------------------------------------- what peers ask

    def push(self, stream: Stream, push: pb.Push, payload: memoryview) -> None:
        """Take one bucket of one worker's gradient.

        Raises:
            ProtocolError: the frame is not for this shard, does not decode, or is refused. Nothing has changed.
        """
        bucket = self._bucket(push.bucket)
        codec = codecs.codec(push.codec)
        worker, session = stream.worker or "", stream.session
        if push.HasField("arena_bytes"):
            in_place = codec.name == "none"
            payload = self.arenas.payload(worker, session, push.bucket, push.arena_bytes, in_place=in_place)
        codec.check(payload, bucket.numel)
        hyper = self._hyper(bucket, push)
        local = self._local[push.bucket]
        covers, now = tuple([(each.number, each.samples) for each in push.covers]), time.monotonic()
        effects = self.core.push(
            Push(worker, session, push.step, local, push.base, push.weight, push.epoch, covers), now
        )
        stream.bytes_pushed += len(payload)
        self.bytes_pushed += len(payload)
        if push.bucket == self._first:
            stream.samples += push.weight
        self._metrics.pushed.inc(len(payload))
        gradient = Gradient(worker, push.step, push.weight, codec, payload, push.missing)
        if push.nonfinite and push.bucket == self._first and not any(isinstance(e, Discard) for e in effects):
            self._count_nonfinite()
            log.info("gradient of worker %s, step %d is not finite: the worker left it out", worker, push.step)
        self._held.setdefault((worker, session, local, push.step), _Held(gradient, hyper, now))
        self.run(effects)

    def pull(self, stream: Stream, bucket: int) -> None:
        """Ask for the parameters of one bucket.

        Raises:
            ProtocolError: the bucket is not one of this shard's, or the core refuses.
        """
        local = self._local[self._bucket(bucket).index]
        self.run(self.core.pull(stream.worker, stream.session, local, time.monotonic()))

    def set_roster(self, roster: Roster) -> None:
        self.arenas.keep(roster)
        if self.compensator is not None:
            self.compensator.keep(roster)
        self.run(self.core.set_roster(roster))
        if self._clip is not None:
            self._clip.set_roster(roster)

    # -------------------------------------------------------------- effects

    def run(self, effects: Iterable[Effect]) -> None:
        """Carry out effects in the order in which the core returned them."""
        touched: dict[int, None] = {}  # in this order
        for effect in effects:
            match effect:
                case Apply():
                    bucket = self._buckets[self._index[effect.bucket]]
                    self._lanes.add(bucket.index, self._step(bucket, effect))
                    touched[bucket.index] = None
                case Release():
                    self._released(self._index[effect.bucket], effect)
                    touched[self._index[effect.bucket]] = None
                case Discard():
                    if self.recorder is not None and effect.bucket == 0:
                        self.tell_data()
                    del self._held[effect.worker, effect.session, effect.bucket, effect.step]
                    log.debug("push of %s, step %d, is not applied: %s", effect.worker, effect.step, effect.reason)
                case Evict():
                    self._streams.evict(effect)
                case Wait() | Announce():  # the core remembers who waits; the lead's membership announces
                    pass
        for index in touched:
            self._lanes.start(index)

    def turn(self, bucket: int, turn: Turn) -> None:
        """Have something done behind what bucket ``bucket`` (over all shards) has to do now."""
        self._lanes.add(bucket, turn)
        self._lanes.start(bucket)

    def tell_data(self, done: Callable[[], None] = lambda: None) -> None:
        """Lead: the standby hears which samples are whose; then ``done``."""
        frames = self.recorder.data() if self.recorder is not None else []
        self.turn(self._first, Turn(lambda: frames, done))

    def _step(self, bucket: Bucket, apply: Apply) -> _Step | Update:
        held = [self._held.pop((c.worker, c.session, apply.bucket, c.step)) for c in apply.contributions]
        for contribution, each in zip(apply.contributions, held, strict=True):
            self._trace.held(contribution.worker, contribution.step, bucket.index, each.since)
            self.staleness[contribution.staleness] += 1
            self._metrics.staleness.observe(contribution.staleness)
            stream = self._streams.get(contribution.worker, contribution.session) if apply.bucket == 0 else None
            if stream is not None:
                stream.staleness = contribution.staleness
        gradients, hyper = tuple(h.gradient for h in held), held[0].hyper if held else {}
        if self._clip is not None and bucket.rule == "optimizer":
            return self._clip.decided(bucket.index, apply, gradients, hyper)
        return _Step(apply, gradients, hyper)

    def _released(self, bucket: int, release: Release) -> None:
        if not release.applied and release.step is not None:
            self.late += 1
            self._metrics.late.inc()
        stream = self._streams.get(release.worker, release.session)
        if stream is not None:
            self._lanes.add(bucket, Answer(release, stream))

    @property
    def queued(self) -> int:
        """Buckets that have work."""
        return self._lanes.queued

    # -------------------------------------------------------------- work

    def _work(self, bucket: Bucket, jobs: Iterable[_Job]) -> _Done:
        """On the executor: apply and encode, in order. Workers with the same answer share one frame."""
        frames: list[tuple[Stream, bytes, int]] = []
        left_out: list[NonFinite] = []
        shared: Shared = {}
        records: list[bytes] = []
        turns: list[Turn] = []
        recorder = self.recorder
        steps, begin = 0, time.perf_counter()
        for job in jobs:
            if isinstance(job, Turn):
                records += job.run()
                turns.append(job)
                continue
            if not isinstance(job, Answer):
                for copies in self.unsettled.pop(bucket.index, ()) if self.unsettled else ():
                    copies.settle(bucket.index, self.store.host(bucket.index))
                worker, _, step = job.apply.group
                span = self._trace.span("apply", step, bucket.index, worker)
                with span, self.arenas.changing(bucket.index, job.apply.version):
                    left_out += self._apply(bucket, job, recorder, records)
                shared.clear()
                steps += 1
                if job.apply.record is not None and self.take is not None:
                    self.take(bucket, job.apply.record)
                continue
            if recorder is not None:
                records += recorder.answered(bucket, job)
            step = -1 if job.release.step is None else job.release.step
            with self._trace.span("encode", step, bucket.index, job.release.worker or ""):
                frame, size = self._answers.frame(bucket, job, shared)
            frames.append((job.stream, frame, size))
        return _Done(frames, left_out, steps, time.perf_counter() - begin, records, turns)

    def _apply(
        self, bucket: Bucket, job: _Step | Update, recorder: Recorder | None, records: list[bytes]
    ) -> list[NonFinite]:
        index, coefficient, step = bucket.index, 1.0, job.apply.group[2]
        if isinstance(job, _Step):
            with self._trace.span("mean", step, index):
                mean, left_out = self.store.mean(index, job.gradients)
        else:
            mean, left_out, coefficient = job.mean, job.left_out, job.coefficient or 0.0
        if mean is None or not coefficient:
            if recorder is not None:
                records += recorder.step(bucket, job.apply, None, job.hyper)
            return left_out
        values = self.store.values(index)
        if self._doctor is not None and (watch := self._doctor.watch(index, job.apply, job.hyper, coefficient)):
            watch(mean.cpu(), values.cpu())
        if coefficient != 1.0:
            mean = mean * coefficient
        if self.compensator is not None and bucket.rule == "optimizer":
            mean = self.compensator.correct(index, job.apply, mean, values)
        if recorder is not None:
            records += recorder.step(bucket, job.apply, mean, job.hyper)
        with self._trace.span("optimizer", step, index):
            self.store.step(index, mean, job.hyper, lr_scale=job.apply.lr_scale)
        return left_out

    def _done(self, done: _Done) -> None:
        if self.recorder is None:
            self._answer(done)
        else:
            self.recorder.send(done.records, lambda: self._answer(done))
        self.busy_seconds += done.seconds
        self._metrics.step_seconds.observe(done.seconds)
        self._metrics.steps.inc(done.steps)
        self._metrics.version.set(self.core.open_step)
        for found in done.left_out:
            self._count_nonfinite()
            log.warning(
                "gradient of worker %s, step %d is not finite in tensor %r: left out of the mean",
                found.worker,
                found.step,
                found.tensor,
            )

    def _answer(self, done: _Done) -> None:
        for turn in done.turns:
            turn.done()
        for stream, frame, size in done.frames:
            stream.bytes_pulled += size
            self.bytes_pulled += size
            self._metrics.pulled.inc(size)
            stream.outbox.put_nowait(frame)

    def _count_nonfinite(self) -> None:
        self.nonfinite += 1
        self._metrics.nonfinite.inc()

    # -------------------------------------------------------------- checks

    def _bucket(self, index: int) -> Bucket:
        if index not in self._buckets:
            raise CorruptFrame(f"bucket {index} is not one of this shard's {len(self._buckets)}")
        return self._buckets[index]

    def _hyper(self, bucket: Bucket, push: pb.Push) -> Hyper:
        if bucket.rule == "mean":
            return {}
        unknown = set(push.hyper) - self._arguments
        if unknown:
            raise ProtocolError(f"torch.optim.{self.model.optimizer} has no hyperparameter {min(unknown)!r}")
        job = self.model.groups[bucket.group].hyper
        hyper = job | hyper_from_proto(push.hyper)
        if hyper != self._approved[bucket.group]:
            try:
                optim.check_change(self.model.optimizer, job, hyper)
            except ConfigError as error:
                raise ProtocolError(str(error)) from None
            self._approved[bucket.group] = hyper
        return hyper


def _waits(job: _Job) -> bool:
    """Whether it cannot run yet: the norm of its update is not known."""
    return isinstance(job, Update) and job.coefficient is None
