"""Value types of the roster: who takes part in the job, as the lead announces it and every shard knows it.

Rules of this file
  1. Values only. ``Membership`` (membership.py) decides who is in a roster; this file knows no lease and no clock.
  2. A ``Member`` is one session of one worker. The position of a member in ``Roster.members`` is its rank.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch_ps.common.errors import UnknownWorker

#: Characters of a worker's name, at most.
MAX_NAME = 100

#: Name and session of a worker.
SessionKey = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Member:
    """One session of one worker.

    Attributes:
        session: roster epoch in which it joined; a worker that joins again has a larger one.
        rank: rank that the worker asked for, >= 0; None leaves it to the order of names.
        first_step: first synchronous step that waits for this worker.
        digest: digest of the secret that shows who speaks for the session; "" where nobody does.
        seeds: digest of the model whose first parameters it has to send; "": it sends none.
    """

    name: str
    session: int
    rank: int | None
    first_step: int
    digest: str = ""
    seeds: str = ""

    @property
    def key(self) -> SessionKey:
        return self.name, self.session


@dataclass(frozen=True, slots=True)
class Roster:
    """The workers that a synchronous step waits for.

    Attributes:
        epoch: number of the roster; every change of the roster has a new one.
        members: members in rank order (see ``rank_order``); the position is the rank.
        open: whether the first quorum has been reached; before that no step closes.
        cut: version at which every shard copies its state, see ``ps/core/consistent_cut.py``; 0 plans none.
    """

    epoch: int = 0
    members: tuple[Member, ...] = ()
    open: bool = False
    cut: int = 0
    _ranks: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_ranks", {m.name: rank for rank, m in enumerate(self.members)})

    def member(self, name: str) -> Member | None:
        """The member of this name, if there is one."""
        rank = self._ranks.get(name)
        return None if rank is None else self.members[rank]

    def rank_of(self, name: str) -> int:
        """Rank of a member, from 0.

        Raises:
            UnknownWorker: there is no member of this name.
        """
        if name not in self._ranks:
            raise UnknownWorker(f"worker {name!r} is not in roster epoch {self.epoch}; join first")
        return self._ranks[name]

    def required(self, step: int) -> tuple[str, ...]:
        """Names of the workers that have to push ``step`` before it closes, in rank order."""
        return tuple(m.name for m in self.members if m.first_step <= step)


def parse_roster(data: Mapping[str, Any]) -> Roster:
    """Read a roster from what ``Membership.hand_over`` gives.

    Raises:
        KeyError, TypeError, ValueError: ``data`` is not that.
    """
    members = [parse_member(*each) for each in data["members"]]
    return Roster(int(data["epoch"]), rank_order(members), bool(data["open"]), int(data.get("cut", 0)))


def rank_order(members: Iterable[Member]) -> tuple[Member, ...]:
    """Members in the order of ranks: first those who asked for one, then the others by name, w2 before w10."""

    def key(member: Member) -> tuple[bool, int, list[str | int], str]:
        parts: list[str | int] = [int(p) if i % 2 else p for i, p in enumerate(re.split("([0-9]+)", member.name))]
        return member.rank is None, member.rank or 0, parts, member.name

    return tuple(sorted(members, key=key))


def member_to_data(member: Member) -> list[Any]:
    """A member as plain data, which ``parse_member`` reads."""
    return [member.name, member.session, member.rank, member.first_step, member.digest]


def parse_member(name: Any, session: Any, rank: Any, first_step: Any, digest: Any = "") -> Member:
    """Read a member from plain data; without a digest, as in older checkpoints, it has to join again.

    Raises:
        ValueError: a value is out of its range, or of another type.
    """
    numbers = (session, first_step) if rank is None else (session, first_step, rank)
    if (
        not isinstance(name, str)
        or not 1 <= len(name) <= MAX_NAME
        or not all(_is_count(each) for each in numbers)
        or not isinstance(digest, str)
    ):
        raise ValueError(f"{[name, session, rank, first_step, digest]!r} is no member of a roster")
    return Member(name, session, rank, first_step, digest)


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0
