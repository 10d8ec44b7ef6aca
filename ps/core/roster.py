"""Who takes part: the roster, its leases and the sessions of its members.

Rules of this file
  1. Only the lead owns a ``Membership``; every shard (the lead's own too) follows the rosters that it announces.
  2. Every change is a new epoch. A session is the epoch in which it joined, so sessions are unique, they grow, and a
     shard that knows epoch e knows of every session <= e whether it is a member.
  3. Before the first quorum nothing closes and all start at the open step. After it a newcomer starts one step later:
     other shards may have closed a part of the open step, and so all of them average the same set.
  4. Joining again under the same name is a leave of the old session and a join of a new one, in one epoch.

Why rule 3 is enough: nobody pushes step k+1 before the lead has answered all of step k. So when the lead's open step
is k, no bucket anywhere has closed k+1, and every push of k+1 carries an epoch that has the newcomer in it.

    join --> member --silent for longer than the lease--> evicted --> (joins again with a new session)
               ^  |
          renew+  +--leave--> gone

Source: leases, Gray and Cheriton, SOSP 1989.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch_ps.common.errors import ConfigError, NameTaken, Overloaded, ProtocolError, UnknownWorker
from torch_ps.ps.core.effects import Announce, Effect, Effects, Evict

MAX_NAME = 100


@dataclass(frozen=True, slots=True)
class Member:
    """One life of one worker.

    Attributes:
        session: names this life; a restarted worker has a larger one.
        rank: as asked for, or None.
        first_step: first synchronous step that waits for it.
    """

    name: str
    session: int
    rank: int | None
    first_step: int


@dataclass(frozen=True, slots=True)
class Roster:
    """The workers that a synchronous step waits for.

    Attributes:
        members: in rank order (see ``rank_order``): the position is the rank.
        open: the first quorum has been reached; until then no step closes.
    """

    epoch: int = 0
    members: tuple[Member, ...] = ()
    open: bool = False

    def member(self, name: str) -> Member | None:
        return next((m for m in self.members if m.name == name), None)

    def rank_of(self, name: str) -> int:
        for rank, member in enumerate(self.members):
            if member.name == name:
                return rank
        raise UnknownWorker(f"worker {name!r} is not in roster epoch {self.epoch}; join first")

    def required(self, step: int) -> tuple[str, ...]:
        """Who has to push ``step`` before it closes, in rank order."""
        return tuple(m.name for m in self.members if m.first_step <= step)


def rank_order(members: Iterable[Member]) -> tuple[Member, ...]:
    """Those who asked for a rank first, by number; then the others by name in natural order: w2 before w10."""

    def key(member: Member) -> tuple[bool, int, list[str | int], str]:
        parts: list[str | int] = [int(p) if i % 2 else p for i, p in enumerate(re.split("([0-9]+)", member.name))]
        return member.rank is None, member.rank or 0, parts, member.name

    return tuple(sorted(members, key=key))


class Membership:
    """The lead's machine: sessions, leases and epochs.

    Args:
        quorum: workers that the first synchronous step waits for, >= 1.
        lease: seconds of silence after which a worker is evicted, > 0.
        limit: most members at a time, >= quorum.
    """

    def __init__(self, *, quorum: int, lease: float, limit: int = 100_000) -> None:
        if quorum < 1:
            raise ConfigError(f"workers must be >= 1; got {quorum}")
        if not lease > 0:
            raise ConfigError(f"lease must be > 0 seconds; got {lease}")
        self.roster = Roster()
        self._quorum = quorum
        self._lease = lease
        self._limit = limit
        self._seen: dict[str, float] = {}

    def join(
        self, name: str, rank: int | None, now: float, open_step: int, *, replace: bool = True
    ) -> tuple[Member, Effects]:
        """Admit a worker, or the next life of one.

        Args:
            name: 1 to 100 printable characters.
            rank: asked for, >= 0; None takes the order of names.
            open_step: of the lead's shard.
            replace: whether a live session of this name gives way. The shell says False while that session's stream
                is alive: then it is another process under the same name.

        Raises:
            NameTaken: another live member has this rank or (with replace False) this name.
            Overloaded: there are as many members as may be.
            ProtocolError: a bad name or rank.
        """
        if not 1 <= len(name) <= MAX_NAME or not name.isprintable():
            raise ProtocolError(f"a worker's name has 1 to {MAX_NAME} printable characters; got {name[:MAX_NAME]!r}")
        if rank is not None and rank < 0:
            raise ProtocolError(f"rank of worker {name!r} must be >= 0; got {rank}")
        old = self.roster.member(name)
        if old is not None and not replace:
            raise NameTaken(f"worker {name!r} is in the job already and alive; choose another name")
        others = [m for m in self.roster.members if m is not old]
        for m in others:
            if rank is not None and m.rank == rank:
                raise NameTaken(
                    f"rank {rank} belongs to worker {m.name!r}, last heard of {now - self._seen[m.name]:.1f} s ago; "
                    f"choose another rank or wait until its lease of {self._lease:g} s has run out"
                )
        if len(others) >= self._limit:
            raise Overloaded(
                f"worker {name!r} cannot join: the job has {len(others)} workers, as many as --max-workers allows"
            )
        epoch = self.roster.epoch + 1
        member = Member(name, epoch, rank, open_step + 1 if self.roster.open else open_step)
        effects: list[Effect] = []
        if old is not None:
            effects.append(Evict(name, old.session, f"{name} joined again; this is its session {old.session}"))
        self._seen[name] = now
        here = "joined again" if old is not None else "joined"
        effects.append(self._announce([*others, member], f"{name} {here}, first step {member.first_step}"))
        return member, tuple(effects)

    def renew(self, name: str, session: int, now: float) -> None:
        """A sign of life.

        Raises:
            UnknownWorker: not a member with that session; it has to join again.
        """
        self._live(name, session)
        self._seen[name] = max(now, self._seen[name])

    def leave(self, name: str, session: int, now: float, open_step: int) -> Effects:
        """A graceful leave; of a session that is not (or no longer) a member it changes nothing."""
        member = self.roster.member(name)
        if member is None or member.session != session:
            return ()
        return (self._without({name}, f"{name} left in step {open_step}"),)

    def tick(self, now: float, open_step: int) -> Effects:
        """Evict everyone who has been silent for longer than the lease."""
        silent = {m.name: now - self._seen[m.name] for m in self.roster.members}
        late = [m for m in self.roster.members if silent[m.name] > self._lease]
        if not late:
            return ()
        said = {
            m.name: f"no sign of life from {m.name} for {silent[m.name]:.1f} s (lease {self._lease:g} s)" for m in late
        }
        reason = f"{'; '.join(said.values())}; step {open_step} goes on without"
        announce = self._without(set(said), reason)
        return (*(Evict(m.name, m.session, said[m.name]) for m in late), announce)

    def silent_for(self, name: str, now: float) -> float:
        """Seconds since the last sign of life.

        Raises:
            UnknownWorker: not a member.
        """
        if name not in self._seen:
            raise UnknownWorker(f"worker {name!r} is not in roster epoch {self.roster.epoch}")
        return now - self._seen[name]

    def _live(self, name: str, session: int) -> None:
        member = self.roster.member(name)
        if member is None or member.session != session:
            raise UnknownWorker(
                f"session {session} of worker {name!r} is not in roster epoch {self.roster.epoch}; join again"
            )

    def _without(self, names: set[str], reason: str) -> Announce:
        for name in names:
            del self._seen[name]
        return self._announce([m for m in self.roster.members if m.name not in names], reason)

    def _announce(self, members: list[Member], reason: str) -> Announce:
        is_open = self.roster.open or len(members) >= self._quorum
        self.roster = Roster(self.roster.epoch + 1, rank_order(members), is_open)
        return Announce(self.roster, reason)
