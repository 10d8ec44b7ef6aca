"""Jobs of one bucket: average gradients, step the optimizer, encode responses; run in order, one run at a time.

    Step | Update --> written weights --> mean --> compensation --> optimizer --> record for the standby, copy for a
                      checkpoint
    Response -------> encode, once for all workers that get the same bytes
    Turn -----------> anything else that has to happen in this order

A run is all jobs of one bucket that can go (``lanes.py``); it executes on an apply thread or, for a small bucket, on
the event loop. Its result returns to the loop as one ``Done``. Nothing here sends or counts.
"""

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from torch_ps.common import codecs
from torch_ps.common.codecs import Codec
from torch_ps.common.codecs.pulled_copies import Copies
from torch_ps.common.errors import PsError
from torch_ps.common.optimizer_spec import Hyper
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.plan import Bucket
from torch_ps.common.trace import Trace
from torch_ps.common.wire.frames import Buffer, Frame, pack, payload_of, split
from torch_ps.ps.core.effects import Apply, Release
from torch_ps.ps.engine.delay_compensation import Compensator
from torch_ps.ps.engine.divergence_monitor import DivergenceMonitor
from torch_ps.ps.engine.grad_clip import Update
from torch_ps.ps.engine.parameter_store import Gradient, Mean, NonFinite, Store
from torch_ps.ps.engine.shared_memory import Arenas
from torch_ps.ps.engine.written_weights import PushedWrites, Values, WeightWriter
from torch_ps.ps.observability.bug_reports import report_bug
from torch_ps.ps.transport.streams import Stream

#: Bytes of a frame that is handed to the event loop at once; smaller ones may wait for other runs.
LARGE_FRAME = 4096

#: Worker (None: an observer), session, and the error that its stream ends with.
Failure = tuple[str | None, int, PsError]

#: Frame and payload bytes by serialized header, ``Stream.by_reference`` and ``Release.stable``, valid until the next
#: step of the bucket.
EncodedFrames = dict[tuple[bytes, bool, bool], tuple[Frame, int]]


@dataclass(frozen=True, slots=True)
class Step:
    """An ``Apply`` with the gradients it averages and the weights that loops have written, both in rank order."""

    apply: Apply
    gradients: tuple[Gradient, ...]
    hyper: Hyper
    written: tuple[PushedWrites, ...] = ()


@dataclass(slots=True)
class Response:
    """A ``Release`` and the stream it leaves by."""

    release: Release
    stream: Stream


@dataclass(frozen=True, slots=True)
class Turn:
    """Any other action on one bucket in its lane's order: ``run`` within the run, then ``done`` on the event loop."""

    run: Callable[[], Sequence[bytes]]  # returns frames for the standby
    done: Callable[[], None] = lambda: None


BucketJob = Step | Update | Response | Turn


@dataclass(frozen=True, slots=True)
class Done:
    """Result of one run.

    Attributes:
        frames: Responses as (stream, frame, bytes of payload).
        left_out: Gradients that are not finite.
        steps: Number of optimizer steps.
        seconds: Wall time of the run.
        records: Frames for the standby.
        turns: Turns that ran; their ``done`` is still to be called.
        failed: What bugs have ended, as (worker, session, error): an answer that could not be encoded, a gradient that
            could not be read. Their streams end; the state of the bucket is as if they had not come.
    """

    frames: list[tuple[Stream, Frame, int]]
    left_out: list[NonFinite]
    steps: int
    seconds: float
    records: list[bytes]
    turns: list[Turn]
    failed: list[Failure] = field(default_factory=list)

    @property
    def large(self) -> bool:
        return any(len(frame) > LARGE_FRAME for _, frame, _ in self.frames)


class Recorder(Protocol):
    """Records steps and responses for a standby, and holds back what must wait until the standby has them.

    ``torch_ps.ps.failover.primary`` implements it.
    """

    def step(self, bucket: Bucket, apply: Apply, mean: Mean | None, hyper: Hyper, written: Values) -> list[bytes]:
        """Frames about a step. Called in the bucket's run.

        Args:
            bucket: The bucket.
            apply: The core's decision.
            mean: Gradient of the step; None: the optimizer makes no step.
            hyper: Hyperparameters of the step.
            written: What was written to the parameters before it.
        """

    def answered(self, bucket: Bucket, response: Response) -> list[bytes]:
        """Frames about what the worker will have. Called in the bucket's run, before the response is encoded."""

    def data(self) -> list[bytes]:
        """Frames about the assignment of samples to workers; none on a shard that is not the lead."""

    def fail(self, error: Exception) -> None:
        """Give up the standby, for which the frames of a step could not be made. Called in the bucket's run."""

    def send(self, frames: Sequence[bytes], then: Callable[[], None]) -> None:
        """Send ``frames``; call ``then`` once the standby has them and everything before them."""


class ResponseEncoder:
    """Encodes the responses of one shard. A response travels in its frame, in shared memory, or as a difference.

    Args:
        store: Parameters of the shard.
        arenas: Shared memory of the workers on this host.
        compensator: Delay compensation, which records what each worker pulled; None: off.
        first: Index of the shard's first bucket, whose responses name the contributors.
        epoch: Returns the newest roster epoch that the shard knows.
    """

    def __init__(
        self, store: Store, arenas: Arenas, compensator: Compensator | None, *, first: int, epoch: Callable[[], int]
    ) -> None:
        self._store, self._arenas, self._compensator = store, arenas, compensator
        self._first, self._epoch = first, epoch

    def encode(self, bucket: Bucket, response: Response, encoded: EncodedFrames) -> tuple[Frame, int]:
        """Frame of one response and the bytes of its payload. ``encoded`` is shared by workers that get the same."""
        store, stream, release = self._store, response.stream, response.release
        codec = codecs.codec("none") if bucket.rule != "optimizer" else stream.codec
        place = pb.FRAME
        if codec.name == "none" and (release.worker, release.session) in self._arenas.workers:
            place = self._arenas.place(release, bucket.index, store.host)
        payload: tuple[Buffer, ...] = ()
        frame: Frame
        difference = None
        if codec.coarse:
            difference = store.encode_lacking(bucket.index, codec, stream.copies, release.version)
        if difference is not None:
            if (whole := stream.copies.lost(bucket.index)) is not None:
                codec = codecs.codec("none")
                difference = store.keep(codec, codec.encode(whole))
            header, payload = self._header(bucket, release, codec, delta=whole is None), difference
            size = sum(map(len, payload))
            frame = split(header, payload) if stream.by_reference else pack(header, payload)
        else:
            codec = codecs.codec("none") if codec.coarse else codec
            header = self._header(bucket, release, codec, place=place)
            key = header.SerializeToString(), stream.by_reference, release.stable
            if key not in encoded:
                payload = store.encode(bucket.index, codec) if place == pb.FRAME else ()
                size = sum(map(len, payload)) or 4 * bucket.numel
                encoded[key] = self._frame(header, payload, bucket, release, codec, stream), size
            frame, size = encoded[key]
        if self._compensator is not None:
            self._note_pulled(self._compensator, bucket, response, codec, payload_of(frame, size))
        return frame, size

    def _frame(
        self,
        header: pb.DownHeader,
        payload: tuple[Buffer, ...],
        bucket: Bucket,
        release: Release,
        codec: Codec,
        stream: Stream,
    ) -> Frame:
        """Frame of one response. Its payload stays where the parameters are if nobody changes them before it leaves."""
        if not stream.by_reference:
            return pack(header, payload)
        intact = None
        if release.stable and codec.name == "none" and payload:
            intact = self._arenas.unchanged(bucket.index)
        return split(header, self._store.keep(codec, payload) if intact is None else payload, intact)

    def _header(self, bucket: Bucket, release: Release, codec: Codec, **where: Any) -> pb.DownHeader:
        return pb.DownHeader(
            bucket=bucket.index,
            version=release.version,
            next_step=release.next_step,
            step=release.step,
            staleness=release.staleness,
            applied=release.applied,
            samples=release.samples,
            codec=codec.name,
            **where,
            epoch=self._epoch(),
            contributor=release.contributors if bucket.index == self._first else (),
        )

    def _note_pulled(
        self, compensator: Compensator, bucket: Bucket, response: Response, codec: Codec, payload: memoryview
    ) -> None:
        """Tell the compensator the values that this worker decodes, which a lossy codec makes differ from ours."""
        stream, version = response.stream, response.release.version
        if stream.worker is None or bucket.rule != "optimizer":
            return
        values = stream.copies.get(bucket.index) if stream.codec.coarse else None
        if values is None and codec.name == "none":
            values = self._store.values(bucket.index)
        elif values is None:
            values = codec.decode(payload, torch.empty(bucket.numel))
        compensator.pulled(bucket.index, stream.worker, stream.session, version, values.to(self._store.device))


class JobRunner:
    """Executes the runs of all lanes of one shard.

    Args:
        store: Parameters and optimizers of the shard.
        encoder: Encoder of responses.
        writer: Writer of the weights that loops have written.
        compensator: Delay compensation; None: off.
        monitor: Divergence monitor; None: off.
        trace: Spans of the traced steps.

    Attributes:
        take: Called with a bucket at a cut and the record of its progress; None: no checkpoints.
        recorder: Set while responses have to wait for a standby.
        unsettled: On a standby that took over, copies to settle before their bucket changes, by bucket.
    """

    def __init__(
        self,
        store: Store,
        encoder: ResponseEncoder,
        writer: WeightWriter,
        compensator: Compensator | None,
        monitor: DivergenceMonitor | None,
        trace: Trace,
    ) -> None:
        self._store, self._encoder, self._writer = store, encoder, writer
        self._compensator, self._monitor, self._trace = compensator, monitor, trace
        self.take: Callable[[Bucket, Mapping[str, Any]], None] | None = None
        self.recorder: Recorder | None = None
        self.unsettled: dict[int, Sequence[Copies]] = {}

    def run(self, bucket: Bucket, jobs: Iterable[BucketJob]) -> Done:
        """Execute the jobs of one bucket, oldest first."""
        frames: list[tuple[Stream, Frame, int]] = []
        left_out: list[NonFinite] = []
        encoded: EncodedFrames = {}
        records: list[bytes] = []
        turns: list[Turn] = []
        failed: list[Failure] = []
        recorder = self.recorder
        steps, begin = 0, time.perf_counter()
        for job in jobs:
            if isinstance(job, Turn):
                try:
                    records += job.run()
                except Exception as error:  # noqa: BLE001 - it only reads
                    report_bug(f"a turn of bucket {bucket.index}", error)
                    if recorder is not None:
                        recorder.fail(error)
                turns.append(job)
            elif isinstance(job, Response):
                release = job.release
                try:
                    if recorder is not None:
                        records += recorder.answered(bucket, job)
                    frames.append(self._encode(bucket, job, encoded))
                except Exception as error:  # noqa: BLE001 - it only reads
                    told = report_bug(f"an answer to {release.worker!r} of bucket {bucket.index}", error)
                    failed.append((release.worker, release.session, told))
            else:
                left_out += self._apply(bucket, job, recorder, records, failed)
                encoded.clear()
                steps += 1
        return Done(frames, left_out, steps, time.perf_counter() - begin, records, turns, failed)

    def _encode(self, bucket: Bucket, response: Response, encoded: EncodedFrames) -> tuple[Stream, Frame, int]:
        step = -1 if response.release.step is None else response.release.step
        with self._trace.span("encode", step, bucket.index, response.release.worker or ""):
            frame, size = self._encoder.encode(bucket, response, encoded)
        return response.stream, frame, size

    def _apply(
        self,
        bucket: Bucket,
        job: Step | Update,
        recorder: Recorder | None,
        records: list[bytes],
        failed: list[Failure],
    ) -> list[NonFinite]:
        """Make one step and add to ``records`` and ``failed``; returns the gradients that were left out.

        An exception of torch's optimizer, or while weights are written, leaves the bucket half changed and ends the
        shard; what comes before and after only reads.
        """
        index, apply = bucket.index, job.apply
        for copies in self.unsettled.pop(index, ()) if self.unsettled else ():
            copies.settle(index, self._store.host(index))
        worker, _, step = apply.group
        with self._trace.span("apply", step, index, worker), self._store.changing(index, apply.version):
            written = self._writer.write(bucket, job.written) if job.written else {}
            left_out, mean = self._mean(bucket, job, failed)
            if recorder is not None:
                try:
                    records += recorder.step(bucket, apply, mean, job.hyper, written)
                except Exception as error:  # noqa: BLE001 - it only reads
                    recorder.fail(error)
            if mean is not None:
                with self._trace.span("optimizer", step, index):
                    self._store.step(index, mean, job.hyper, lr_scale=apply.lr_scale)
        if apply.record is not None and self.take is not None:
            self.take(bucket, apply.record)
        return left_out

    def _mean(self, bucket: Bucket, job: Step | Update, failed: list[Failure]) -> tuple[list[NonFinite], Mean | None]:
        """Gradient for the optimizer; None: the bucket's values stay as they are."""
        index, coefficient = bucket.index, 1.0
        if isinstance(job, Step):
            with self._trace.span("mean", job.apply.group[2], index):
                try:
                    mean, left_out = self._store.mean(index, job.gradients)
                except Exception as error:  # noqa: BLE001 - it only reads
                    mean, left_out = self._mean_of_readable(bucket, job, error, failed), []
        else:
            mean, left_out, coefficient = job.mean, job.left_out, job.coefficient or 0.0
        if mean is None or not coefficient:
            return left_out, None
        values = self._store.values(index)
        if self._monitor is not None and (observe := self._monitor.observer(index, job.apply, job.hyper, coefficient)):
            observe(mean.values.cpu(), values.cpu(), mean.absent)
        if coefficient != 1.0:
            mean = replace(mean, values=mean.values * coefficient)
        if self._compensator is not None and bucket.rule == "optimizer":
            mean = self._compensator.correct(bucket, job.apply, mean, values)
        return left_out, mean

    def _mean_of_readable(self, bucket: Bucket, step: Step, error: Exception, failed: list[Failure]) -> Mean | None:
        """The mean without the gradients on which it fails; None where the others have none. Their workers are told."""
        told = report_bug(f"the mean of bucket {bucket.index}", error)
        readable: list[tuple[Gradient, Failure]] = []
        for contribution, gradient in zip(step.apply.contributions, step.gradients, strict=True):
            failure = contribution.worker, contribution.session, told
            try:
                self._store.mean(bucket.index, [gradient])
                readable.append((gradient, failure))
            except Exception:  # noqa: BLE001 - reported once
                failed.append(failure)
        if len(readable) < len(step.gradients):
            with contextlib.suppress(Exception):  # reported once
                return self._store.mean(bucket.index, [gradient for gradient, _ in readable])[0]
        failed += [failure for _, failure in readable]  # each can be read, and all together cannot
        return None


def must_wait(job: BucketJob) -> bool:
    """Whether a job cannot run yet because the norm of its update is unknown."""
    return isinstance(job, Update) and job.coefficient is None
