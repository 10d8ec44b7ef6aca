"""Who may serve with etcd: every interleaving at small size, and what each rule is for."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.explore import Found, explore
from tests.support.tenants import State, Tenants
from torch_ps.common.wire.terms import Configuration
from torch_ps.ps.core.failover.leased import LeasedSeat
from torch_ps.ps.core.failover.seat import Decisions

#: What may happen beside answers and messages that are lost, late, repeated or out of order, and leases that run out.
WORLDS: dict[str, dict[str, Any]] = {
    "a standby in force; a record": {"records": 1},
    "the standby is attached": {"records": 0, "paired": False},
    "another standby comes": {"records": 0, "standbys": 1},
    "answers are late, and transactions that nobody waits for any more": {"records": 0, "late": True},
    "leases run out twice": {"records": 0, "ticks": 2},
}


def explored(**settings: Any) -> Found:
    world = Tenants(**settings)
    return explore(world.start, world.nexts, check=world.check, max_states=60_000)


@pytest.mark.parametrize("name", WORLDS)
def test_no_interleaving_loses_or_contradicts_what_was_acknowledged(name: str) -> None:
    found = explored(**WORLDS[name])
    assert found.complete, str(found)


@pytest.mark.parametrize("dead", [None, 0, 1])
def test_from_any_state_the_job_goes_on_with_one_server_that_may_serve(dead: int | None) -> None:
    world, seen = Tenants(records=0), list[tuple[State, int]]()

    def nexts(state: State, net: int) -> Any:
        seen.append((state, net))
        return world.nexts(state, net)

    assert explore(world.start, nexts, check=world.check, max_states=60_000).complete
    world.terms, tried = 1 << 30, 0
    for state, net in seen[::10]:
        left = state if dead is None else world.crashed(state, dead)
        if world.able(left):
            tried += 1
            assert world.goes_on(left, net), (left, [world.servers[each] for each in left.servers])
    assert tried > 20


class Timeless(LeasedSeat):
    """Acknowledges also when its lease could have run out."""

    def _settle(self, number: int) -> Decisions:
        self._now, now = float("-inf"), self._now
        self._until, until = float("inf"), self._until
        try:
            return super()._settle(number)
        finally:
            self._now, self._until = now, until


class Presumptuous(LeasedSeat):
    """A standby that takes over from a configuration that does not name it."""

    def observed(self, revision: int, configuration: Configuration | None, holder: str, until: float) -> Decisions:
        if self._follows and configuration is not None:
            self._hear(configuration.term)
            self.configuration = configuration
        return super().observed(revision, configuration, holder, until)


class Hasty(LeasedSeat):
    """Goes on alone before that is written."""

    def lost(self, standby: str) -> Decisions:
        decisions = super().lost(standby)
        return (*decisions, *self._won("")) if decisions else ()


class Unconfirmed(LeasedSeat):
    """Acknowledges before the standby has the record."""

    def record(self) -> tuple[int, Decisions]:
        number, decisions = super().record()
        return number, decisions or self._settle(number)


@pytest.mark.parametrize(
    "weaker",
    [
        {"seat": Timeless},
        {"seat": Presumptuous, "paired": False, "terms": 2},
        {"seat": Hasty},
        {"seat": Unconfirmed},
        {"compares": ()},
        {"from_answer": True, "late": True, "terms": 2},
    ],
    ids=lambda weaker: " ".join(str(getattr(each, "__name__", each)) for each in weaker.values()),
)
def test_without_one_of_the_rules_the_exploration_finds_a_violation(weaker: dict[str, Any]) -> None:
    found = explored(**weaker)
    assert found.violation, str(found)
