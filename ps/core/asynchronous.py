"""Asynchronous SGD: every push is applied at once, alone, and its staleness is measured.

Rules of this file
  1. No push waits for another worker, not even for the first quorum.
  2. Each session counts its own steps per bucket, from 0 and without a gap. The count tells a repeat from a new push.
  3. A push that is too old is refused for good. It uses up its step, and the answer carries fresh parameters.

    push(step = own count, base <= version) --> Apply, Release           the learning rate may shrink with staleness
                 staleness > max_staleness ---> Discard, Release(applied=False)
    push(step < own count) ------------------> Discard, Release: a repeat
    push(step > own count or base > version) -> StepConflict

Source: Hogwild!, Niu et al., NeurIPS 2011; "eventual" consistency, Li et al., OSDI 2014; lr / (1 + staleness): Zhang et
al., IJCAI 2016, arXiv:1511.05950.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch_ps.common.errors import StepConflict
from torch_ps.ps.core.effects import Contribution, Discard, Effects, Release
from torch_ps.ps.core.ledger import Ledger
from torch_ps.ps.core.policy import Hold, Push
from torch_ps.ps.core.roster import Member, Roster


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the answer to a push says, whenever it goes out; a pull has no ``step``."""

    step: int | None
    staleness: int
    applied: bool
    reason: str


class Asynchronous:
    """One bucket under ``--mode async``.

    Args:
        max_staleness: versions that a push may be stale, >= 0; None refuses none.
        inverse: whether the learning rate is divided by 1 + staleness.
    """

    def __init__(self, bucket: int, *, max_staleness: int | None = None, inverse: bool = False) -> None:
        self.ledger = Ledger(bucket)
        self._max_staleness = max_staleness
        self._inverse = inverse

    @property
    def clock(self) -> int:
        """The version: no worker waits for another, so first steps have no meaning here."""
        return self.ledger.version

    def check(self, push: Push) -> None:
        count = self._count(push.worker, push.session)
        if count is not None and push.step > count:
            raise StepConflict(
                f"worker {push.worker!r} pushed step {push.step} of bucket {push.bucket}; its next step is {count}"
            )
        if push.base > self.ledger.version:
            raise StepConflict(
                f"worker {push.worker!r} pushed a gradient of bucket {push.bucket} computed from version {push.base}; "
                f"the newest is {self.ledger.version}"
            )

    def taken(self, push: Push) -> bool:
        entry = self.ledger.entry(push.worker, push.session)
        return entry is not None and push.step <= entry.step

    def push(self, push: Push, member: Member, now: float) -> Effects:
        effects, verdict = self._decide(push)
        return *effects, self._answer(member, verdict)

    def pull(self, member: Member, now: float) -> Effects:
        return (self._answer(member, self._pulled(member)),)

    def set_roster(self, roster: Roster) -> Effects:
        self.ledger.keep({(m.name, m.session) for m in roster.members})
        return ()

    def disconnected(self, worker: str, session: int) -> None:
        """Change nothing: no answer is ever held back."""

    def next_step(self, member: Member) -> int:
        return self._count(member.name, member.session) or 0

    def holds(self) -> tuple[Hold, ...]:
        return ()

    def _decide(self, push: Push) -> tuple[Effects, Verdict]:
        """Apply a checked push, refuse it, or recognise it as a repeat."""
        worker, session, step = push.worker, push.session, push.step
        entry = self.ledger.entry(worker, session)
        if entry is not None and step <= entry.step:
            same = step == entry.step
            did = "refused" if same and not entry.applied else "applied"
            reason = f"step {step} of {worker} has been {did} before"
            verdict = Verdict(step, entry.staleness if same else 0, did == "applied", reason)
            return (Discard(worker, session, push.bucket, step, reason),), verdict
        staleness = self.ledger.version - push.base
        if self._max_staleness is not None and staleness > self._max_staleness:
            reason = f"step {step} of {worker} is {staleness} versions stale; at most {self._max_staleness} are allowed"
            self.ledger.refuse(worker, session, step, staleness)
            return (Discard(worker, session, push.bucket, step, reason),), Verdict(step, staleness, False, reason)
        reason = f"step {step} of {worker} applied, {staleness} versions stale"
        applied = self.ledger.apply(
            (Contribution(worker, session, step, push.weight, staleness),),
            reason,
            lr_scale=1.0 / (1 + staleness) if self._inverse else 1.0,
            group=(worker, session, step),  # an update of its own
        )
        return (applied,), Verdict(step, staleness, True, reason)

    def _pulled(self, member: Member) -> Verdict:
        return Verdict(None, 0, True, f"{member.name} gets version {self.ledger.version}")

    def _answer(self, member: Member, verdict: Verdict) -> Release:
        return self.ledger.answer(
            member.name,
            member.session,
            verdict.step,
            next_step=self.next_step(member),
            staleness=verdict.staleness,
            applied=verdict.applied,
            reason=verdict.reason,
        )

    def _count(self, worker: str, session: int) -> int | None:
        """Step that this session pushes next; None where that is not known."""
        entry = self.ledger.entry(worker, session)
        return 0 if entry is None else entry.step + 1
