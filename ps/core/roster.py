"""Value types of the roster: who takes part in the job, as the lead announces it and every shard knows it.

Rules of this file
  1. Values only. ``Membership`` (membership.py) decides who is in a roster; this file knows no lease and no clock.
  2. A ``Member`` is one session of one worker. The position of a member in ``Roster.members`` is its rank.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch_ps.common.errors import UnknownWorker

#: Characters of a worker's name, at most.
MAX_NAME = 100

#: One life of one worker: its name and session.
SessionKey = tuple[str, int]


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

    @property
    def key(self) -> SessionKey:
        return self.name, self.session


@dataclass(frozen=True, slots=True)
class Roster:
    """The workers that a synchronous step waits for.

    Attributes:
        members: in rank order (see ``rank_order``): the position is the rank.
        open: the first quorum has been reached; until then no step closes.
        cut: version at which every shard copies its state, see ``consistent_cut.py``; 0: none is planned.
    """

    epoch: int = 0
    members: tuple[Member, ...] = ()
    open: bool = False
    cut: int = 0

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


def parse_roster(data: Mapping[str, Any]) -> Roster:
    """The roster in what ``Membership.hand_over`` gives, or another shard than the lead.

    Raises:
        KeyError, TypeError, ValueError: it is not that.
    """
    members = [parse_member(*each) for each in data["members"]]
    return Roster(int(data["epoch"]), rank_order(members), bool(data["open"]), int(data.get("cut", 0)))


def rank_order(members: Iterable[Member]) -> tuple[Member, ...]:
    """Those who asked for a rank first, by number; then the others by name in natural order: w2 before w10."""

    def key(member: Member) -> tuple[bool, int, list[str | int], str]:
        parts: list[str | int] = [int(p) if i % 2 else p for i, p in enumerate(re.split("([0-9]+)", member.name))]
        return member.rank is None, member.rank or 0, parts, member.name

    return tuple(sorted(members, key=key))


def parse_member(name: Any, session: Any, rank: Any, first_step: Any) -> Member:
    numbers = (session, first_step) if rank is None else (session, first_step, rank)
    if not isinstance(name, str) or not 1 <= len(name) <= MAX_NAME or not all(_is_count(each) for each in numbers):
        raise ValueError(f"{[name, session, rank, first_step]!r} is no member of a roster")
    return Member(name, session, rank, first_step)


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0
