"""Synchronous SGD: a step closes when every worker that it requires has pushed it.

Rules of this file
  1. What closes a step is decided here and nowhere else. A bucket's version is the step that is open.
  2. A step requires the members whose first step is not ahead of it, and closes only in a roster that is open.
  3. A step that nobody is required for, because all of its workers have left, closes empty while there are members. So
     every bucket of every shard reaches the newcomers' first step, and the newcomers stay in step with each other.
  4. A worker that leaves takes its pushes of the open step with it; a step that is complete without them closes.
  5. With b backup workers a step closes with the first N - b pushes, but never with none. Each bucket closes by itself,
     so a worker may be late with one bucket and in time with another.

    open(k) --last missing push--------------> Apply, Release --> open(k+1)
            --last missing worker leaves-----> the same, with the pushes that came
            --last required worker leaves----> Apply with nothing --> open(k+1), if newcomers are there
            --push N - b of backup workers---> Apply, Release --> open(k+1); the other b are late
    push(step < k): Release, applied if the ledger has it, else dropped as late; push(step > k): StepConflict

Source: "sequential" consistency, Li et al., OSDI 2014; backup workers: Chen et al., 2016, arXiv:1604.00981.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch_ps.common.errors import StepConflict
from torch_ps.ps.core.effects import Contribution, Discard, Effect, Effects, Release, Wait
from torch_ps.ps.core.ledger import Ledger
from torch_ps.ps.core.policy import Hold, Push, name_list
from torch_ps.ps.core.roster import Member, Roster


@dataclass(slots=True)
class _Pushed:
    """A push of the open step; ``since`` is None while no stream waits for the answer."""

    push: Push
    since: float | None


class Synchronous:
    """One bucket under ``--mode sync``.

    Args:
        backups: number of pushes that a step does not wait for, >= 0.
    """

    def __init__(self, bucket: int, *, backups: int = 0) -> None:
        self.ledger = Ledger(bucket)
        self._backups = backups
        self._roster = Roster()
        self._last_first_step = 0  # of the newest member: from it on every step requires the whole roster
        self._required: tuple[str, ...] = ()  # of the open step, in rank order
        self._missing: set[str] = set()  # those of them that have not pushed it
        self._pushed: dict[str, _Pushed] = {}
        self._early: dict[tuple[str, int | None], tuple[Member, float]] = {}  # (worker, step): before its first step

    @property
    def clock(self) -> int:
        return self.ledger.version

    def check(self, push: Push) -> None:
        open_step = self.ledger.version
        if push.step > open_step:
            raise StepConflict(
                f"worker {push.worker!r} pushed step {push.step} of bucket {push.bucket}; step {open_step} is open"
            )
        if push.step == open_step and push.base != open_step:
            raise StepConflict(
                f"worker {push.worker!r} pushed step {push.step} of bucket {push.bucket} computed from version "
                f"{push.base}; it has to be computed from version {open_step}"
            )

    def taken(self, push: Push) -> bool:
        held, entry = self._pushed.get(push.worker), self.ledger.entry(push.worker, push.session)
        of_open_step = held is not None and (held.push.session, held.push.step) == (push.session, push.step)
        return of_open_step or (entry is not None and push.step <= entry.step)

    def push(self, push: Push, member: Member, now: float) -> Effects:
        if push.step < self.ledger.version:
            return self._closed(push)
        held = self._pushed.get(push.worker)
        if held is None and push.worker not in self._missing:
            return self._before_first_step(push, member, now)
        if held is not None:
            held.since = now
        else:
            self._pushed[push.worker] = _Pushed(push, now)
            self._missing.discard(push.worker)
        return self._close() or (self._wait(push.worker, push.session, push.step),)

    def pull(self, member: Member, now: float) -> Effects:
        if member.first_step > self.ledger.version:
            self._early[member.name, None] = member, now
            return (self._wait(member.name, member.session, None),)
        return (self._fresh(member, None),)

    def set_roster(self, roster: Roster) -> Effects:
        members = {(m.name, m.session) for m in roster.members}
        effects: list[Effect] = []
        for worker, held in list(self._pushed.items()):
            push = held.push
            if (worker, push.session) not in members:
                del self._pushed[worker]
                reason = f"{worker} left the roster before step {push.step} closed"
                effects.append(Discard(worker, push.session, push.bucket, push.step, reason))
        self._early = {k: v for k, v in self._early.items() if (v[0].name, v[0].session) in members}
        self.ledger.keep(members)
        self._roster = roster
        self._last_first_step = max((m.first_step for m in roster.members), default=0)
        self._required = roster.required(self.ledger.version)
        self._open()
        return (*effects, *self._close())

    def disconnected(self, worker: str, session: int) -> None:
        held = self._pushed.get(worker)
        if held is not None and held.push.session == session:
            held.since = None
        self._early = {k: v for k, v in self._early.items() if (v[0].name, v[0].session) != (worker, session)}

    def next_step(self, member: Member) -> int:
        return max(self.ledger.version, member.first_step)

    def holds(self) -> tuple[Hold, ...]:
        waiting: list[tuple[str, int, int | None, float | None]]
        waiting = [(p.push.worker, p.push.session, p.push.step, p.since) for p in self._pushed.values()]
        waiting += [(m.name, m.session, step, since) for (_, step), (m, since) in self._early.items()]
        holds = []
        waiting_for, reason = self._missing_pushes() if waiting else ((), "")
        for worker, session, step, since in waiting:
            if since is not None:
                holds.append(Hold(worker, session, self.ledger.bucket, step, since, waiting_for, reason))
        return tuple(holds)

    def _open(self) -> None:
        """Begin the open step: who is required for it, and who of them has not pushed it."""
        if self.ledger.version <= self._last_first_step:
            self._required = self._roster.required(self.ledger.version)
        self._missing = set(self._required).difference(self._pushed)

    @property
    def _num_missing(self) -> int:
        """Number of pushes that the open step still waits for. Backup workers may be missing, but not everybody."""
        spare = min(self._backups, max(len(self._required) - 1, 0))
        return max(len(self._missing) - spare, 0)

    def _close(self) -> Effects:
        effects: list[Effect] = []
        while self._roster.open and self._roster.members and not self._num_missing:
            step = self.ledger.version
            pushed = [self._pushed[worker] for worker in self._required if worker in self._pushed]
            self._pushed.clear()
            reason = (
                f"step {step} closed with {len(pushed)} of {len(self._required)} pushes"
                if pushed
                else f"step {step} closed empty: all of its workers have left"
            )
            contributions = tuple([Contribution(p.push.worker, p.push.session, step, p.push.weight, 0) for p in pushed])
            effects.append(self.ledger.apply(contributions, reason))
            self._open()
            for p in pushed:
                if p.since is not None:
                    worker, session = p.push.worker, p.push.session
                    effects.append(self._answer(worker, session, step, next_step=step + 1, reason=reason))
        for key, (member, _) in list(self._early.items()):
            if member.first_step <= self.ledger.version:
                del self._early[key]
                effects.append(self._fresh(member, key[1]))
        return tuple(effects)

    def _closed(self, push: Push) -> Effects:
        """Answer a push of a step that has closed: it is a repeat if the ledger has it, else it is late."""
        entry = self.ledger.entry(push.worker, push.session)
        applied = entry is not None and push.step <= entry.step
        reason = (
            f"step {push.step} of {push.worker} has been applied before"
            if applied
            else f"step {push.step} closed without {push.worker}; step {self.ledger.version} is open"
        )
        answer = self._answer(
            push.worker,
            push.session,
            push.step,
            next_step=self.ledger.version,
            staleness=0 if applied else max(0, self.ledger.version - push.base),
            applied=applied,
            reason=reason,
        )
        return Discard(push.worker, push.session, push.bucket, push.step, reason), answer

    def _before_first_step(self, push: Push, member: Member, now: float) -> Effects:
        """Drop a push of a step that does not require its worker, and answer when its first step is open."""
        self._early[push.worker, push.step] = member, now
        reason = f"{push.worker} takes part from step {member.first_step} on; step {push.step} does not wait for it"
        discard = Discard(push.worker, push.session, push.bucket, push.step, reason)
        return discard, self._wait(push.worker, push.session, push.step)

    def _answer(self, worker: str, session: int, step: int | None, **facts: Any) -> Release:
        """Answer. The version is stable where no step can close without this worker's push."""
        return self.ledger.answer(worker, session, step, stable=not self._backups, **facts)

    def _fresh(self, member: Member, step: int | None) -> Effect:
        version = self.ledger.version
        return self._answer(
            member.name,
            member.session,
            step,
            next_step=version,
            applied=step is None,
            reason=f"{member.name} gets version {version}; step {version} is open",
        )

    def _wait(self, worker: str, session: int, step: int | None) -> Wait:
        return Wait(worker, session, self.ledger.bucket, step)

    def _missing_pushes(self) -> tuple[tuple[str, ...], str]:
        """Whom the open step waits for, in rank order, and the same as a sentence."""
        waiting_for = tuple([w for w in self._required if w in self._missing])
        open_step = self.ledger.version
        if waiting_for:
            count = self._num_missing
            some = f"{count} of " if 0 < count < len(waiting_for) else ""
            reason = f"step {open_step} waits for {some}{name_list(waiting_for)}"
        else:
            reason = f"step {open_step} waits for the first quorum; {name_list(self._required)} pushed it"
        return waiting_for, reason
