"""Divergence detector: warns of a run that diverges, from the curvature of its path and the growth of its swings.

It judges windows of a few rounds of pushes. A learning rate above the limit is not enough for a warning: real losses
flatten where parameters swing widely, so a healthy run stays at the limit for most of its time ("edge of stability"),
and exceeds it by a fifth for some rounds without harm. A run diverges when its curvature is above the limit and its
swings grow,

    fast     by 4 times in energy within two windows, or
    at once  by 10 times within two windows, of which one alone is above the limit, or
    slow     by 1000 times since the curvature was below the limit last.

Two views of the path are judged alike: the whole displacement, which is there first, and the difference of two
displacements half a swing apart, in which the drift of training cancels and the swing adds up.

The thresholds separate learning rates 0.2 and 0.3 from 0.1 on the task of digits (tests/conformance/test_stability.py).

Source: Cohen et al., ICLR 2021, arXiv:2103.00065, for the edge of stability.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

from torch_ps.ps.core.lr_stability import Reading

FAST_GROWTH, SUDDEN_GROWTH, SLOW_GROWTH = 4.0, 10.0, 1000.0
#: Warnings of one job, at most; a warning is repeated only for other settings.
MOST_WARNINGS = 5
#: Relative change of the learning rate from which the settings count as others.
CHANGE = 0.1


@dataclass(slots=True)
class PathSums:
    """Sums over pairs of gradients, where y is the change of the gradient and s that of the parameters.

    Attributes:
        bend: sum of y s, without weight decay, which is never stale and can only help.
        metric: sum of s s / lr, so that ``bend / metric`` is lr times curvature also with several learning rates.
        energy: sum of s s.
        pairs: number of pairs that were added.
    """

    bend: float = 0.0
    metric: float = 0.0
    energy: float = 0.0
    pairs: int = 0

    def add(self, bend: float, energy: float, rate: float) -> None:
        self.bend += bend
        self.metric += energy / rate
        self.energy += energy
        self.pairs += 1


@dataclass(slots=True)
class Window:
    """Some rounds of pushes, over all buckets.

    Attributes:
        pushes: number of pushes, where each bucket of a push counts.
        scaled: sum over pushes of the factor on the learning rate times the staleness.
        scale: sum over pushes of the factor on the learning rate.
        rate: largest learning rate.
    """

    path: PathSums = field(default_factory=PathSums)
    swing: PathSums = field(default_factory=PathSums)
    pushes: int = 0
    scaled: float = 0.0
    scale: float = 0.0
    rate: float = 0.0
    momentum: float = 0.0
    nesterov: bool = False
    workers: set[str] = field(default_factory=set)


@dataclass(slots=True)
class _Trend:
    """One of the two views, over the windows."""

    widths: deque[float] = field(default_factory=lambda: deque(maxlen=3))  # energy per pair and lr squared
    before: PathSums = field(default_factory=PathSums)
    since: float | None = None  # the width when the limit was passed

    def follow(self, view: PathSums, rate: float) -> tuple[PathSums, float]:
        """Add a window; gives the sums of the last two windows, and the width of the last one."""
        both = PathSums(*(getattr(view, name) + getattr(self.before, name) for name in PathSums.__slots__))
        self.before = view
        width = view.energy / view.pairs / rate**2
        self.widths.append(width)
        return both, width


class DivergenceDetector:
    """Judges windows in order, and gives a warning when the run diverges.

    Args:
        scaled: whether the learning rate is divided by 1 + staleness already.
    """

    def __init__(self, *, scaled: bool) -> None:
        self._scaled = scaled
        self._trends = {"path": _Trend(), "swing": _Trend()}
        self._said: list[Reading] = []
        self.reading: Reading | None = None  # the steeper of the two views, of the last two windows

    @property
    def alarmed(self) -> bool:
        """Whether the curvature is above the limit, which is worth a closer look."""
        return self.reading is not None and self.reading.ratio > 1

    def interrupted(self) -> None:
        """Forget the growth so far: the next window does not follow the last one."""
        for trend in self._trends.values():
            trend.widths.clear()
            trend.before = PathSums()

    def judge(self, window: Window) -> str | None:
        """Judge one more window; gives the warning, if it is time for one."""
        lost: list[Reading] = []
        readings = []
        for name, trend in self._trends.items():
            view: PathSums = getattr(window, name)
            if 8 * view.pairs < window.pushes or not 0 < view.energy < math.inf or not math.isfinite(view.bend):
                continue
            before = trend.before
            both, width = trend.follow(view, window.rate)
            reading = self._read(window, both)
            readings.append(reading)
            growth = width / trend.widths[0] if len(trend.widths) == 3 else 0.0
            peak = max((self._read(window, each) for each in (view, before) if each.pairs), key=lambda r: r.ratio)
            if growth >= SUDDEN_GROWTH and peak.ratio > 1:
                lost.append(peak)
            if reading.ratio <= 1:
                trend.since = None
                continue
            if trend.since is None:
                trend.since = width
            if growth >= FAST_GROWTH or width >= SLOW_GROWTH * trend.since:
                lost.append(reading)
        self.reading = max(readings, key=lambda r: r.ratio, default=self.reading)
        if not lost:
            return None
        worst = max(lost, key=lambda r: r.ratio)
        if len(self._said) == MOST_WARNINGS or any(_alike(worst, said) for said in self._said):
            return None
        self._said.append(worst)
        return worst.sentence()

    def _read(self, window: Window, view: PathSums) -> Reading:
        return Reading(
            rate=window.rate,
            product=max(view.bend / view.metric * window.scale / window.pushes, 0.0),
            curvature=max(view.bend / view.energy, 0.0),
            num_workers=len(window.workers),
            staleness=window.scaled / window.scale,
            momentum=window.momentum,
            nesterov=window.nesterov,
            scaled=self._scaled,
        )


def _alike(one: Reading, other: Reading) -> bool:
    return (
        abs(one.rate - other.rate) <= CHANGE * other.rate
        and one.num_workers <= other.num_workers
        and one.momentum <= other.momentum
    )
