"""Warns before asynchronous SGD diverges: estimates curvature from the pushed gradients, on a schedule.

A gradient that is applied at version b was computed at an older version, from parameters at a distance s. The first
push whose base is b carries the gradient at the parameters of version b itself, so the difference y of the two is the
curvature times s:

    version      base ............... b ...................... t
    push applied at b: g(base)        |      push applied at t: g(b)
    s = w(b) - w(base)                       y = g(b) - g(base)            y s / s s <= largest curvature

Neither gradient is part of s, so the noise of their batches averages out. For the same reason a pair is also compared
with the latest pair whose gradients were all applied before its own s began (``core/divergence.py`` judges both).

Rules of this file
  1. It reads parameters and gradients and never writes them. An exception here is logged once and turns the monitor
     off; the job continues.
  2. Calls for one bucket never overlap, calls for different buckets may: the lock guards what buckets share.
  3. Between looks a push costs one comparison. A look lasts some rounds. The first is long, because most runs that
     diverge do so at their start; a rising learning rate starts another look at once.

Memory: about seven samples for each version of staleness; a sample has at most ``SAMPLE`` values over all buckets.
"""

import logging
import math
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from torch_ps.common.optimizer_spec import Hyper, number_of
from torch_ps.common.plan import Bucket
from torch_ps.common.schema import Model
from torch_ps.ps.core.divergence import DivergenceDetector, Window
from torch_ps.ps.core.effects import Apply
from torch_ps.ps.core.lr_stability import Reading, swing
from torch_ps.ps.core.modes import Mode

log = logging.getLogger("torch_ps.ps")

F32 = npt.NDArray[np.float32]

#: Number of sampled values of a shard; a smaller model is sampled whole.
SAMPLE = 8192
#: Length of a run of sampled values: one cache line, the unit in which memory is read.
RUN = 16
#: Number of versions in the first look.
FIRST_LOOK = 1024
#: Number of windows in every later look, and length of the pause after a look as a multiple of it.
LOOK, PAUSE = 10, 50
#: Smallest number of pushes in a window, which is half an oscillation long.
SHORTEST = 8
#: Largest number of workers at which it looks: it keeps samples for every version of staleness.
MOST_WORKERS = 64
#: Factor by which the learning rate has to rise to start a look.
RISE = 1.1

#: Called with (mean gradient, parameters, positions of the pieces without a gradient) of one bucket before its step;
#: both tensors are fp32 of shape (numel,) on the CPU.
StepObserver = Callable[[torch.Tensor, torch.Tensor, tuple[int, ...]], None]


@dataclass(frozen=True, slots=True)
class _Record:
    """One version: its parameters, the gradient applied to them, and their change since the gradient's base.

    ``present`` is 1 where there is a gradient and 0 elsewhere; None: there is one everywhere.
    """

    values: F32
    gradient: F32
    present: F32 | None
    base: int
    moved: F32 | None


@dataclass(slots=True)
class _Open:
    """A window that at least one bucket has not left."""

    edge: int  # version at which it ends
    sums: Window = field(default_factory=Window)
    passed: int = 0  # buckets that have left it


@dataclass(frozen=True, slots=True)
class _Pair:
    made: int  # version to which the later of its gradients was applied
    moved: F32
    bent: F32


@dataclass(slots=True)
class _Samples:
    """Samples of one bucket.

    Attributes:
        bucket: The bucket.
        index: Indices of the sampled runs; None: all values are sampled.
        records: Versions of the last two windows.
        pairs: Pairs of gradients, oldest first.
        look, window: Numbers of the look and the window that the bucket is in.
        calm: Largest learning rate that starts no look out of turn.
    """

    bucket: Bucket
    index: npt.NDArray[np.int64] | None
    records: dict[int, _Record] = field(default_factory=dict)
    pairs: deque[_Pair] = field(default_factory=deque)
    look: int = 0
    window: int = 0
    calm: float = 0.0

    def sample(self, tensor: torch.Tensor) -> F32:
        """Copy of the sampled values of ``tensor``."""
        values: F32 = tensor.numpy()
        if self.index is None:
            return values.copy()
        runs: F32 = values[: len(values) // RUN * RUN].reshape(-1, RUN)
        return runs.take(self.index, axis=0).reshape(-1)

    def present(self, absent: tuple[int, ...]) -> F32 | None:
        """0 for the sampled values of the pieces ``absent``, 1 for the others; None: 1 for all."""
        if not absent:
            return None
        mask = torch.ones(self.bucket.numel)
        for span in self.bucket.spans(absent):
            mask[span] = 0.0
        return self.sample(mask)


class DivergenceMonitor:
    """Monitors the buckets of one shard under SGD.

    Args:
        buckets: Buckets of the shard.
        scaled: Whether the learning rate shrinks with staleness.
        num_workers: Returns the number of workers in the roster.
        advise: Called with each warning.
        report: Called with each new reading.
    """

    def __init__(
        self,
        buckets: Sequence[Bucket],
        *,
        scaled: bool,
        num_workers: Callable[[], int],
        advise: Callable[[str], None],
        report: Callable[[Reading], None],
    ) -> None:
        buckets = [bucket for bucket in buckets if bucket.rule == "optimizer"]
        total = sum(bucket.numel for bucket in buckets)
        random = np.random.default_rng(0)
        self._buckets = {}
        for bucket in buckets:
            runs = bucket.numel // RUN
            count = max(runs * SAMPLE // total, 1)
            index = np.sort(random.choice(runs, count, replace=False)) if count < runs else None
            self._buckets[bucket.index] = _Samples(bucket, index)
        self._judge = DivergenceDetector(scaled=scaled)
        self._num_workers, self._advise, self._report = num_workers, advise, report
        self._lock = threading.Lock()
        self._begin, self._end, self._look = 0, FIRST_LOOK, 0
        self._open: dict[int, _Open] = {}  # by number within this look
        self._length = SHORTEST
        self._momentum = 0.0  # seen last

    def observer(self, bucket: int, apply: Apply, hyper: Hyper, coefficient: float = 1.0) -> StepObserver | None:
        """What has to see the tensors of one step; None for nearly every step: nothing.

        Args:
            bucket: Index of the bucket.
            apply: The step.
            hyper: Hyperparameters of the step.
            coefficient: Factor on the gradient, from clipping.
        """
        version = apply.version - 1
        samples = self._buckets.get(bucket)
        if samples is None or (version < self._begin and number_of(hyper.get("lr", 0.0)) <= samples.calm):
            return None
        return partial(self._guarded, partial(self._see, samples, version, apply, hyper, apply.lr_scale * coefficient))

    # -------------------------------------------------------------- one look

    def _guarded(
        self, see: StepObserver, gradient: torch.Tensor, values: torch.Tensor, absent: tuple[int, ...] = ()
    ) -> None:
        try:
            with np.errstate(all="ignore"):  # a model that has diverged
                see(gradient, values, absent)
        except Exception:  # rule 1
            self._buckets = {}
            log.warning("the check for divergence has failed and is off; training goes on", exc_info=True)

    def _see(
        self,
        samples: _Samples,
        version: int,
        apply: Apply,
        hyper: Hyper,
        scale: float,
        gradient: torch.Tensor,
        values: torch.Tensor,
        absent: tuple[int, ...],
    ) -> None:
        lr = number_of(hyper.get("lr"), 1e-3)
        if lr <= 0 or not apply.contributions or self._num_workers() > MOST_WORKERS:
            return
        samples.calm = RISE * lr
        momentum = self._momentum = number_of(hyper.get("momentum"), 0.0)
        sums = self._enter(samples, version)
        if sums is None:
            return
        rate = lr * (1 - number_of(hyper.get("dampening"), 0.0)) if momentum else lr
        sign = -1.0 if hyper.get("maximize") else 1.0
        (contribution,) = apply.contributions
        stale = contribution.staleness
        found = self._pair(
            samples, version, stale, samples.sample(values), samples.sample(gradient), samples.present(absent)
        )
        with self._lock:
            sums.pushes += 1
            sums.scaled += scale * stale
            sums.scale += scale
            sums.rate, sums.momentum = max(sums.rate, lr), max(sums.momentum, momentum)
            sums.nesterov = bool(hyper.get("nesterov"))
            sums.workers.add(contribution.worker)
            for view, (bent, moved) in zip((sums.path, sums.swing), found, strict=False):
                energy = float(moved @ moved)
                view.add(sign * float(bent @ moved), energy, rate)

    def _pair(
        self, samples: _Samples, version: int, staleness: int, values: F32, gradient: F32, present: F32 | None
    ) -> list[tuple[F32, F32]]:
        """(change of the gradient, change of the parameters) for the pair that this push makes and for its swing."""
        base = version - staleness
        start = samples.records.get(base)
        moved = values - start.values if start is not None and staleness else None
        samples.records[version] = _Record(values, gradient, present, base, moved)
        samples.records.pop(version - 2 * self._length, None)
        if start is None or start.moved is None or base == version:
            return []
        pair = _Pair(version, start.moved, gradient - start.gradient)
        for mask in (start.present, present):  # a change that only one of the gradients shows is no curvature
            if mask is not None:
                pair = _Pair(version, pair.moved * mask, pair.bent * mask)
        found = [(pair.bent, pair.moved)]
        pairs = samples.pairs
        while len(pairs) > 1 and pairs[1].made < start.base:
            pairs.popleft()
        if pairs and pairs[0].made < start.base:
            found.append((pair.bent - pairs[0].bent, pair.moved - pairs[0].moved))
        pairs.append(pair)
        if len(pairs) > 4 * self._length:
            pairs.popleft()
        return found

    # -------------------------------------------------------------- windows

    def _enter(self, samples: _Samples, version: int) -> Window | None:
        """Move a bucket to the window of ``version`` and judge windows that all have left. None: the look is over."""
        with self._lock:
            if version < self._begin:  # out of turn
                self._begin, self._end = version, version + LOOK * self._length
            if not self._open:
                self._append(0, self._begin)
            if samples.look != self._look:
                samples.look, samples.window = self._look, 0
                samples.records.clear()
                samples.pairs.clear()
            while version >= self._open[samples.window].edge:
                done = samples.window
                samples.window += 1
                if samples.window not in self._open:
                    self._append(samples.window, self._open[done].edge)
                self._open[done].passed += 1
                if self._open[done].passed == len(self._buckets) and self._close(self._open.pop(done)):
                    return None
            return self._open[samples.window].sums

    def _append(self, number: int, version: int) -> None:
        half = swing(max(self._num_workers() - 1, 0), self._momentum) / 2
        self._length = max(math.ceil(half), SHORTEST)
        self._open[number] = _Open(version + self._length)

    def _close(self, window: _Open) -> bool:
        """Judge a window; True: the look is over."""
        sentence = self._judge.judge(window.sums) if window.sums.scale > 0 else None
        if sentence:
            self._advise(sentence)
        if self._judge.reading is not None:
            self._report(self._judge.reading)
        if window.edge < self._end or self._judge.alarmed:
            return False
        self._look += 1
        self._begin = window.edge + PAUSE * LOOK * self._length
        self._end = self._begin + LOOK * self._length
        self._open.clear()
        self._judge.interrupted()
        return True


def create_monitor(
    mode: Mode,
    model: Model,
    buckets: Sequence[Bucket],
    *,
    num_workers: Callable[[], int],
    advise: Callable[[str], None],
    report: Callable[[Reading], None],
) -> DivergenceMonitor | None:
    """Monitor of a shard that applies stale gradients of SGD; None under any other mode or optimizer.

    Other optimizers divide each gradient by a scale of their own, so the limits of SGD do not apply to them.
    """
    if not mode.stale or model.optimizer != "SGD":
        return None
    return DivergenceMonitor(
        buckets, scaled=mode.rate_follows_staleness, num_workers=num_workers, advise=advise, report=report
    )
