"""A seat held by a key in etcd: who may write it, and until when it holds."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from torch_ps.common.errors import NameTaken
from torch_ps.common.wire.terms import Configuration, Term
from torch_ps.ps.core.failover.leased import LeasedSeat
from torch_ps.ps.core.failover.seat import (
    Acknowledge,
    Append,
    ConfigChange,
    Decisions,
    Declare,
    Receipt,
    Role,
    Serve,
    StepDown,
    Transact,
)

TTL = 10.0


@dataclass
class Key:
    """What etcd does for a seat. ``expire`` is the end of the holder's lease."""

    revision: int = 0
    configuration: Configuration | None = None
    holder: str = ""

    def expire(self) -> None:
        self.holder = ""

    def look(self, seat: LeasedSeat, now: float) -> Decisions:
        """The seat looks, having renewed its lease now."""
        return seat.at(now).observed(self.revision, self.configuration, self.holder, now + TTL)

    def write(self, seat: LeasedSeat, wanted: Transact) -> bool:
        if (wanted.revision, wanted.holder) != (self.revision, self.holder):
            return False
        self.revision, self.configuration, self.holder = self.revision + 1, wanted.configuration, seat.me
        return True

    def obey(self, seat: LeasedSeat, decisions: Decisions, now: float) -> Decisions:
        """Carry out the transaction, if there is one; what comes of it."""
        for each in decisions:
            if isinstance(each, Transact) and self.write(seat, each):
                return seat.at(now).decided(each, self.revision, now + TTL)
        return ()


def alone(key: Key, name: str = "P", now: float = 0.0) -> LeasedSeat:
    seat = LeasedSeat(name)
    key.obey(seat, key.look(seat, now), now)
    return seat


def attach(key: Key, p: LeasedSeat, now: float = 0.0) -> LeasedSeat:
    """S becomes the standby of ``p``."""
    s = LeasedSeat("S", p.me)
    s.begin_at(p.recorded)
    (change,) = key.obey(p, p.at(now).attach("S"), now)
    assert isinstance(change, ConfigChange)
    assert s.received(p.me, change.number, change) == (Append(change.number), Receipt(change.number))
    p.at(now).receipt("S", change.number)
    return s


def test_nothing_is_acknowledged_before_the_seat_is_its_own() -> None:
    key, p = Key(), LeasedSeat("P")
    assert p.at(0.0).record() == (1, ())
    decisions = key.look(p, 0.0)
    assert decisions == (Transact(0, "", Configuration(Term(1, "P"))),)
    assert key.obey(p, decisions, 0.0) == (Declare(Configuration(Term(1, "P")), True), Acknowledge(1))
    assert p.at(1.0).record() == (2, (Acknowledge(2),))


def test_of_two_that_start_at_once_one_serves_and_the_other_is_told_who() -> None:
    key, p, q = Key(), LeasedSeat("P"), LeasedSeat("Q")
    of_p, of_q = key.look(p, 0.0), key.look(q, 0.0)
    key.obey(p, of_p, 0.0)
    assert key.obey(q, of_q, 0.0) == ()
    with pytest.raises(NameTaken, match="P serves in term 1 of P; start this server with --standby-of"):
        key.look(q, 1.0)
    assert (p.role, q.role) == (Role.ALONE, Role.ASKING)


def test_nothing_is_acknowledged_when_the_lease_could_have_run_out() -> None:
    key = Key()
    p = alone(key)
    assert p.at(9.9).record()[1]
    assert p.at(10.0).record() == (2, ())
    assert key.look(p, 11.0) == (Acknowledge(2),)


def test_a_holder_whose_lease_ran_out_holds_on_if_nobody_came() -> None:
    key = Key()
    p = alone(key)
    key.expire()
    assert p.at(12.0).record() == (1, ())
    key.obey(p, key.look(p, 12.0), 12.0)
    assert key.holder == "P"
    assert key.look(p, 13.0) == (Acknowledge(1),)


def test_a_standby_takes_over_when_the_lease_has_run_out_and_the_primary_finds_out() -> None:
    key = Key()
    p = alone(key)
    s = attach(key, p)
    number, decisions = p.at(1.0).record()
    assert decisions == ()
    s.received("P", number)
    assert key.look(s, 5.0) == ()
    key.expire()
    decisions = key.obey(s, key.look(s, 11.0), 11.0)
    serves = Configuration(Term(3, "S"))
    assert decisions == (
        Serve(serves, "the lease of its primary has run out"),
        Declare(serves, True),
        Acknowledge(number),
    )
    assert p.at(11.0).receipt("S", number) == ()  # by its own clock its lease has run out
    assert key.look(p, 12.0) == (StepDown(serves, "term 3 of S is in force: S alone serves"),)


def test_a_standby_and_a_primary_that_want_to_be_alone_get_it_one_of_them() -> None:
    for first in (0, 1):
        key = Key()
        p = alone(key)
        s = attach(key, p)
        key.expire()
        wants = [(p, key.look(p, 11.0)), (s, key.look(s, 11.0))]
        for seat, decisions in wants[first:] + wants[:first]:
            key.obey(seat, decisions, 11.0)
        assert [seat.role is Role.ALONE for seat in (p, s)] == [False, first == 1]
        key.obey(p, key.look(p, 12.0), 12.0)
        key.obey(s, key.look(s, 12.0), 12.0)
        assert (p.role, s.role) == ((Role.DEPOSED, Role.ALONE) if first else (Role.PAIRED, Role.STANDBY))


def test_a_standby_that_was_not_taken_in_never_takes_over() -> None:
    key = Key()
    p = alone(key)
    s = LeasedSeat("S", "P")
    s.begin_at(p.recorded)
    key.obey(p, p.at(0.0).attach("S"), 0.0)  # the record of it does not arrive
    key.expire()
    assert key.look(s, 11.0) == ()


def test_a_primary_that_loses_its_standby_goes_on_alone_when_that_is_written() -> None:
    key = Key()
    p = alone(key)
    s = attach(key, p)
    number, _ = p.at(1.0).record()
    decisions = p.at(1.0).lost("S")
    assert p.role is Role.ASKING
    assert Acknowledge(number) in key.obey(p, decisions, 1.0)
    key.expire()
    assert key.look(s, 12.0) == (StepDown(Configuration(Term(3, "P")), "term 3 of P is in force: P alone serves"),)


def test_what_became_of_a_transaction_is_seen_at_the_next_look() -> None:
    key = Key()
    p = LeasedSeat("P")
    (wanted,) = key.look(p, 0.0)
    assert isinstance(wanted, Transact)
    key.write(p, wanted)  # and the answer is lost
    key.look(p, 1.0)
    assert p.role is Role.ALONE
    s = LeasedSeat("S", "P")
    s.begin_at(p.recorded)
    _, wanted = p.at(1.0).attach("S")
    assert isinstance(wanted, Transact)
    key.write(p, wanted)
    (change,) = key.look(p, 2.0)
    assert isinstance(change, ConfigChange)
    assert change.configuration == Configuration(Term(2, "P"), "S")


def test_a_server_that_starts_anew_takes_a_seat_that_nobody_holds_or_stands_by_for() -> None:
    key = Key()
    p = alone(key)
    key.expire()
    again = alone(key, "Q", 20.0)
    assert again.role is Role.ALONE
    assert p.at(20.0).record() == (1, ())
    assert isinstance(key.look(p, 21.0)[0], StepDown)
    attach(key, again, 21.0)
    key.expire()
    with pytest.raises(NameTaken, match="S has all that Q has acknowledged and may take over"):
        key.look(LeasedSeat("R"), 40.0)
