"""Stale synchronous parallel: pushes are applied at once, but a worker that is too far ahead is not answered.

Rules of this file
  1. The clock of a worker is the step that it pushes next, which is the number of steps that it has finished. The
     *floor* is the smallest clock of the roster. It never falls, and it stays where it is until the first quorum.
  2. Parameters go to a worker with clock c only while c - floor <= slack. So they hold every push of every worker for
     steps <= c - slack - 1.
  3. A newcomer starts, on every shard, at the first step that the lead gave it, which is one above the lead's floor.
     Nobody pushes the step after the lead's floor before it has all answers for the one before, so the floor of no
     shard is above a newcomer's first step.

    push --as async--> Apply --clock - floor <= slack--> Release
                             --else--> Wait ... the slowest pushes or leaves ...> Release

Slack 0 is a synchronous step, see ``ps/core/modes.py``.

Source: Ho et al., "More Effective Distributed ML via a Stale Synchronous Parallel Parameter Server", NeurIPS 2013.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch_ps.ps.core.asynchronous import Asynchronous, Verdict
from torch_ps.ps.core.effects import Discard, Effect, Effects, Wait
from torch_ps.ps.core.policy import Hold, Push, name_list
from torch_ps.ps.core.roster import Member, Roster


@dataclass(frozen=True, slots=True)
class _Held:
    """An answer that is held back."""

    member: Member
    verdict: Verdict
    since: float


class StaleSynchronous(Asynchronous):
    """One bucket under ``--mode ssp``.

    Args:
        slack: steps by which the fastest worker may lead the slowest, >= 1.
        max_staleness: versions that a push may be stale, >= 0; None refuses none.
        inverse: whether the learning rate is divided by 1 + staleness.
    """

    def __init__(self, bucket: int, *, slack: int, max_staleness: int | None = None, inverse: bool = False) -> None:
        super().__init__(bucket, max_staleness=max_staleness, inverse=inverse)
        self._slack = slack
        self._roster = Roster()
        self._first: dict[tuple[str, int], int] = {}  # (worker, session) -> first step
        self._held: dict[tuple[str, int | None], _Held] = {}  # (worker, step)
        self._num_slowest = 0  # members whose clock is the floor; while there are some it stays

    @property
    def clock(self) -> int:
        return self.ledger.floor

    def push(self, push: Push, member: Member, now: float) -> Effects:
        if push.step < member.first_step:
            reason = f"{push.worker} takes part from step {member.first_step} on; step {push.step} is before it"
            discard = Discard(push.worker, push.session, push.bucket, push.step, reason)
            return discard, *self._answer_or_hold(member, Verdict(push.step, 0, False, reason), now)
        slowest = self.next_step(member) <= self.ledger.floor
        effects, verdict = self._decide(push)
        freed: Effects = ()
        if slowest and self.next_step(member) > self.ledger.floor:
            self._num_slowest -= 1
            freed = self._advance() if self._num_slowest <= 0 else ()
        return *effects, *freed, *self._answer_or_hold(member, verdict, now)

    def pull(self, member: Member, now: float) -> Effects:
        return self._answer_or_hold(member, self._pulled(member), now)

    def set_roster(self, roster: Roster) -> Effects:
        super().set_roster(roster)
        self._roster = roster
        self._first = {(m.name, m.session): m.first_step for m in roster.members}
        self._held = {k: h for k, h in self._held.items() if (h.member.name, h.member.session) in self._first}
        return self._advance()

    def disconnected(self, worker: str, session: int) -> None:
        self._held = {k: h for k, h in self._held.items() if (h.member.name, h.member.session) != (worker, session)}

    def next_step(self, member: Member) -> int:
        count = self._count(member.name, member.session)
        return member.first_step if count is None else count

    def holds(self) -> tuple[Hold, ...]:
        holds = []
        for held in self._held.values():
            member, step = held.member, held.verdict.step
            slow, reason = self._slower(member)
            holds.append(Hold(member.name, member.session, self.ledger.bucket, step, held.since, slow, reason))
        return tuple(holds)

    def _count(self, worker: str, session: int) -> int | None:
        entry = self.ledger.entry(worker, session)
        return self._first.get((worker, session)) if entry is None else entry.step + 1

    def _advance(self) -> Effects:
        """Raise the floor, and answer the workers that have waited for it."""
        if self._roster.open and self._roster.members:
            self.ledger.floor = max(self.ledger.floor, min(self.next_step(m) for m in self._roster.members))
        self._num_slowest = sum(self.next_step(m) <= self.ledger.floor for m in self._roster.members)
        effects: list[Effect] = []
        for key, held in list(self._held.items()):
            if self._may_read(held.member):
                del self._held[key]
                effects.append(self._answer(held.member, held.verdict))
        return tuple(effects)

    def _answer_or_hold(self, member: Member, verdict: Verdict, now: float) -> Effects:
        if self._may_read(member):
            return (self._answer(member, verdict),)
        self._held[member.name, verdict.step] = _Held(member, verdict, now)
        return (Wait(member.name, member.session, self.ledger.bucket, verdict.step),)

    def _may_read(self, member: Member) -> bool:
        return self.next_step(member) - self.ledger.floor <= self._slack

    def _slower(self, member: Member) -> tuple[tuple[str, ...], str]:
        """Whom this member waits for, in rank order, and the same as a sentence."""
        clock, bound = self.next_step(member), self.next_step(member) - self._slack
        slow = tuple([m.name for m in self._roster.members if self.next_step(m) < bound])
        if slow:
            why = f"waits for {name_list(slow)} at clock {min(map(self.next_step, self._roster.members))}"
        else:
            why = "waits for the first quorum"
        return slow, f"{member.name} at clock {clock} {why}; slack is {self._slack}"
