"""Membership: the lead's machine of sessions, leases and roster epochs.

Rules of this file
  1. Only the lead owns a ``Membership``; every shard (the lead's own too) follows the rosters that it announces.
  2. Every change is a new epoch. A session is the epoch in which it joined, so sessions are unique, they grow, and a
     shard that knows epoch e knows of every session <= e whether it is a member.
  3. Before the first quorum nothing closes and all start at the open step. After it a newcomer starts one step later:
     other shards may have closed a part of the open step, and so all of them average the same set.
  4. Joining again under the same name is a leave of the old session and a join of a new one, in one epoch.
  5. A restored job is one before its quorum: its members are expected, each until it is heard of, joins anew or its
     lease runs out. Then the quorum counts, or, if somebody of before has come back, whoever is there.
  6. Epochs of a restored job begin above all that may have been given out after the checkpoint, also by an earlier
     restart from the same one, so that no session or epoch of then is taken for one of now. The caller's clock sees to
     that, as epochs change less often than once a millisecond; ``EPOCHS_PER_LIFE`` does where the clock was set back.

Why rule 3 is enough: nobody pushes step k+1 before the lead has answered all of step k. So when the lead's open step
is k, no bucket anywhere has closed k+1, and every push of k+1 carries an epoch that has the newcomer in it.

    join --> member --silent for longer than the lease--> evicted --> (joins again with a new session)
               ^  |
          renew+  +--leave--> gone

Source: leases, Gray and Cheriton, SOSP 1989.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch_ps.common.errors import ConfigError, NameTaken, Overloaded, ProtocolError, UnknownWorker
from torch_ps.ps.core.effects import Announce, Effect, Effects, Evict
from torch_ps.ps.core.roster import MAX_NAME, Member, Roster, parse_member, parse_roster, rank_order

#: More epochs than a job gives out between a checkpoint and its restart.
EPOCHS_PER_LIFE = 1 << 20


def tick_seconds(lease: float) -> float:
    """Seconds between two ticks of a ``Membership``: a silent worker is evicted within ``lease`` plus this."""
    return min(lease / 8, 1.0)


class Membership:
    """The lead's machine: sessions, leases and epochs.

    Args:
        quorum: workers that the first synchronous step waits for, >= 1.
        lease: seconds of silence after which a worker is evicted, > 0.
        limit: most members at a time, >= quorum.
        started: milliseconds of the calendar when the lead was started.
    """

    def __init__(self, *, quorum: int, lease: float, limit: int = 100_000, started: int = 0) -> None:
        if quorum < 1:
            raise ConfigError(f"workers must be >= 1; got {quorum}")
        if not lease > 0:
            raise ConfigError(f"lease must be > 0 seconds; got {lease}")
        self.roster = Roster()
        self._quorum = quorum
        self._lease = lease
        self._limit = limit
        self._started = started
        self._seen: dict[str, float] = {}
        self._expected: set[str] = set()  # members of before the restart of whom nothing was heard
        self._survived = False  # one of them has been
        self._cut = 0
        #: Given out since the start or restored.
        self.num_sessions = 0

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
        replaced = [m for m in others if rank is not None and m.rank == rank and m.name in self._expected]
        others = [m for m in others if m not in replaced]
        for m in others:
            if rank is not None and m.rank == rank:
                silent = self.silent_for(m.name, now)
                raise NameTaken(
                    f"rank {rank} belongs to worker {m.name!r}, last heard of {silent:.1f} s ago; "
                    f"choose another rank or wait until its lease of {self._lease:g} s has run out"
                )
        if len(others) >= self._limit:
            raise Overloaded(
                f"worker {name!r} cannot join: the job has {len(others)} workers, as many as --max-workers allows"
            )
        self._expected -= {name, *(m.name for m in replaced)}
        self.num_sessions += 1
        epoch = self.roster.epoch + 1
        member = Member(name, epoch, rank, open_step + 1 if self.roster.open else open_step)
        effects: list[Effect] = []
        if old is not None:
            effects.append(Evict(name, old.session, f"{name} joined again; this is its session {old.session}"))
        for m in replaced:
            del self._seen[m.name]
            effects.append(Evict(m.name, m.session, f"{name} has come in its place, with rank {rank}"))
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
        if name in self._expected:
            self._expected.remove(name)
            self._survived = True

    def stood_still(self, seconds: float, now: float) -> None:
        """The lead has heard nobody for so long, until now: that is nobody's silence but its own."""
        self._seen = {name: min(seen + seconds, now) for name, seen in self._seen.items()}

    def leave(self, name: str, session: int, now: float, open_step: int) -> Effects:
        """A graceful leave; of a session that is not (or no longer) a member it changes nothing."""
        member = self.roster.member(name)
        if member is None or member.session != session:
            return ()
        return (self._without({name}, f"{name} left in step {open_step}"),)

    def tick(self, now: float, open_step: int) -> Effects:
        """Evict everyone who has been silent for longer than the lease."""
        self._seen = {name: now if seen == -math.inf else seen for name, seen in self._seen.items()}
        silent = {m.name: now - self._seen[m.name] for m in self.roster.members}
        late = [m for m in self.roster.members if silent[m.name] > self._lease]
        if not late:
            if not self.roster.open and self._complete(len(self.roster.members)):
                return (self._announce(list(self.roster.members), f"all are back; step {open_step} goes on"),)
            return ()
        said = {
            m.name: f"no sign of life from {m.name} for {silent[m.name]:.1f} s (lease {self._lease:g} s)" for m in late
        }
        reason = f"{'; '.join(said.values())}; step {open_step} goes on without"
        announce = self._without(set(said), reason)
        return (*(Evict(m.name, m.session, said[m.name]) for m in late), announce)

    def plan_cut(self, version: int) -> Effects:
        """Have every shard copy its state at ``version``."""
        self._cut = version
        return (self._announce(list(self.roster.members), f"version {version} will be kept"),)

    def export(self) -> dict[str, Any]:
        """Sessions and ranks, as plain data."""
        members = [[m.name, m.session, m.rank, m.first_step] for m in self.roster.members]
        return {"epoch": self.roster.epoch, "members": members}

    def restore(self, data: Mapping[str, Any]) -> None:
        """Expect the members that ``export`` gave; see rules 5 and 6. Their leases begin at the first ``tick``.

        Raises:
            KeyError, TypeError, ValueError: ``data`` is not what ``export`` gives; nothing has changed.
        """
        members = [parse_member(*each) for each in data["members"]]
        epoch = data["epoch"]
        if type(epoch) is not int or epoch < max((m.session for m in members), default=0):
            raise ValueError(f"epoch {epoch!r} does not fit its sessions")
        self._seen = {m.name: -math.inf for m in members}
        self._expected, self.num_sessions = set(self._seen), len(members)
        self.roster = Roster(max(epoch + EPOCHS_PER_LIFE, self._started), rank_order(members))

    def hand_over(self) -> dict[str, Any]:
        """All of it, as plain data for a standby."""
        return {
            **self.export(),
            "open": self.roster.open,
            "expected": sorted(self._expected),
            "survived": self._survived,
            "num_sessions": self.num_sessions,
        }

    def take_over(self, data: Mapping[str, Any]) -> Effects:
        """Go on as the lead that ``hand_over`` described; leases begin at the first ``tick``. No cut is planned.

        Raises:
            KeyError, TypeError, ValueError: ``data`` is not what ``hand_over`` gives; nothing has changed.
        """
        expected, sessions = {str(name) for name in data["expected"]}, int(data["num_sessions"])
        self.restore(data)
        self._expected, self._survived, self.num_sessions = expected, bool(data["survived"]), sessions
        self.roster = parse_roster(data)
        return (self._announce(list(self.roster.members), "the standby of the lead goes on"),)

    def silent_for(self, name: str, now: float) -> float:
        """Seconds since the last sign of life.

        Raises:
            UnknownWorker: not a member.
        """
        if name not in self._seen:
            raise UnknownWorker(f"worker {name!r} is not in roster epoch {self.roster.epoch}")
        return max(now - self._seen[name], 0.0) if self._seen[name] > -math.inf else 0.0

    def _live(self, name: str, session: int) -> None:
        member = self.roster.member(name)
        if member is None or member.session != session:
            raise UnknownWorker(
                f"session {session} of worker {name!r} is not in roster epoch {self.roster.epoch}; join again"
            )

    def _without(self, names: set[str], reason: str) -> Announce:
        self._expected -= names
        for name in names:
            del self._seen[name]
        return self._announce([m for m in self.roster.members if m.name not in names], reason)

    def _announce(self, members: list[Member], reason: str) -> Announce:
        is_open = self.roster.open or self._complete(len(members))
        self.roster = Roster(self.roster.epoch + 1, rank_order(members), is_open, self._cut)
        return Announce(self.roster, reason)

    def _complete(self, num_members: int) -> bool:
        return not self._expected and num_members >= (1 if self._survived else self._quorum)
