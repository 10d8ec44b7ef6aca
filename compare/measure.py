"""The figures of a run, computed from the journals of its workers.

Rules of this file
  1. Pure functions of journals: no files, processes or clocks.
  2. The time of a run begins when the last worker is ready for its first step and ends with the last worker's end. It
     includes neither the start of processes nor the evaluation of the model.
  3. Bytes are means over the workers; samples are those of the whole job.

    w0: |start----step--step--step--end
    w1:     |start--step----step----end
            ^ 0 s                   ^ seconds
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from torch_ps.compare.events import Journal, Step
from torch_ps.compare.results import (
    Bytes,
    CurvePoint,
    RunResult,
    Staleness,
    TrainingPoint,
    WorkerDetail,
    finite,
)

#: Points of a training curve; more than a screen shows would only make the report larger.
TRAINING_POINTS = 120
#: Relative distance of the common target above the best loss of the worst run.
RELAXED = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInfo:
    """Name, options and command of a run."""

    name: str
    mode: str
    compress: str
    compress_pull: str
    lr: float
    command: str


def measure(info: RunInfo, journals: Sequence[Journal]) -> RunResult:
    """Compute the result of one finished run, without ``seconds_to_target``.

    Args:
        info: name, options and command of the run.
        journals: journals of all workers in rank order, each with at least one step.
    """
    origin = max(journal.start.time for journal in journals)
    seconds = max(0.0, max(_end_time(journal) for journal in journals) - origin)
    samples = sum(journal.samples for journal in journals)
    traffic = [_Traffic(journal) for journal in journals]
    curve = [
        CurvePoint(
            seconds=max(0.0, evaluation.time - origin),
            samples=evaluation.job_samples,
            bytes=_bytes_at(traffic, evaluation.time),
            loss=finite(evaluation.metrics["loss"]),
            accuracy=finite(evaluation.metrics.get("accuracy")),
        )
        for journal in journals
        for evaluation in journal.evaluations
    ]
    curve.sort(key=lambda point: point.samples)
    return RunResult(
        name=info.name,
        mode=info.mode,
        compress=info.compress,
        compress_pull=info.compress_pull,
        lr=info.lr or _rate(journals),
        workers=len(journals),
        batch_size=_batch_size(journals),
        samples=samples,
        seconds=seconds,
        samples_per_second=samples / seconds if seconds > 0 else 0.0,
        validation_loss=curve[-1].loss if curve else None,
        validation_accuracy=curve[-1].accuracy if curve else None,
        seconds_to_target=None,
        staleness=staleness(step for journal in journals for step in journal.steps),
        bytes=Bytes(
            pushed_per_worker=round(_mean(each.pushed[-1] for each in traffic)),
            pulled_per_worker=round(_mean(each.pulled[-1] for each in traffic)),
        ),
        curve=curve,
        training=_training(journals, traffic, origin, samples),
        workers_detail=[
            WorkerDetail(
                name=journal.start.name,
                steps=journal.end.steps if journal.end else len(journal.steps),
                samples=journal.samples,
                seconds=max(0.0, _end_time(journal) - journal.start.time),
                wait_seconds=journal.steps[-1].wait_seconds,
            )
            for journal in journals
        ],
        text=next((journal.text for journal in journals if journal.text is not None), None),
        command=info.command,
    )


def staleness(steps: Iterable[Step]) -> Staleness:
    """Mean, maximum and histogram over all pushes; steps that pushed nothing are left out."""
    counts = Counter(step.staleness for step in steps if step.staleness is not None)
    total = sum(counts.values())
    mean = sum(value * count for value, count in counts.items()) / total if total else 0.0
    histogram = {str(value): counts[value] for value in sorted(counts)}
    return Staleness(mean=mean, max=max(counts, default=0), histogram=histogram)


def seconds_to(target: float, curve: Sequence[CurvePoint]) -> float | None:
    """Seconds at which the validation loss first reached ``target``, interpolated linearly; None if it never did.

    Nothing is interpolated across a point whose loss is not finite.
    """
    before: CurvePoint | None = None
    for point in curve:
        if point.loss is None:
            before = None
            continue
        if point.loss <= target:
            if before is None or before.loss is None:
                return point.seconds
            share = (before.loss - target) / (before.loss - point.loss)
            return before.seconds + share * (point.seconds - before.seconds)
        before = point
    return None


def common_target(runs: Sequence[RunResult]) -> float | None:
    """A validation loss that every run reached: the best loss of the worst run plus 1 %, rounded up to three digits.

    Runs whose loss never fell below its first value are left out; None if no run is left.
    """
    best: list[float] = []
    for run in runs:
        losses = [point.loss for point in run.curve if point.loss is not None]
        if len(losses) > 1 and min(losses) < losses[0]:
            best.append(min(losses))
    if not best:
        return None
    return _round_up(max(best) + RELAXED * abs(max(best)))


def with_target(runs: Sequence[RunResult], target: float | None) -> list[RunResult]:
    """The same results with ``seconds_to_target`` filled in."""
    return [replace(run, seconds_to_target=None if target is None else seconds_to(target, run.curve)) for run in runs]


class _Traffic:
    """Bytes that one worker has pushed and pulled, as a function of time."""

    def __init__(self, journal: Journal) -> None:
        self.times = [journal.start.time, *(step.time for step in journal.steps)]
        self.pushed = [0, *(step.pushed_bytes for step in journal.steps)]
        self.pulled = [0, *(step.pulled_bytes for step in journal.steps)]
        if journal.end:
            self.times.append(max(journal.end.time, self.times[-1]))
            self.pushed.append(journal.end.pushed_bytes)
            self.pulled.append(journal.end.pulled_bytes)

    def at(self, now: float) -> float:
        """Bytes pushed and pulled until ``now``, interpolated linearly between steps."""
        after = bisect_right(self.times, now)
        if after == 0:
            return 0.0
        here = self.pushed[after - 1] + self.pulled[after - 1]
        if after == len(self.times):
            return here
        span = self.times[after] - self.times[after - 1]
        share = (now - self.times[after - 1]) / span if span > 0 else 1.0
        return here + share * (self.pushed[after] + self.pulled[after] - here)


def _bytes_at(traffic: Sequence[_Traffic], now: float) -> int:
    return round(_mean(each.at(now) for each in traffic))


def _training(
    journals: Sequence[Journal], traffic: Sequence[_Traffic], origin: float, samples: int
) -> list[TrainingPoint]:
    """Training loss over the steps of all workers in order of time, averaged over equal spans of samples."""
    steps = sorted((step for journal in journals for step in journal.steps), key=lambda step: step.time)
    width = max(1.0, samples / TRAINING_POINTS)
    points: list[TrainingPoint] = []
    stretch: list[Step] = []
    edge = width
    for index, step in enumerate(steps):
        stretch.append(step)
        if step.job_samples < edge and index + 1 < len(steps):
            continue
        now = step.time
        points.append(
            TrainingPoint(
                seconds=max(0.0, now - origin),
                samples=max(each.job_samples for each in stretch),
                bytes=_bytes_at(traffic, now),
                loss=finite(_mean(each.loss for each in stretch)),
            )
        )
        edge = max(edge + width, step.job_samples + width / 2)
        stretch = []
    return points


def _end_time(journal: Journal) -> float:
    return journal.end.time if journal.end else journal.steps[-1].time


def _batch_size(journals: Sequence[Journal]) -> int:
    journal = journals[0]
    said = journal.start.settings.get("batch_size")
    return int(said) if isinstance(said, int) and said > 0 else journal.steps[0].samples


def _rate(journals: Sequence[Journal]) -> float:
    """Learning rate that the task chose, as the worker reported it; 0 if it did not."""
    said = journals[0].start.settings.get("lr")
    return float(said) if isinstance(said, int | float) else 0.0


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found) if found else 0.0


def _round_up(value: float) -> float:
    """Round up to three significant digits: rounded down, a target could be one that a run just missed."""
    if value == 0 or not math.isfinite(value):
        return value
    unit = 10.0 ** (math.floor(math.log10(abs(value))) - 2)
    return float(f"{math.ceil(value / unit) * unit:.6g}")
