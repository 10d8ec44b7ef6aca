"""Warns before asynchronous SGD diverges: measures curvature from gradients that come in anyway, on a schedule.

A gradient that is applied at version b was computed at an older one, from parameters s away. The first push whose base
is b brings the gradient at the parameters of version b itself, so the difference y of the two is the curvature times s:

    version      base ............... b ...................... t
    push applied at b: g(base)        |      push applied at t: g(b)
    s = w(b) - w(base)                       y = g(b) - g(base)            y s / s s <= largest curvature

Neither gradient is part of s, so the noise of their batches averages out. A pair is also set against the latest one
whose gradients were all applied before its own s began, for the same reason (see ``core/divergence.py``, which judges).

Rules of this file
  1. It reads parameters and gradients and never writes one; what fails here is logged once and ends the doctor, not
     the job.
  2. Calls for one bucket never overlap, calls for different buckets may: what buckets share is under the lock.
  3. Between looks a push costs one comparison. A look lasts some rounds; the first is long, because most runs that
     diverge do so at their start, and a learning rate that rises starts another at once.

Memory: about seven samples for each version of staleness; a sample is at most ``SAMPLE`` values in all buckets.
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

from torch_ps.common.optimizer_spec import Hyper
from torch_ps.common.plan import Bucket
from torch_ps.common.schema import Model
from torch_ps.ps.core.divergence import DivergenceDetector, Window
from torch_ps.ps.core.effects import Apply
from torch_ps.ps.core.lr_stability import Reading, swing
from torch_ps.ps.core.modes import Mode

log = logging.getLogger("torch_ps.ps")

F32 = npt.NDArray[np.float32]

#: Values of a shard that are looked at; all of them in a smaller model.
SAMPLE = 8192
#: Values that are taken together: a line of the processor's cache, which is what memory is read by.
RUN = 16
#: Versions of the first look.
FIRST_LOOK = 1024
#: Windows of every other look, and how many times longer the pause after it is.
LOOK, PAUSE = 10, 50
#: Pushes of a window: half a swing in one direction, and at least so many.
SHORTEST = 8
#: Workers up to which it looks: samples are kept for every version of staleness.
MOST_WORKERS = 64
#: Rise of the learning rate that calls for a look.
RISE = 1.1

#: Takes (mean gradient, parameters) of one bucket, both of shape (numel,), before the step.
Watch = Callable[[torch.Tensor, torch.Tensor], None]


@dataclass(frozen=True, slots=True)
class _Record:
    """A version: its parameters, the gradient that was applied to them, and how far they are from its base."""

    values: F32
    gradient: F32
    base: int
    moved: F32 | None


@dataclass(slots=True)
class _Open:
    """A window that some bucket has not left yet."""

    edge: int  # version at which it ends
    sums: Window = field(default_factory=Window)
    passed: int = 0  # buckets that have left it


@dataclass(frozen=True, slots=True)
class _Pair:
    made: int  # version to which the later of its gradients was applied
    moved: F32
    bent: F32


@dataclass(slots=True)
class _Patient:
    """One bucket.

    Attributes:
        index: of the runs of values that are looked at; None: all values.
        look, window: where it is.
        calm: learning rate up to which no look out of turn is needed.
    """

    index: npt.NDArray[np.int64] | None
    records: dict[int, _Record] = field(default_factory=dict)
    pairs: deque[_Pair] = field(default_factory=deque)
    look: int = 0
    window: int = 0
    calm: float = 0.0

    def sample(self, tensor: torch.Tensor) -> F32:
        """A copy."""
        values: F32 = tensor.numpy()
        if self.index is None:
            return values.copy()
        runs: F32 = values[: len(values) // RUN * RUN].reshape(-1, RUN)
        return runs.take(self.index, axis=0).reshape(-1)


class Doctor:
    """Looks after the buckets of one shard under SGD.

    Args:
        num_workers: of the roster, now.
        advise: takes a warning.
        report: takes what was read last.
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
        self._patients = {}
        for bucket in buckets:
            runs = bucket.numel // RUN
            count = max(runs * SAMPLE // total, 1)
            index = np.sort(random.choice(runs, count, replace=False)) if count < runs else None
            self._patients[bucket.index] = _Patient(index)
        self._judge = DivergenceDetector(scaled=scaled)
        self._num_workers, self._advise, self._report = num_workers, advise, report
        self._lock = threading.Lock()
        self._begin, self._end, self._look = 0, FIRST_LOOK, 0
        self._open: dict[int, _Open] = {}  # by number within this look
        self._length = SHORTEST
        self._momentum = 0.0  # seen last

    def watch(self, bucket: int, apply: Apply, hyper: Hyper, coefficient: float = 1.0) -> Watch | None:
        """What wants to see the tensors of this step; None: nothing, as nearly always.

        Args:
            coefficient: factor on the gradient (clipping).
        """
        version = apply.version - 1
        patient = self._patients.get(bucket)
        if patient is None or (version < self._begin and hyper.get("lr", 0.0) <= patient.calm):  # type: ignore[operator]
            return None
        return partial(self._guarded, partial(self._see, patient, version, apply, hyper, apply.lr_scale * coefficient))

    # -------------------------------------------------------------- one look

    def _guarded(self, see: Watch, gradient: torch.Tensor, values: torch.Tensor) -> None:
        try:
            with np.errstate(all="ignore"):  # a model that has diverged
                see(gradient, values)
        except Exception:  # whatever is wrong with the doctor, training goes on
            self._patients = {}
            log.warning("the check for divergence has failed and is off; training goes on", exc_info=True)

    def _see(
        self,
        patient: _Patient,
        version: int,
        apply: Apply,
        hyper: Hyper,
        scale: float,
        gradient: torch.Tensor,
        values: torch.Tensor,
    ) -> None:
        lr = _number(hyper, "lr", 1e-3)
        if lr <= 0 or not apply.contributions or self._num_workers() > MOST_WORKERS:
            return
        patient.calm = RISE * lr
        momentum = self._momentum = _number(hyper, "momentum", 0.0)
        sums = self._enter(patient, version)
        if sums is None:
            return
        rate = lr * (1 - _number(hyper, "dampening", 0.0)) if momentum else lr
        sign = -1.0 if hyper.get("maximize") else 1.0
        (contribution,) = apply.contributions
        stale = contribution.staleness
        found = self._pair(patient, version, stale, patient.sample(values), patient.sample(gradient))
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
        self, patient: _Patient, version: int, staleness: int, values: F32, gradient: F32
    ) -> list[tuple[F32, F32]]:
        """Changes (of the gradient, of the parameters): of the pair that this push makes, and of its swing."""
        base = version - staleness
        start = patient.records.get(base)
        moved = values - start.values if start is not None and staleness else None
        patient.records[version] = _Record(values, gradient, base, moved)
        patient.records.pop(version - 2 * self._length, None)
        if start is None or start.moved is None or base == version:
            return []
        pair = _Pair(version, start.moved, gradient - start.gradient)
        found = [(pair.bent, pair.moved)]
        pairs = patient.pairs
        while len(pairs) > 1 and pairs[1].made < start.base:
            pairs.popleft()
        if pairs and pairs[0].made < start.base:
            found.append((pair.bent - pairs[0].bent, pair.moved - pairs[0].moved))
        pairs.append(pair)
        if len(pairs) > 4 * self._length:
            pairs.popleft()
        return found

    # -------------------------------------------------------------- windows

    def _enter(self, patient: _Patient, version: int) -> Window | None:
        """Move a bucket to the window of ``version``; judge those that all have left. None: the look is over."""
        with self._lock:
            if version < self._begin:  # out of turn
                self._begin, self._end = version, version + LOOK * self._length
            if not self._open:
                self._append(0, self._begin)
            if patient.look != self._look:
                patient.look, patient.window = self._look, 0
                patient.records.clear()
                patient.pairs.clear()
            while version >= self._open[patient.window].edge:
                done = patient.window
                patient.window += 1
                if patient.window not in self._open:
                    self._append(patient.window, self._open[done].edge)
                self._open[done].passed += 1
                if self._open[done].passed == len(self._patients) and self._close(self._open.pop(done)):
                    return None
            return self._open[patient.window].sums

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


def doctor_of(
    mode: Mode,
    model: Model,
    buckets: Sequence[Bucket],
    *,
    num_workers: Callable[[], int],
    advise: Callable[[str], None],
    report: Callable[[Reading], None],
) -> Doctor | None:
    """The doctor of a shard whose gradients are stale; None where there is nothing to look after.

    Only SGD: another optimizer divides each gradient by a scale of its own, and the limits are not its limits.
    """
    if not mode.stale or model.optimizer != "SGD":
        return None
    return Doctor(buckets, scaled=mode.rate_follows_staleness, num_workers=num_workers, advise=advise, report=report)


def _number(hyper: Hyper, key: str, default: float) -> float:
    value = hyper.get(key, default)
    return float(value) if isinstance(value, int | float) else default
