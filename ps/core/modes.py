"""How the workers of a job are synchronised: one ``Mode``, and the policy that each mode makes for a bucket.

Source: docs/modes.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch_ps.common.errors import ConfigError
from torch_ps.common.options.mode_choices import DELAY_COMPENSATION, MODES, STALENESS_LR
from torch_ps.ps.core.asynchronous import AsyncPolicy
from torch_ps.ps.core.lr_stability import momentum_advice
from torch_ps.ps.core.policy import Policy
from torch_ps.ps.core.stale_synchronous import SspPolicy
from torch_ps.ps.core.synchronous import SyncPolicy


@dataclass(frozen=True, slots=True, kw_only=True)
class Mode:
    """How the workers of one job are synchronised; the same on every shard.

    Attributes:
        name: one of ``MODES``.
        slack: ssp: steps that the fastest worker may lead the slowest by, >= 0.
        backup_workers: sync: pushes that a step does not wait for, >= 0.
        max_staleness: async and ssp: an older push is refused; None refuses none.
        staleness_lr: async and ssp: "inverse" divides the learning rate by 1 + staleness.
        delay_compensation: async and ssp: "constant" or "adaptive" corrects stale gradients, "off" does not.
        compensation_strength: lambda of that correction, > 0.
    """

    name: str = "sync"
    slack: int = 0
    backup_workers: int = 0
    max_staleness: int | None = None
    staleness_lr: str = "constant"
    delay_compensation: str = "off"
    compensation_strength: float = 1.0

    def __post_init__(self) -> None:
        if self.name not in MODES:
            raise ConfigError(f"mode must be one of {', '.join(MODES)}; got {self.name!r}")
        if self.staleness_lr not in STALENESS_LR:
            raise ConfigError(f"staleness_lr must be one of {', '.join(STALENESS_LR)}; got {self.staleness_lr!r}")
        if self.delay_compensation not in DELAY_COMPENSATION:
            choices = ", ".join(DELAY_COMPENSATION)
            raise ConfigError(f"delay_compensation must be one of {choices}; got {self.delay_compensation!r}")
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
        """Whether pushes are applied one by one, so that others come between a gradient and its base."""
        return self.name == "async" or (self.name == "ssp" and self.slack > 0)

    @property
    def holds_others_up(self) -> bool:
        """Whether others may not go on when one worker stops pushing."""
        return self.name != "async"

    @property
    def rate_follows_staleness(self) -> bool:
        return self.staleness_lr != "constant"

    def advice(self, momentum: float, num_workers: int) -> str | None:
        """What to say when a worker joins a job of SGD; None: nothing."""
        if not self.stale or self.rate_follows_staleness:
            return None
        return momentum_advice(momentum, num_workers)

    def policy(self, bucket: int) -> Policy:
        """A fresh policy for one bucket."""
        return POLICIES[self.name](self, bucket)

    def __str__(self) -> str:
        """The mode and what differs from its defaults, for people: "ssp, slack 2"."""
        words = [self.name]
        if self.name == "ssp":
            words.append(f"slack {self.slack}")
        if self.backup_workers:
            words.append(f"{self.backup_workers} backup worker{'' if self.backup_workers == 1 else 's'}")
        if self.max_staleness is not None:
            words.append(f"staleness at most {self.max_staleness}")
        if self.staleness_lr != "constant":
            words.append(f"learning rate {self.staleness_lr} to staleness")
        if self.compensates:
            words.append(f"{self.delay_compensation} delay compensation {self.compensation_strength:g}")
        return ", ".join(words)


def _ssp(mode: Mode, bucket: int) -> Policy:
    """Without slack nobody may go on before all have pushed: that is a synchronous step, and it is made like one.

    So slack 0 gives the bits of sync. From slack 1 on every push is applied by itself.
    """
    if not mode.slack:
        return SyncPolicy(bucket)
    return SspPolicy(bucket, slack=mode.slack, max_staleness=mode.max_staleness, inverse=mode.staleness_lr == "inverse")


POLICIES: dict[str, Callable[[Mode, int], Policy]] = {
    "sync": lambda mode, bucket: SyncPolicy(bucket, backups=mode.backup_workers),
    "async": lambda mode, bucket: AsyncPolicy(
        bucket, max_staleness=mode.max_staleness, inverse=mode.staleness_lr == "inverse"
    ),
    "ssp": _ssp,
}
