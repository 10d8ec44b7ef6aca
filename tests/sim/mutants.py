"""Planted bugs: small changes to the core, each of which the schedules must find.

Rules of this file
  1. A mutant is the mistake that somebody could make: one rule of one file of the core, left out or bent.
  2. Each is found by a claim of ``invariants.py``, by the world coming to rest with workers parked, or by a refusal
     that no well-behaved worker deserves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from tests.sim.world import Parts
from torch_ps.ps.core.asynchronous import Asynchronous, Verdict
from torch_ps.ps.core.effects import Apply, Contribution, Discard, Effects, Release
from torch_ps.ps.core.ledger import Entry, Ledger
from torch_ps.ps.core.membership import Membership
from torch_ps.ps.core.modes import Mode
from torch_ps.ps.core.policy import Policy, Push
from torch_ps.ps.core.roster import Member, Roster
from torch_ps.ps.core.shard import Shard
from torch_ps.ps.core.stale_synchronous import StaleSynchronous
from torch_ps.ps.core.synchronous import Synchronous


@dataclass(frozen=True, slots=True, kw_only=True)
class MutantMode(Mode):
    """A mode whose policies are not the real ones."""

    make: Callable[[int], Policy]

    def policy(self, bucket: int) -> Policy:
        return self.make(bucket)


# ---------------------------------------------------------------- the ledger


class NoMemory(Ledger):
    """Forgets what was applied."""

    def entry(self, worker: str, session: int) -> Entry | None:
        return None


class MiscountedSamples(Ledger):
    """Counts pushes instead of weights."""

    def apply(self, contributions: tuple[Contribution, ...], reason: str, **more: Any) -> Apply:
        applied = super().apply(contributions, reason, **more)
        self.samples += len(contributions) - sum(c.weight for c in contributions)
        return applied


def with_progress(policy: Synchronous | Asynchronous, progress: type[Ledger]) -> Policy:
    policy.ledger = progress(policy.ledger.bucket)
    return policy


# ---------------------------------------------------------------- sync


class ClosesOneEarly(Synchronous):
    """Closes when all but one have pushed."""

    def _close(self) -> Effects:
        if len(self._pushed) > 1 and len(self._missing) == 1:
            self._required = tuple(w for w in self._required if w in self._pushed)
            self._missing = set()
        return super()._close()


class ClosesBeforeQuorum(Synchronous):
    def set_roster(self, roster: Roster) -> Effects:
        return super().set_roster(replace(roster, open=True))


class SumsInOrderOfArrival(Synchronous):
    def _close(self) -> Effects:
        if not self._missing:
            self._required = tuple(self._pushed)
        return super()._close()


class KeepsPushesOfLeavers(Synchronous):
    def set_roster(self, roster: Roster) -> Effects:
        kept = dict(self._pushed)
        effects = [e for e in super().set_roster(roster) if not isinstance(e, Discard)]
        if not any(isinstance(e, Apply) for e in effects):
            self._pushed.update({w: p for w, p in kept.items() if w not in self._pushed})
            self._open()
        return tuple(effects)


class DropsPushesSilently(Synchronous):
    """Forgets to tell the shell that the payloads of a leaver are not needed any more."""

    def set_roster(self, roster: Roster) -> Effects:
        return tuple(e for e in super().set_roster(roster) if not isinstance(e, Discard))


class DoesNotCloseOnLeave(Synchronous):
    """Waits for the next push instead, which may never come."""

    _quiet = False

    def set_roster(self, roster: Roster) -> Effects:
        self._quiet = True
        effects = super().set_roster(roster)
        self._quiet = False
        return effects

    def _close(self) -> Effects:
        return () if self._quiet else super()._close()


class NeverClosesEmpty(Synchronous):
    """Leaves newcomers waiting for a step that nobody is left to make."""

    def _close(self) -> Effects:
        return super()._close() if self._required else ()


class CallsRepeatsLate(Synchronous):
    def _closed(self, push: Push) -> Effects:
        return tuple(replace(e, applied=False) if isinstance(e, Release) else e for e in super()._closed(push))


class AnswersFirstAskerOnly(Synchronous):
    """A push repeated on a new stream is counted once, but nobody remembers to answer it."""

    def push(self, push: Push, member: Member, now: float) -> Effects:
        held = self._pushed.get(push.worker)
        since = held.since if held is not None else now
        effects = super().push(push, member, now)
        held = self._pushed.get(push.worker)
        if held is not None:
            held.since = since
        return effects


class AnswersDeadStreams(Synchronous):
    def disconnected(self, worker: str, session: int) -> None:
        pass


class PullsBeforeFirstStep(Synchronous):
    """A newcomer starts from parameters that are a step old."""

    def pull(self, member: Member, now: float) -> Effects:
        return (self._fresh(member, None),)


class ForgetsParkedPulls(Synchronous):
    def set_roster(self, roster: Roster) -> Effects:
        self._early.clear()
        return super().set_roster(roster)


class IgnoresBackups(Synchronous):
    """Waits for everybody."""

    _num_missing = property(lambda self: len(self._missing))


class AveragesTheMissing(Synchronous):
    """Closes in time, but in order of arrival."""

    def _close(self) -> Effects:
        if not self._num_missing:
            self._required = (*self._pushed, *self._missing)
        return super()._close()


# ---------------------------------------------------------------- async


class WrongStaleness(Asynchronous):
    """Measures against the version after the step."""

    def push(self, push: Push, member: Member, now: float) -> Effects:
        return super().push(replace(push, base=push.base - 1), member, now)


class AsyncAppliesRepeats(Asynchronous):
    def push(self, push: Push, member: Member, now: float) -> Effects:
        self.ledger.keep(())
        return super().push(push, member, now)


class RefusesOneTooMany(Asynchronous):
    def __init__(self, bucket: int) -> None:
        super().__init__(bucket, max_staleness=1)


class RefusesOneTooFew(Asynchronous):
    def __init__(self, bucket: int) -> None:
        super().__init__(bucket, max_staleness=3)


class ScalesByStalenessAlone(Asynchronous):
    """lr / staleness, where it is lr / (1 + staleness)."""

    def push(self, push: Push, member: Member, now: float) -> Effects:
        return tuple(
            replace(e, lr_scale=1 / max(e.contributions[0].staleness, 1)) if isinstance(e, Apply) else e
            for e in super().push(push, member, now)
        )


# ---------------------------------------------------------------- ssp


class OneStepTooFar(StaleSynchronous):
    def _may_read(self, member: Member) -> bool:
        return self.next_step(member) - self.ledger.floor <= self._slack + 1


class NeverLetsGo(StaleSynchronous):
    """Whoever is held back stays so."""

    def _advance(self) -> Effects:
        return super()._advance() if not self._held else ()


class HoldsPushesOnly(StaleSynchronous):
    """A worker that lost its answer pulls, and runs away."""

    def pull(self, member: Member, now: float) -> Effects:
        return (self._answer(member, self._pulled(member)),)


class ForgetsToFreeOnLeave(StaleSynchronous):
    """When the slowest leaves, nobody tells those who waited for it."""

    def set_roster(self, roster: Roster) -> Effects:
        super().set_roster(roster)
        return ()


class NewcomersStartFromZero(StaleSynchronous):
    """And hold everybody up."""

    def set_roster(self, roster: Roster) -> Effects:
        members = tuple(replace(m, first_step=0) for m in roster.members)
        return super().set_roster(replace(roster, members=members))


class AnswersTwice(StaleSynchronous):
    def _answer_or_hold(self, member: Member, verdict: Verdict, now: float) -> Effects:
        effects = super()._answer_or_hold(member, verdict, now)
        return effects if self._may_read(member) else (*effects, self._answer(member, verdict))


# ---------------------------------------------------------------- shard


class IgnoresEpochs(Shard):
    """Handles every push with the roster that it has."""

    def push(self, push: Push, now: float = 0.0) -> Effects:
        return super().push(replace(push, epoch=0), now)


class FollowsOldRosters(Shard):
    def set_roster(self, roster: Roster) -> Effects:
        if roster.epoch < self.roster.epoch:
            self.roster = replace(self.roster, epoch=roster.epoch - 1)
        return super().set_roster(roster)


class LosesParkedPushes(Shard):
    def set_roster(self, roster: Roster) -> Effects:
        self._parked = {key: parked for key, parked in self._parked.items() if parked.push is None}
        return super().set_roster(roster)


class AdmitsOldSessions(Shard):
    def _is_member(self, worker: str, session: int) -> bool:
        return worker in self._members


# ---------------------------------------------------------------- membership


class NewcomersStartAtOnce(Membership):
    """First step = the open step, though another shard may have closed a part of it."""

    def join(self, name: str, rank: int | None, now: float, open_step: int, **others: Any) -> tuple[Member, Effects]:
        return super().join(name, rank, now, open_step - 1 if self.roster.open else open_step, **others)


class NeverEvicts(Membership):
    def tick(self, now: float, open_step: int) -> Effects:
        return ()


class LeaveIsForgotten(Membership):
    """Leaves without telling anybody."""

    def leave(self, name: str, session: int, now: float, open_step: int) -> Effects:
        super().leave(name, session, now, open_step)
        return ()


class NamesByLetters(Membership):
    """w10 before w9."""

    def _announce(self, members: list[Member], reason: str) -> object:  # type: ignore[override]
        announce = super()._announce(members, reason)
        by_letters = sorted(members, key=lambda m: (m.rank is None, m.rank or 0, m.name))
        self.roster = replace(self.roster, members=tuple(by_letters))
        return replace(announce, roster=self.roster)


def _sync(make: Callable[[int], Policy]) -> Parts:
    return Parts(MutantMode(name="sync", make=make))


def _async(make: Callable[[int], Policy], **settings: Any) -> Parts:
    return Parts(MutantMode(name="async", make=make, **settings))


def _backups(policy: Callable[..., Policy]) -> Parts:
    return Parts(MutantMode(name="sync", backup_workers=2, make=lambda b: policy(b, backups=2)))


def _ssp(policy: Callable[..., Policy]) -> Parts:
    return Parts(MutantMode(name="ssp", slack=1, make=lambda b: policy(b, slack=1)))


MUTANTS: dict[str, Parts] = {
    "sync ledger forgets": _sync(lambda b: with_progress(Synchronous(b), NoMemory)),
    "async ledger forgets": _async(lambda b: with_progress(Asynchronous(b), NoMemory)),
    "samples are pushes": _sync(lambda b: with_progress(Synchronous(b), MiscountedSamples)),
    **{
        policy.__name__: _sync(policy)
        for policy in (
            ClosesOneEarly,
            ClosesBeforeQuorum,
            SumsInOrderOfArrival,
            KeepsPushesOfLeavers,
            DropsPushesSilently,
            DoesNotCloseOnLeave,
            NeverClosesEmpty,
            CallsRepeatsLate,
            AnswersFirstAskerOnly,
            AnswersDeadStreams,
            PullsBeforeFirstStep,
            ForgetsParkedPulls,
        )
    },
    **{policy.__name__: _async(policy) for policy in (WrongStaleness, AsyncAppliesRepeats)},
    **{policy.__name__: _backups(policy) for policy in (IgnoresBackups, AveragesTheMissing)},
    **{policy.__name__: _async(policy, max_staleness=2) for policy in (RefusesOneTooMany, RefusesOneTooFew)},
    ScalesByStalenessAlone.__name__: _async(lambda b: ScalesByStalenessAlone(b, inverse=True), staleness_lr="inverse"),
    **{
        policy.__name__: _ssp(policy)
        for policy in (
            OneStepTooFar,
            NeverLetsGo,
            HoldsPushesOnly,
            ForgetsToFreeOnLeave,
            NewcomersStartFromZero,
            AnswersTwice,
        )
    },
    **{
        shard.__name__: Parts(Mode(), shard=shard)
        for shard in (IgnoresEpochs, FollowsOldRosters, LosesParkedPushes, AdmitsOldSessions)
    },
    **{
        membership.__name__: Parts(Mode(), membership=membership)
        for membership in (NewcomersStartAtOnce, NeverEvicts, LeaveIsForgotten, NamesByLetters)
    },
}
