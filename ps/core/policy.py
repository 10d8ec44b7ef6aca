"""Policy: what a mode decides for one bucket. ``Shard`` does everything that all modes share.

Rules of this file
  1. Each bucket has a policy of its own; buckets do not know each other.
  2. ``check`` raises or passes and changes nothing. After it has passed, ``push`` does not raise, even when a newer
     roster or a higher version came in between: the push may have been parked until its roster was known.
  3. The shard asks only about workers whose (name, session) is in the roster that the policy was given last.

Source: Li et al., OSDI 2014, for consistency models that are exchangeable parts of a parameter server.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch_ps.ps.core.effects import Effects
from torch_ps.ps.core.ledger import Ledger
from torch_ps.ps.core.roster import Member, Roster


@dataclass(frozen=True, slots=True)
class Push:
    """One gradient of one bucket, named by (worker, session, step, bucket).

    Attributes:
        base: version that the gradient was computed from, >= 0.
        weight: finite, >= 0; usually the number of samples.
        epoch: newest roster epoch that the worker has seen.
        covers: samples that the gradient is of, on the lead's first bucket; see ``ps/core/sample_assigner.py``.
    """

    worker: str
    session: int
    step: int
    bucket: int
    base: int
    weight: float
    epoch: int
    covers: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Hold:
    """An answer that is held back since ``since``, as ``ps-status`` and the text of a timeout show it."""

    worker: str
    session: int
    bucket: int
    step: int | None
    since: float
    waiting_for: tuple[str, ...]
    reason: str


class Policy(Protocol):
    """One bucket under one mode."""

    #: Version, samples and decided pushes: what a checkpoint keeps of a bucket.
    ledger: Ledger

    @property
    def clock(self) -> int:
        """Number of steps that every member has finished on this bucket."""

    def check(self, push: Push) -> None:
        """Refuse a push whose step or base can never be right.

        Raises:
            StepConflict: the step or the base does not fit this bucket.
        """

    def taken(self, push: Push) -> bool:
        """Whether this push was counted before, so that this one is a repeat."""

    def push(self, push: Push, member: Member, now: float) -> Effects:
        """Count a checked push of ``member``. A repeat is not counted again, and is answered like the first."""

    def pull(self, member: Member, now: float) -> Effects:
        """Answer with parameters now or, where the mode holds the worker back, later."""

    def set_roster(self, roster: Roster) -> Effects:
        """Forget the sessions that are not in ``roster``, then do what is due without them."""

    def disconnected(self, worker: str, session: int) -> None:
        """Forget the answers held for a session whose stream broke; its pushes stay."""

    def next_step(self, member: Member) -> int:
        """Step that this member pushes next, which is its clock."""

    def holds(self) -> tuple[Hold, ...]:
        """Every answer that is held back."""


def name_list(names: tuple[str, ...]) -> str:
    """At most three names, for a sentence: "w0, w1, w2 and 29 more"."""
    if not names:
        return "nobody"
    shown = ", ".join(names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
