"""What a mode has to decide, for one bucket; ``Shard`` does everything that all modes share.

Rules of this file
  1. One policy object per bucket; buckets never look at each other.
  2. ``check`` raises and changes nothing; after it passed, ``push`` never raises, also when a newer roster or a
     higher version has come in between (a push may be parked until the shard knows the roster it speaks of).
  3. The shard asks only for workers whose (name, session) is in the roster that the policy was given last.

Source: design section 4; Li et al., OSDI 2014, for the idea that consistency is a plug-in.
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
        base: version that the gradient was computed from.
        weight: finite, >= 0; usually the number of samples.
        epoch: newest roster epoch that the worker has seen.
        covers: on the lead's first bucket, the samples that the gradient is of; see ``sample_assigner.py``.
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
    """An answer that is held back, as ``ps-status`` and the text of a timeout show it."""

    worker: str
    session: int
    bucket: int
    step: int | None
    since: float
    waiting_for: tuple[str, ...]
    reason: str


class Policy(Protocol):
    """One bucket under one mode."""

    #: Version, samples and ledger: what a checkpoint keeps of a bucket.
    ledger: Ledger

    @property
    def clock(self) -> int:
        """Steps that every member has finished on this bucket: a newcomer starts after the next one."""

    def check(self, push: Push) -> None:
        """Refuse a push that can never be right.

        Raises:
            StepConflict: the step or the base does not fit this bucket.
        """

    def push(self, push: Push, member: Member, now: float) -> Effects:
        """Count one checked push of ``member``; a repeat counts once and is answered like the first."""

    def pull(self, member: Member, now: float) -> Effects:
        """Answer with parameters now or, for a worker whose first step is ahead, when they are there."""

    def set_roster(self, roster: Roster) -> Effects:
        """Forget sessions that are gone, then do what is due without them."""

    def disconnected(self, worker: str, session: int) -> None:
        """Its stream broke: answers held for it are forgotten, its pushes stay."""

    def next_step(self, member: Member) -> int:
        """The step that this member pushes next: its clock."""

    def holds(self) -> tuple[Hold, ...]:
        """Every answer that is held back."""


def name_list(names: tuple[str, ...]) -> str:
    """Names for a sentence: "w0, w1, w2 and 29 more"."""
    if not names:
        return "nobody"
    shown = ", ".join(names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
