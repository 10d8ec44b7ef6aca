"""Stability of learning rates: how large a rate may be when gradients are stale, and the sentences that quote it.

The model is x_{t+1} = x_t + mu (x_t - x_{t-1}) - a x_{t-tau}: SGD with momentum mu along one direction of
curvature lambda, with a = lr lambda and gradients that are tau versions old. It is stable iff 0 < a < ``limit``.

A root of z^2 - (1 + mu) z + mu + a z^(1-tau) on the unit circle, z = exp(i theta), asks for a = |z - 1| |z - mu| and

    (tau - 1/2) theta + arg(z - mu) = pi / 2

The left side grows with theta from 0 on, so one theta solves it: at that a, and at no other, roots leave the circle. No
polynomial is built, so neither the size of tau matters nor whether it is whole. Without momentum theta is
pi / (2 tau + 1) and the limit is 2 sin(pi / (2 (2 tau + 1))). Momentum as torch's ``nesterov=True`` multiplies a by
(1 + mu) - mu / z; the same argument holds.

Source: Levin and May, 1976, for mu = 0; momentum is the same boundary with one factor more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

#: Momentum from which a join is worth a word, and workers up to which it is not.
HIGH_MOMENTUM, FEW_WORKERS = 0.9, 2


def limit(staleness: float, momentum: float = 0.0, *, nesterov: bool = False) -> float:
    """The learning rate times curvature below which SGD is stable.

    Args:
        staleness: mean number of versions that a gradient is old, >= 0; for a mixture the mean decides.
        momentum: momentum of SGD, >= 0; from 1 on nothing is stable.
        nesterov: whether the momentum is that of torch's ``nesterov=True``.

    Returns:
        0 to 2 (1 + momentum); 2 for plain SGD on fresh gradients.
    """
    if momentum >= 1:
        return 0.0
    z = _crossing(staleness, momentum, nesterov)
    return abs(z - 1) * abs(z - momentum) / abs(_lead(z, momentum, nesterov))


def swing(staleness: float, momentum: float = 0.0, *, nesterov: bool = False) -> float:
    """Number of steps of half a swing of the parameters at the limit: 2 tau + 1 without momentum."""
    z = _crossing(staleness, min(momentum, 0.999), nesterov)
    return math.pi / math.atan2(z.imag, z.real)


def _crossing(staleness: float, momentum: float, nesterov: bool) -> complex:
    """Root on the unit circle at the limit, the one with a positive imaginary part, or -1."""
    low, high = 0.0, math.pi
    for _ in range(60):
        theta = (low + high) / 2
        z = complex(math.cos(theta), math.sin(theta))
        phase = (staleness - 0.5) * theta + _angle(z - momentum) - _angle(_lead(z, momentum, nesterov))
        low, high = (theta, high) if phase < math.pi / 2 else (low, theta)
    return complex(math.cos(high), math.sin(high))


def _lead(z: complex, momentum: float, nesterov: bool) -> complex:
    """Factor on a: 1, or the look-ahead of Nesterov's momentum, whose phase is part of the condition."""
    return (1 + momentum) - momentum / z if nesterov else 1


def _angle(z: complex) -> float:
    return math.atan2(z.imag, z.real)


def momentum_advice(momentum: float, num_workers: int) -> str | None:
    """A warning for a worker that joins and whose gradients will be stale; None: there is nothing to warn of."""
    if momentum < HIGH_MOMENTUM or num_workers <= FEW_WORKERS:
        return None
    staleness = num_workers - 1
    if momentum >= 1:
        return f"momentum {momentum:g} with stale gradients diverges at every learning rate; set it below 0.9"
    times = limit(staleness) / limit(staleness, momentum)
    return (
        f"momentum {momentum:g} with {num_workers} workers that do not wait for each other: gradients will be about "
        f"{staleness} versions stale, and the largest stable learning rate is {times:.3g} times smaller than without "
        f"momentum; set momentum to 0 (stale gradients bring some of their own), or --staleness-lr inverse, or "
        "--mode sync"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What was measured of a job: its settings and its curvature.

    Attributes:
        rate: learning rate as set, > 0.
        product: mean learning rate of a push, with every factor on it, times the curvature.
        curvature: largest curvature seen, in units of loss per parameter squared.
        num_workers: number of workers that pushed.
        staleness: mean staleness of the pushes, each weighted by its learning rate.
        scaled: whether the learning rate is divided by 1 + staleness already.
    """

    rate: float
    product: float
    curvature: float
    num_workers: int
    staleness: float
    momentum: float = 0.0
    nesterov: bool = False
    scaled: bool = False

    @property
    def ratio(self) -> float:
        """Product divided by its limit; above 1 the learning rate is too large."""
        return self.product / max(self._limit(), 1e-30)

    def sentence(self) -> str:
        """What is wrong and what to set instead. Every remedy that is named brings the ratio below 1."""
        rate = f"{self.rate / self.ratio:.3g}"
        momentum = f" and momentum {self.momentum:g}" if self.momentum else ""
        remedies = [f"set the learning rate (--lr) below {rate}"]
        if self.momentum and self.product < limit(self.staleness):
            remedies.append("momentum to 0")
        if not self.scaled and self.product / (1 + self.staleness) < self._limit():
            remedies.append("--staleness-lr inverse")
        if self._limit(0.0) > self.product:
            enough = next(n for n in range(self.num_workers, 0, -1) if n == 1 or self._limit(n - 1.0) > self.product)
            if enough < self.num_workers and not self.scaled:
                remedies.append(f"{enough} worker{'' if enough == 1 else 's'} at most")
        return (
            f"learning rate {self.rate:.3g} with {self.num_workers} workers (mean staleness {self.staleness:.2g})"
            f"{momentum} is above the limit {rate} at the curvature {self.curvature:.3g} seen so far, and the "
            f"parameters swing wider and wider; {', or '.join(remedies)}"
        )

    def _limit(self, staleness: float | None = None) -> float:
        return limit(self.staleness if staleness is None else staleness, self.momentum, nesterov=self.nesterov)
