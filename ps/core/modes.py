"""Modes: the registry that maps the name of a mode to the policy of its buckets.

Rules of this file
  1. Below the options, this is the only place of the server that knows the names of modes. The rest of the server asks
     a ``Mode`` for what it is about to do (``stale``, ``holds_others_up``), never for its name.
  2. The names themselves are listed once, in ``torch_ps.common.options.mode_choices``, for options and reports.

Source: Li et al., OSDI 2014, for the consistency model as a choice of the job; docs/modes.md for what each mode means.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch_ps.common.errors import ConfigError
from torch_ps.common.options.mode_choices import DELAY_COMPENSATION, MODES, STALENESS_LR
from torch_ps.ps.core.asynchronous import Asynchronous
from torch_ps.ps.core.lr_stability import momentum_advice
from torch_ps.ps.core.policy import Policy
from torch_ps.ps.core.stale_synchronous import StaleSynchronous
from torch_ps.ps.core.synchronous import Synchronous


@dataclass(frozen=True, slots=True, kw_only=True)
class Mode:
    """How the workers of one job are synchronised; the same on every shard.

    Attributes:
        name: one of ``MODES``.
        slack: ssp: steps by which the fastest worker may lead the slowest, >= 0.
        backup_workers: sync: pushes that a step does not wait for, >= 0.
        max_staleness: async and ssp: a push that is more versions old is refused, >= 0; None refuses none.
        staleness_lr: async and ssp: "inverse" divides the learning rate by 1 + staleness, "constant" does not.
        delay_compensation: async and ssp: "constant" or "adaptive" corrects stale gradients, "off" does not.
        compensation_strength: lambda of that correction, > 0.

    Raises:
        ConfigError: a value is not one of these.
    """

    name: str = "sync"
    slack: int = 0
    backup_workers: int = 0
    max_staleness: int | None = None
    staleness_lr: str = "constant"
    delay_compensation: str = "off"
    compensation_strength: float = 1.0

    def __post_init__(self) -> None:
        for field, value, choices in (
            ("mode", self.name, MODES),
            ("staleness_lr", self.staleness_lr, STALENESS_LR),
            ("delay_compensation", self.delay_compensation, DELAY_COMPENSATION),
        ):
            if value not in choices:
                raise ConfigError(f"{field} must be one of {', '.join(choices)}; got {value!r}")
        if not self.compensation_strength > 0:
            raise ConfigError(f"compensation_strength must be > 0; got {self.compensation_strength}")
        for name in ("slack", "backup_workers", "max_staleness"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ConfigError(f"{name} must be >= 0; got {value}")

    @property
    def compensates(self) -> bool:
        """Whether a stale gradient is corrected before it is applied."""
        return self.delay_compensation != "off"

    @property
    def stale(self) -> bool:
        """Whether pushes are applied one by one, so that other pushes come between a gradient and its base."""
        return self.name == "async" or (self.name == "ssp" and self.slack > 0)

    @property
    def holds_others_up(self) -> bool:
        """Whether one worker that stops pushing stops the others."""
        return self.name != "async"

    @property
    def rate_follows_staleness(self) -> bool:
        """Whether a stale push is applied with a smaller learning rate."""
        return self.staleness_lr != "constant"

    def advice(self, momentum: float, num_workers: int) -> str | None:
        """A warning for a worker that joins a job of SGD; None: there is nothing to warn of."""
        if not self.stale or self.rate_follows_staleness:
            return None
        return momentum_advice(momentum, num_workers)

    def policy(self, bucket: int) -> Policy:
        """A fresh policy for one bucket."""
        return POLICIES[self.name](self, bucket)

    def __str__(self) -> str:
        """The mode and every setting that differs from its default, for people: "ssp, slack 2"."""
        words = [self.name]
        if self.name == "ssp":
            words.append(f"slack {self.slack}")
        if self.backup_workers:
            words.append(f"{self.backup_workers} backup worker{'' if self.backup_workers == 1 else 's'}")
        if self.max_staleness is not None:
            words.append(f"staleness at most {self.max_staleness}")
        if self.rate_follows_staleness:
            words.append(f"learning rate {self.staleness_lr} to staleness")
        if self.compensates:
            words.append(f"{self.delay_compensation} delay compensation {self.compensation_strength:g}")
        return ", ".join(words)


def _sync(mode: Mode, bucket: int) -> Policy:
    return Synchronous(bucket, backups=mode.backup_workers)


def _async(mode: Mode, bucket: int) -> Policy:
    return Asynchronous(bucket, max_staleness=mode.max_staleness, inverse=mode.rate_follows_staleness)


def _ssp(mode: Mode, bucket: int) -> Policy:
    """Slack 0 lets nobody go on before all have pushed: that is a synchronous step, and gives the bits of sync."""
    if not mode.slack:
        return Synchronous(bucket)
    return StaleSynchronous(
        bucket, slack=mode.slack, max_staleness=mode.max_staleness, inverse=mode.rate_follows_staleness
    )


#: How each of ``MODES`` makes the policy of a bucket.
POLICIES: dict[str, Callable[[Mode, int], Policy]] = {"sync": _sync, "async": _async, "ssp": _ssp}
