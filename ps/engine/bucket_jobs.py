"""Work on the tensors of one bucket: what the engine has put in its lane, in order, one run at a time.

    Step | Update --> mean --> compensate --> optimizer --> record for the standby, copy for a cut
    Answer --> encode, once for all workers that have the same to come
    Turn --> whatever else has to happen in this order

Runs on a thread of the executor or, of a small bucket, on the event loop (``lanes.py``). What it makes goes
back to the loop as one ``Done``; nothing here sends or counts.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from torch_ps.common.codecs.pulled_copies import Copies
from torch_ps.common.optimizer_spec import Hyper
from torch_ps.common.plan import Bucket
from torch_ps.common.trace import Trace
from torch_ps.ps.core.effects import Apply
from torch_ps.ps.engine.delay_compensation import Compensator
from torch_ps.ps.engine.divergence_monitor import Doctor
from torch_ps.ps.engine.grad_clip import Update
from torch_ps.ps.engine.parameter_store import Gradient, NonFinite, Store
from torch_ps.ps.engine.recorder import Recorder
from torch_ps.ps.engine.responses import Answer, Answers, Shared
from torch_ps.ps.engine.shared_memory import Arenas
from torch_ps.ps.transport.streams import Stream

#: Bytes of a frame that is not held up for others.
LARGE_FRAME = 4096


@dataclass(frozen=True, slots=True)
class Step:
    """An ``Apply`` with the gradients it averages."""

    apply: Apply
    gradients: tuple[Gradient, ...]
    hyper: Hyper


@dataclass(frozen=True, slots=True)
class Turn:
    """Something else to do with one bucket in its lane's order: in its run, then ``done`` on the event loop."""

    run: Callable[[], Sequence[bytes]]  # gives frames for the standby
    done: Callable[[], None] = lambda: None


Job = Step | Update | Answer | Turn


@dataclass(frozen=True, slots=True)
class Done:
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


class Work:
    """What ``Lanes`` runs. The arguments are the engine's own.

    Attributes:
        take: called with a bucket that has come to a cut and its record.
        recorder: while answers wait for a standby.
        unsettled: of a standby that took over: copies to settle before a bucket changes, by bucket.
    """

    def __init__(
        self,
        store: Store,
        arenas: Arenas,
        answers: Answers,
        compensator: Compensator | None,
        doctor: Doctor | None,
        trace: Trace,
    ) -> None:
        self._store, self._arenas, self._answers = store, arenas, answers
        self._compensator, self._doctor, self._trace = compensator, doctor, trace
        self.take: Callable[[Bucket, Mapping[str, Any]], None] | None = None
        self.recorder: Recorder | None = None
        self.unsettled: dict[int, Sequence[Copies]] = {}

    def run(self, bucket: Bucket, jobs: Iterable[Job]) -> Done:
        """Do the jobs of one bucket, oldest first."""
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
            elif isinstance(job, Answer):
                if recorder is not None:
                    records += recorder.answered(bucket, job)
                frames.append(self._encoded(bucket, job, shared))
            else:
                left_out += self._applied(bucket, job, recorder, records)
                shared.clear()
                steps += 1
        return Done(frames, left_out, steps, time.perf_counter() - begin, records, turns)

    def _encoded(self, bucket: Bucket, answer: Answer, shared: Shared) -> tuple[Stream, bytes, int]:
        step = -1 if answer.release.step is None else answer.release.step
        with self._trace.span("encode", step, bucket.index, answer.release.worker or ""):
            frame, size = self._answers.frame(bucket, answer, shared)
        return answer.stream, frame, size

    def _applied(
        self, bucket: Bucket, job: Step | Update, recorder: Recorder | None, records: list[bytes]
    ) -> list[NonFinite]:
        """Make a step; what of it was not finite. Adds to ``records``."""
        index, apply = bucket.index, job.apply
        for copies in self.unsettled.pop(index, ()) if self.unsettled else ():
            copies.settle(index, self._store.host(index))
        worker, _, step = apply.group
        with self._trace.span("apply", step, index, worker), self._arenas.changing(index, apply.version):
            left_out, mean = self._update(bucket, job)
            if recorder is not None:
                records += recorder.step(bucket, apply, mean, job.hyper)
            if mean is not None:
                with self._trace.span("optimizer", step, index):
                    self._store.step(index, mean, job.hyper, lr_scale=apply.lr_scale)
        if apply.record is not None and self.take is not None:
            self.take(bucket, apply.record)
        return left_out

    def _update(self, bucket: Bucket, job: Step | Update) -> tuple[list[NonFinite], torch.Tensor | None]:
        """What the optimizer gets, fp32 of shape (numel,); None: nothing, so that the bucket stays as it is."""
        index, coefficient = bucket.index, 1.0
        if isinstance(job, Step):
            with self._trace.span("mean", job.apply.group[2], index):
                mean, left_out = self._store.mean(index, job.gradients)
        else:
            mean, left_out, coefficient = job.mean, job.left_out, job.coefficient or 0.0
        if mean is None or not coefficient:
            return left_out, None
        values = self._store.values(index)
        if self._doctor is not None and (watch := self._doctor.watch(index, job.apply, job.hyper, coefficient)):
            watch(mean.cpu(), values.cpu())
        if coefficient != 1.0:
            mean = mean * coefficient
        if self._compensator is not None and bucket.rule == "optimizer":
            mean = self._compensator.correct(index, job.apply, mean, values)
        return left_out, mean


def waits(job: Job) -> bool:
    """Whether it cannot run yet: the norm of its update is not known."""
    return isinstance(job, Update) and job.coefficient is None
