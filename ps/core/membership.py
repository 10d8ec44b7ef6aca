"""Membership: the lead's machine of sessions, leases and roster epochs.

Rules of this file
  1. Only the lead owns a ``Membership``; every shard (the lead's own too) follows the rosters that it announces.
  2. Every change of the roster is a new epoch. A session is the epoch in which it joined, so sessions are unique and
     grow, and a shard that knows epoch e knows of every session <= e whether it is a member.
  3. Before the first quorum no step closes, and everybody starts at the open step. After it a newcomer starts one step
     later, so that all shards average the same set: some may have closed a part of the open step already.
  4. Joining again under the same name is a leave of the old session and a join of a new one, in one epoch. Joining
     again with the digest of the old session is a repeat, whose answer was lost: the session stays.
  5. A restored job is before its quorum. Each of its members is expected until it is heard of, joins anew, or its lease
     runs out. After that the job starts with a quorum or, if a former member has come back, with the members present.
  6. Epochs of a restored job begin above all that may have been given out after the checkpoint, also by an earlier
     restart from the same checkpoint, so that no old session or epoch is taken for a new one. The caller's clock sees
     to that, as epochs change less often than once a millisecond, and ``EPOCHS_PER_LIFE`` where the clock was set back.

Rule 3 is enough because nobody pushes step k+1 before the lead has answered all of step k. So while the lead's open
step is k, no bucket of any shard has closed k+1, and every push of k+1 carries an epoch that includes the newcomer.

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
from torch_ps.ps.core.roster import MAX_NAME, Member, Roster, member_to_data, parse_member, parse_roster, rank_order

#: More epochs than a job gives out between a checkpoint and its restart.
EPOCHS_PER_LIFE = 1 << 20


def tick_seconds(lease: float) -> float:
    """Seconds between two ticks of a ``Membership``: a silent worker is evicted within ``lease`` plus this."""
    return min(lease / 8, 1.0)


class Membership:
    """The lead's machine: sessions, leases and epochs.

    Args:
        quorum: number of workers that the first synchronous step waits for, >= 1.
        lease: seconds of silence after which a worker is evicted, > 0.
        limit: number of members at a time, at most; >= quorum.
        started: time of the lead's start, in milliseconds since 1970.

    Raises:
        ConfigError: a value is out of its range.
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
        self._expected: set[str] = set()  # members of the job that was restored, and not heard of since
        self._survived = False  # whether one of them has come back
        self._cut = 0
        #: Number of sessions that were given out since the start, and of those that were restored.
        self.num_sessions = 0
        #: Number of times that a worker has joined this lead.
        self.num_joins = 0

    def join(
        self,
        name: str,
        rank: int | None,
        now: float,
        open_step: int,
        *,
        replace: bool = True,
        digest: str = "",
        seeds: str = "",
    ) -> tuple[Member, Effects]:
        """Admit a worker, or the next life of one.

        Args:
            name: name of the worker, 1 to 100 printable characters.
            rank: rank that it asks for, >= 0; None leaves it to the order of names.
            open_step: clock of the lead's shard.
            replace: whether a live session of this name gives way. The shell passes False while a stream of that
                session is alive, as it is another process then.
            digest: digest of the secret of the new session; "": nobody can show it, and no join is a repeat.
            seeds: digest of the model whose first parameters this worker has to send; "": it sends none.

        Raises:
            NameTaken: another live member has this rank or, without ``replace``, this name.
            Overloaded: there are as many members as ``limit`` allows.
            ProtocolError: the name or the rank is out of its range.
        """
        if not 1 <= len(name) <= MAX_NAME or not name.isprintable() or name.isspace():
            raise ProtocolError(f"a worker's name has 1 to {MAX_NAME} printable characters; got {name[:MAX_NAME]!r}")
        if rank is not None and rank < 0:
            raise ProtocolError(f"rank of worker {name!r} must be >= 0; got {rank}")
        old = self.roster.member(name)
        if old is not None and digest and old.digest == digest:
            self.renew(name, old.session, now)
            return old, ()
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
        self.num_joins += 1
        epoch = self.roster.epoch + 1
        member = Member(name, epoch, rank, open_step + 1 if self.roster.open else open_step, digest, seeds)
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
        """Renew a lease: there was a sign of life.

        Raises:
            UnknownWorker: the session is not in the roster; the worker has to join again.
        """
        self._live(name, session)
        self._seen[name] = max(now, self._seen[name])
        if name in self._expected:
            self._expected.remove(name)
            self._survived = True

    def stood_still(self, seconds: float, now: float) -> None:
        """Extend all leases by a time in which the lead itself stood still and could hear nobody.

        Args:
            seconds: length of that time, which ended at ``now``.
        """
        self._seen = {name: min(seen + seconds, now) for name, seen in self._seen.items()}

    def leave(self, name: str, session: int, now: float, open_step: int) -> Effects:
        """Take a worker that says goodbye out of the roster. A session that is not a member changes nothing."""
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
        """Announce that every shard copies its state at ``version``."""
        self._cut = version
        return (self._announce(list(self.roster.members), f"version {version} will be kept"),)

    def export(self) -> dict[str, Any]:
        """What a checkpoint keeps, as plain data: the epoch, sessions with their digests, and ranks."""
        return {"epoch": self.roster.epoch, "members": [member_to_data(m) for m in self.roster.members]}

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
        """All state as plain data, for a standby."""
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
        """Seconds since the last sign of life of a member.

        Raises:
            UnknownWorker: there is no member of this name.
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
