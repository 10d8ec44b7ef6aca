"""Invariants of a simulated job: a checker that sees every effect of every shard and knows what must never happen.

Rules of this file
  1. The checker reads effects and rosters only, never the inside of the core, and keeps its own count of everything.
  2. A broken claim raises ``Violation`` at the event that broke it, with a sentence.

Claims
  once        nothing is applied twice, and nothing that was not pushed
  kept        an answer with applied=True names a push that is in exactly one Apply; applied=False one that is in none
  complete    a synchronous step holds every required member exactly once, in rank order, computed from its own version
  same set    all buckets of all shards average the same members for the same step, but for members that left
  few         with b backup workers a step needs N - b of them, at least one, and waits for no more
  slack       nobody reads while its clock leads the slowest member's by more than the slack
  stale       what is older than the bound is refused, nothing else; the learning rate shrinks as the mode says
  forward     versions grow by one per Apply, epochs and sessions only grow
  answered    every request gets one answer at most, and only on the stream that asked
  reasons     every effect says why, and a wait names members that are really missing
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from torch_ps.ps.core.effects import Apply, Contribution, Discard, Release, Wait
from torch_ps.ps.core.modes import Mode
from torch_ps.ps.core.policy import Hold
from torch_ps.ps.core.roster import Member, Roster

Key = tuple[str, int, int, int]  # (worker, session, bucket, step), names one push to one shard
Session = tuple[str, int]


class Violation(AssertionError):
    """A claim of this file is broken."""


def claim(holds: bool, sentence: str) -> None:
    if not holds:
        raise Violation(sentence)


def by_rank(members: tuple[Member, ...]) -> list[str]:
    """Names in rank order, computed apart from the core: asked-for ranks first, then names, their numbers by value."""
    padded = {m.name: re.sub("[0-9]+", lambda n: n.group().zfill(12), m.name) for m in members}
    asked = sorted((m for m in members if m.rank is not None), key=lambda m: m.rank or 0)
    return [m.name for m in asked] + sorted((m.name for m in members if m.rank is None), key=padded.__getitem__)


@dataclass
class Payload:
    """Content of a push, without its name."""

    base: int
    weight: float


@dataclass
class Books:
    """Counts of the checker for one shard."""

    roster: Roster = field(default_factory=Roster)
    versions: dict[int, int] = field(default_factory=dict)
    samples: dict[int, float] = field(default_factory=dict)
    contributors: dict[int, tuple[str, ...]] = field(default_factory=dict)
    held: dict[Key, Payload] = field(default_factory=dict)
    applied: set[Key] = field(default_factory=set)
    newest: dict[tuple[str, int, int], int] = field(default_factory=dict)  # the last step that a session has pushed
    counted: set[Key] = field(default_factory=set)  # pushes of open steps, each with somebody to wait for
    clocks: dict[tuple[str, int, int], int] = field(default_factory=dict)  # (worker, session, bucket) -> steps finished
    floors: dict[int, int] = field(default_factory=dict)
    asked: set[tuple[str, int, int, int | None]] = field(default_factory=set)  # on the streams that are up now


class InvariantChecker:
    """Claims about one job."""

    def __init__(self, mode: Mode, *, num_shards: int) -> None:
        self.mode = mode
        self.sync = mode.name == "sync" or (mode.name == "ssp" and mode.slack == 0)
        self.books = [Books() for _ in range(num_shards)]
        self.left: set[Session] = set()  # sessions that were members and are not any more
        self.steps: dict[int, tuple[frozenset[Session], str]] = {}  # step -> who made it where it closed first
        self.lead = Roster()
        self.joined: dict[Session, Member] = {}

    def announced(self, roster: Roster) -> None:
        claim(roster.epoch > self.lead.epoch, f"epoch {self.lead.epoch} is followed by {roster.epoch}")
        claim(roster.open or not self.lead.open, "an open roster closed again")
        claim([m.name for m in roster.members] == by_rank(roster.members), f"not in rank order: {roster}")
        before = {(m.name, m.session): m for m in self.lead.members}
        after = {(m.name, m.session): m for m in roster.members}
        for (name, session), m in after.items():
            if (name, session) not in before:
                highest = max((s for _, s in self.joined), default=0)
                claim(session > highest, f"session {session} of {name} is not larger than {highest}")
                self.joined[name, session] = m
        self.left |= set(before) - set(after)
        self.lead = roster

    def follows(self, shard: int, roster: Roster) -> None:
        claim(roster.epoch >= self.books[shard].roster.epoch, f"shard {shard} went back to epoch {roster.epoch}")
        self.books[shard].roster = roster

    def holding(self, shard: int, key: Key, payload: Payload) -> bool:
        """The shell's rule 1; whether this call put the payload there."""
        worker, session, bucket, step = key
        newest = self.books[shard].newest
        newest[worker, session, bucket] = max(step, newest.get((worker, session, bucket), 0))
        held = self.books[shard].held
        return held.setdefault(key, payload) is payload

    def applies(self, shard: int, effect: Apply) -> None:
        books, bucket = self.books[shard], effect.bucket
        claim(bool(effect.reason), "an Apply without a reason")
        version = books.versions.get(bucket, 0)
        claim(effect.version == version + 1, f"version {version} is followed by {effect.version}")
        for c in effect.contributions:
            key = (c.worker, c.session, bucket, c.step)
            claim(key not in books.applied, f"{key} is applied twice on shard {shard}")
            claim(key in books.held, f"{key} is applied on shard {shard} without a payload")
            payload = books.held.pop(key)
            books.applied.add(key)
            books.counted.discard(key)
            claim(c.weight == payload.weight, f"{key} weighs {c.weight}, not {payload.weight}")
            claim(c.staleness == version - payload.base, f"{key} is not {c.staleness} versions stale")
            bound = self.mode.max_staleness
            claim(bound is None or c.staleness <= bound, f"{key} is applied, {c.staleness} versions stale")
            scale = 1 / (1 + c.staleness) if self.mode.staleness_lr == "inverse" else 1
            claim(effect.lr_scale == scale, f"{key} has the learning rate times {effect.lr_scale}, not {scale}")
            books.clocks[c.worker, c.session, bucket] = c.step + 1
        if self.sync:
            self._step_closes(shard, bucket, version, effect.contributions)
        books.versions[bucket] = effect.version
        books.samples[bucket] = books.samples.get(bucket, 0.0) + sum(c.weight for c in effect.contributions)
        books.contributors[bucket] = tuple(c.worker for c in effect.contributions)

    def _step_closes(self, shard: int, bucket: int, step: int, contributions: tuple[Contribution, ...]) -> None:
        roster = self.books[shard].roster
        required = tuple(m for m in roster.members if m.first_step <= step)
        came = [c.worker for c in contributions]
        where = f"step {step} of bucket {bucket} on shard {shard}"
        claim(roster.open, f"{where} closed before the first quorum")
        claim(bool(roster.members), f"{where} closed without any member")
        expected = (
            [name for name in by_rank(required) if name in came] if self.mode.backup_workers else by_rank(required)
        )
        claim(came == expected, f"{where} closed with {came}, required are {by_rank(required)}")
        claim(len(came) >= self._needed(len(required)), f"{where} closed with {came} alone")
        sessions = frozenset((c.worker, c.session) for c in contributions)
        claim(sessions <= {(m.name, m.session) for m in required}, f"{where} closed with old sessions: {sessions}")
        claim(all(c.step == step and c.staleness == 0 for c in contributions), f"{where} holds another step's push")
        if self.mode.backup_workers:
            return  # every bucket takes the first that come
        first, there = self.steps.setdefault(step, (sessions, where))
        claim((first ^ sessions) <= self.left, f"{where} averaged {set(sessions)}, but {there} {set(first)}")

    def _needed(self, required: int) -> int:
        return max(required - self.mode.backup_workers, min(required, 1))

    def releases(self, shard: int, effect: Release) -> None:
        books, bucket = self.books[shard], effect.bucket
        claim(bool(effect.reason), "a Release without a reason")
        claim(effect.version == books.versions.get(bucket, 0), f"{effect} is not of the newest version")
        claim(effect.samples == books.samples.get(bucket, 0.0), f"{effect} counts samples wrongly")
        claim(effect.contributors == books.contributors.get(bucket, ()), f"{effect} names others")
        if effect.worker is None:
            return
        request = (effect.worker, effect.session, bucket, effect.step)
        claim(request in books.asked, f"{effect} answers a request that nobody waits for")
        books.asked.remove(request)
        if effect.step is not None:
            key = (effect.worker, effect.session, bucket, effect.step)
            if effect.step == books.newest[key[:3]]:  # else nobody reads it
                claim(effect.applied == (key in books.applied), f"{effect} lies about what was applied")
            claim(key not in books.held, f"{effect} leaves its payload in hold")
        if self.sync:
            first = self.joined[effect.worker, effect.session].first_step
            claim(effect.next_step == effect.version >= first, f"{effect}, but it starts with step {first}")
            dropped = not effect.applied and (effect.step or 0) >= first
            claim(not dropped or self.mode.backup_workers > 0, f"{effect} drops a push that the step waited for")
        else:
            self._answered(books, effect)

    def _answered(self, books: Books, effect: Release) -> None:
        worker, session, bucket = effect.worker or "", effect.session, effect.bucket
        first = self.joined[worker, session].first_step if self.mode.name == "ssp" else 0
        if effect.step is not None and effect.step >= first and not effect.applied:
            bound = self.mode.max_staleness
            claim(bound is not None and effect.staleness > bound, f"{effect} refuses what was not too old")
        if self.mode.name != "ssp":
            return
        roster = books.roster
        if roster.open:
            clocks = [books.clocks.get((m.name, m.session, bucket), m.first_step) for m in roster.members]
            books.floors[bucket] = max(books.floors.get(bucket, 0), min(clocks, default=0))
        floor = books.floors.get(bucket, 0)
        claim(effect.next_step - floor <= self.mode.slack, f"{effect} lets it read while the slowest is at {floor}")
        clock = books.clocks.get((worker, session, bucket), first)
        claim(effect.next_step == clock, f"{effect}, but it has finished {clock} steps")

    def discards(self, shard: int, effect: Discard, decided: bool = True) -> None:
        books = self.books[shard]
        key = (effect.worker, effect.session, effect.bucket, effect.step)
        claim(bool(effect.reason), "a Discard without a reason")
        claim(key in self.books[shard].held, f"{effect} of a payload that is not held")
        del books.held[key]
        books.counted.discard(key)
        at = key[:3]
        if decided and effect.step >= books.clocks.get(at, self.joined[key[:2]].first_step):
            books.clocks[at] = effect.step + 1

    def waits(self, shard: int, effect: Wait, holds: list[Hold], parked: bool) -> None:
        """Check one answer that is held back.

        Args:
            holds: what the shard says of it; none where a later effect of the same call answers it.
            parked: whether the request speaks of a roster that the shard does not know yet.
        """
        books = self.books[shard]
        claim(len(holds) <= 1, f"{effect} is held {len(holds)} times")
        nameless = parked or not books.roster.open or not (self.sync or self.mode.name == "ssp")
        for hold in holds:
            claim(bool(hold.reason), "an answer is held back without a reason")
            claim(hold.worker not in hold.waiting_for, f"{hold.worker} waits for itself")
            names = {m.name for m in books.roster.members}
            claim(set(hold.waiting_for) <= names, f"{hold} waits for somebody who is not a member")
            claim(nameless or bool(hold.waiting_for), f"{hold} does not know whom it waits for")
        if self.sync and not parked and books.roster.open:
            open_step = books.versions.get(effect.bucket, 0)
            required = {(m.name, m.session) for m in books.roster.members if m.first_step <= open_step}
            if effect.step == open_step and (effect.worker, effect.session) in required:
                books.counted.add((effect.worker, effect.session, effect.bucket, open_step))
            came = sum((w, s) in required for w, s, b, step in books.counted if (b, step) == (effect.bucket, open_step))
            claim(came < self._needed(len(required)), f"{effect} though {came} of {len(required)} have pushed")

    def settled(self, shard: int) -> None:
        """With nothing on its way: what is held is the open step's, and nobody but members has anything here."""
        books = self.books[shard]
        members = {(m.name, m.session) for m in books.roster.members}
        for worker, session, bucket, step in books.held:
            claim(self.sync and step == books.versions.get(bucket, 0), f"payload of {worker}, step {step} leaks")
            claim((worker, session) in members, f"payload of {worker}, session {session} outlives it")
