"""Merges the results of several seeds of one configuration into one: means and ranges.

    RunResult of each seed --merge_seeds--> RunResult, whose curves and figures are means, with ranges beside them

Rules of this file
  1. Pure functions. Curves are averaged at the samples of the first seed's points; other seeds are interpolated there
     linearly.
  2. A figure that one seed lacks (no accuracy, a loss that diverged) is null, as it is in one run.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from torch_ps.compare.results import (
    Bytes,
    CurvePoint,
    Range,
    RunResult,
    Spread,
    Staleness,
    TrainingPoint,
    WorkerDetail,
)

Point = TypeVar("Point", CurvePoint, TrainingPoint)


def merge_seeds(results: Sequence[RunResult], seeds: Sequence[int]) -> RunResult:
    """Merge the results of several seeds into one; a single result is returned unchanged.

    Args:
        results: results of one configuration, one per seed that finished, at least one.
        seeds: seeds in the order of ``results``.
    """
    first = results[0]
    if len(results) == 1:
        return first
    return replace(
        first,
        samples=round(_mean(run.samples for run in results)),
        seconds=_mean(run.seconds for run in results),
        samples_per_second=_mean(run.samples_per_second for run in results),
        validation_loss=_known_mean([run.validation_loss for run in results]),
        validation_accuracy=_known_mean([run.validation_accuracy for run in results]),
        staleness=_staleness([run.staleness for run in results]),
        bytes=Bytes(
            pushed_per_worker=round(_mean(run.bytes.pushed_per_worker for run in results)),
            pulled_per_worker=round(_mean(run.bytes.pulled_per_worker for run in results)),
        ),
        curve=[_curve_point(points) for points in _aligned([run.curve for run in results])],
        training=[_training_point(points) for points in _aligned([run.training for run in results])],
        workers_detail=[_worker(each) for each in zip(*[run.workers_detail for run in results], strict=False)],
        command="\n".join(run.command for run in results),
        seeds=list(seeds),
        spread=Spread(
            validation_loss=_range([run.validation_loss for run in results]),
            validation_accuracy=_range([run.validation_accuracy for run in results]),
            samples_per_second=_range([run.samples_per_second for run in results]),
        ),
    )


def _aligned(curves: Sequence[Sequence[Point]]) -> list[list[Point]]:
    """For each point of the first curve, that point and the other curves at its samples."""
    others = [curve for curve in curves[1:] if curve]
    aligned: list[list[Point]] = []
    for point in curves[0]:
        there: list[Point] = [point]
        there.extend(_at(curve, point.samples) for curve in others)
        aligned.append(there)
    return aligned


def _at(curve: Sequence[Point], samples: int) -> Point:
    """The curve at ``samples``, interpolated linearly; beyond its ends, its last point."""
    right = bisect_left(curve, samples, key=lambda point: point.samples)
    if right == len(curve) or right == 0 or curve[right].samples == samples:
        return curve[min(right, len(curve) - 1)]
    one, other = curve[right - 1], curve[right]
    share = (samples - one.samples) / (other.samples - one.samples)

    def between(a: float | None, b: float | None) -> float | None:
        return None if a is None or b is None else a + share * (b - a)

    fields: dict[str, Any] = {
        "seconds": one.seconds + share * (other.seconds - one.seconds),
        "samples": samples,
        "bytes": round(one.bytes + share * (other.bytes - one.bytes)),
        "loss": between(one.loss, other.loss),
    }
    if isinstance(one, CurvePoint) and isinstance(other, CurvePoint):
        fields["accuracy"] = between(one.accuracy, other.accuracy)
    return replace(one, **fields)


def _curve_point(points: Sequence[CurvePoint]) -> CurvePoint:
    loss, accuracy = _range([p.loss for p in points]), _range([p.accuracy for p in points])
    return CurvePoint(
        seconds=_mean(p.seconds for p in points),
        samples=round(_mean(p.samples for p in points)),
        bytes=round(_mean(p.bytes for p in points)),
        loss=_known_mean([p.loss for p in points]),
        accuracy=_known_mean([p.accuracy for p in points]),
        loss_range=loss,
        accuracy_range=accuracy,
    )


def _training_point(points: Sequence[TrainingPoint]) -> TrainingPoint:
    return TrainingPoint(
        seconds=_mean(p.seconds for p in points),
        samples=round(_mean(p.samples for p in points)),
        bytes=round(_mean(p.bytes for p in points)),
        loss=_known_mean([p.loss for p in points]),
        loss_range=_range([p.loss for p in points]),
    )


def _staleness(each: Sequence[Staleness]) -> Staleness:
    histogram: Counter[str] = Counter()
    for one in each:
        histogram.update(one.histogram)
    pushes = sum(histogram.values())
    mean = sum(int(value) * count for value, count in histogram.items()) / pushes if pushes else 0.0
    return Staleness(mean=mean, max=max(one.max for one in each), histogram=dict(histogram))


def _worker(each: Sequence[WorkerDetail]) -> WorkerDetail:
    return WorkerDetail(
        name=each[0].name,
        steps=round(_mean(one.steps for one in each)),
        samples=round(_mean(one.samples for one in each)),
        seconds=_mean(one.seconds for one in each),
        wait_seconds=_mean(one.wait_seconds for one in each),
    )


def _range(values: Sequence[float | None]) -> Range | None:
    known = [value for value in values if value is not None]
    return Range(low=min(known), high=max(known)) if len(known) == len(values) else None


def _known_mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return _mean(known) if len(known) == len(values) else None


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)
