"""Who may serve: examples, every interleaving at small size, and what each rule is for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from tests.support.calm import Calm
from tests.support.explore import Found, explore
from tests.support.seats import Newcomer, Worker
from tests.support.shard import Budget, State, World
from torch_ps.common.errors import ProtocolError
from torch_ps.common.wire.terms import Configuration, Term, Vote
from torch_ps.ps.core.failover import seat as succession
from torch_ps.ps.core.failover.elected import ElectedSeat
from torch_ps.ps.core.failover.seat import (
    Acknowledge,
    Append,
    ConfigChange,
    Decisions,
    Declare,
    Introduce,
    Receipt,
    Refuse,
    RequestVotes,
    Role,
    Serve,
    StepDown,
)
from torch_ps.worker.transport.paxos_acceptor import Acceptor

A, B, C = ("a", 1), ("b", 2), ("c", 3)


def paired(*electors: tuple[str, int]) -> tuple[ElectedSeat, ElectedSeat]:
    """A primary P that relies on a standby S."""
    p, s = ElectedSeat("P", patience=10), ElectedSeat("S", "P", patience=10)
    p.set_roster(electors)
    assert p.attach("S") == (Introduce("S"),)
    (change,) = met(p, *electors)
    assert isinstance(change, ConfigChange)
    s.received("P", change.number, change)
    p.receipt("S", change.number)
    return p, s


def met(seat: ElectedSeat, *electors: tuple[str, int]) -> Decisions:
    """All of them say that they know S; what the last one came to."""
    decisions: Decisions = ()
    for elector in electors:
        decisions = seat.met(elector, "S")
    return decisions


def ask(decisions: Decisions) -> RequestVotes:
    (found,) = (each for each in decisions if isinstance(each, RequestVotes))
    return found


def elect(seat: ElectedSeat, asked: RequestVotes, voters: dict[tuple[str, int], Acceptor]) -> Decisions:
    """Everybody answers; what the last answer came to."""
    decisions: Decisions = ()
    for elector, acceptor in voters.items():
        decisions += seat.voted(elector, acceptor.vote(asked.term, asked.base))
    for elector, acceptor in voters.items():
        assert acceptor.accept(seat.configuration)
        decisions += seat.accepted(elector, seat.configuration.term)
    return decisions


# ---------------------------------------------------------------- examples


def test_a_primary_that_is_alone_acknowledges_at_once() -> None:
    p = ElectedSeat("P", patience=10)
    assert p.record() == (1, (Acknowledge(1),))


def test_a_standby_is_relied_on_from_the_moment_that_it_is_attached() -> None:
    p, s = ElectedSeat("P", patience=10), ElectedSeat("S", "P", patience=10)
    p.set_roster([A])
    p.record()
    s.begin_at(1)
    change = ConfigChange(2, Configuration(Term(1, "P"), "S"), frozenset({A}))
    assert p.attach("S") == (Introduce("S"),)
    assert p.met(A, "S") == (change,)
    assert p.record() == (3, ())
    assert s.received("P", 2, change) == (Append(2), Receipt(2))
    assert p.receipt("S", 2) == (Acknowledge(2), Declare(change.configuration, True))
    assert s.received("P", 3) == (Append(3), Receipt(3))
    assert p.receipt("S", 3) == (Acknowledge(3),)


def test_without_workers_a_standby_waits_for_the_first() -> None:
    p = ElectedSeat("P", patience=10)
    assert p.attach("S") == (Introduce("S"),)
    assert p.record() == (1, (Acknowledge(1),))
    assert p.set_roster([A]) == ()
    (change,) = p.met(A, "S")
    assert isinstance(change, ConfigChange)
    assert p.role is Role.PAIRED


def test_a_standby_takes_over_when_a_majority_asks_it_and_the_primary_finds_out() -> None:
    p, s = paired(A, B, C)
    p.record()
    s.received("P", 2)
    assert s.asked(A, 0.0) == ()
    asked = ask(s.asked(B, 0.0))
    voters = {A: Acceptor(), B: Acceptor()}
    decisions = elect(s, asked, voters)
    alone = Configuration(Term(2, "S"))
    assert decisions == (
        Declare(alone, False),
        Serve(alone, "2 of 3 workers have given it the seat"),
        Declare(alone, True),
        Acknowledge(2),
    )
    (refuse,) = s.received("P", 3)
    assert refuse == Refuse(alone, True)
    assert p.refused(alone, serving=True) == (StepDown(alone, "term 2 of S is in force: S alone serves"),)
    with pytest.raises(ProtocolError, match="P is deposed and makes no records"):
        p.record()


def test_asks_lapse() -> None:
    _, s = paired(A, B, C)
    s.asked(A, 0.0)
    s.tick(11.0)
    assert s.asked(B, 11.0) == ()
    assert s.role is Role.STANDBY


def test_a_primary_holds_back_until_a_majority_lets_it_go_on_alone() -> None:
    p, _ = paired(A, B, C)
    asked = ask(p.lost("S"))
    assert p.record() == (2, ())
    decisions = elect(p, asked, {A: Acceptor(), B: Acceptor()})
    assert decisions[-1] == Acknowledge(2)
    assert p.role is Role.ALONE


def test_a_standby_that_answers_again_ends_the_asking() -> None:
    p, _ = paired(A, B, C)
    p.lost("S")
    p.receipt("S", 1)
    assert p.role is Role.PAIRED


def test_who_has_been_voted_out_gets_no_votes_any_more() -> None:
    p, s = paired(A)
    acceptor = Acceptor()
    elect(s, ask(s.asked(A, 0.0)), {A: acceptor})
    asked = ask(p.lost("S"))
    vote = acceptor.vote(Term(7, "P"), asked.base)
    assert not vote.granted
    assert vote.promised == Term(2, "S")


def test_a_configuration_that_the_standby_does_not_have_yet_gives_no_right_to_votes() -> None:
    p, s = paired(A)
    acceptor = Acceptor()
    acceptor.learn(p.configuration)
    asked = ask(s.asked(A, 0.0))
    p.promised(asked.term)
    p.tick(0.0)  # P proposes term 3 for both, and S, which does not hear of it, is elected in term 2
    elect(s, asked, {A: acceptor})
    mine = ask(p.lost("S"))
    assert mine.term > asked.term
    assert mine.base == Term(1, "P")
    assert not acceptor.vote(mine.term, mine.base).granted


def test_split_votes_are_asked_for_again_with_a_higher_term() -> None:
    p, s = paired(A, B)
    a, b = Acceptor(), Acceptor()
    first = ask(p.lost("S"))
    p.voted(A, a.vote(first.term, first.base))
    s.asked(A, 0.0)
    second = ask(s.asked(B, 0.0))
    s.voted(B, b.vote(second.term, second.base))
    p.voted(B, b.vote(first.term, first.base))
    third = ask(p.tick(0.0))
    assert third.term == Term(3, "P")
    elect(p, third, {A: a, B: b})
    assert p.role is Role.ALONE


def test_a_server_takes_a_higher_term_when_a_worker_has_promised_one() -> None:
    p, s = paired(A)
    acceptor = Acceptor()
    acceptor.vote(Term(5, "S"), Term(1, "P"))
    assert not acceptor.may_speak(p.configuration.term)
    p.promised(acceptor.promised)
    (change,) = p.tick(0.0)
    assert isinstance(change, ConfigChange)
    assert not acceptor.may_speak(p.configuration.term)  # not in force until the standby has it
    s.received("P", change.number, change)
    p.receipt("S", change.number)
    assert acceptor.may_speak(p.configuration.term)


def test_a_worker_keeps_to_the_server_that_it_has_promised_a_term() -> None:
    acceptor = Acceptor()
    assert acceptor.learn(Configuration(Term(1, "P"), "S"))
    acceptor.vote(Term(2, "P"), Term(1, "P"))
    assert acceptor.may_speak(Term(1, "P"))
    assert not acceptor.may_speak(Term(1, "Q"))


def test_the_electorate_follows_the_roster_one_by_one_and_never_becomes_empty() -> None:
    p, s = paired(A)
    sizes = []
    p.set_roster([B, C])
    decisions = p.met(B, "S")
    p.met(C, "S")
    while True:
        (change,) = (each for each in decisions if isinstance(each, ConfigChange))
        sizes.append(sorted(name for name, _ in change.electorate))
        s.received("P", change.number, change)
        decisions = p.receipt("S", change.number)
        if not any(isinstance(each, ConfigChange) for each in decisions):
            break
    assert sizes == [["a", "b"], ["a", "b", "c"], ["b", "c"]]
    (last,) = p.set_roster([])
    assert isinstance(last, ConfigChange)
    assert last.electorate == {C}
    s.received("P", last.number, last)
    p.receipt("S", last.number)
    assert p.electorate == s.electorate == {C}


def test_repeats_and_gaps_change_nothing() -> None:
    p, s = paired(A)
    p.record()
    assert s.received("P", 3) == (Receipt(1),)
    s.received("P", 2)
    assert s.received("P", 2) == (Receipt(2),)
    p.receipt("S", 2)
    assert p.receipt("S", 2) == p.receipt("S", 1) == ()
    with pytest.raises(ProtocolError, match="S says that it has record 9; there are 2"):
        p.receipt("S", 9)
    assert p.voted(A, Vote(Term(9, "P"), True, Term(9, "P"), Configuration())) == ()
    assert p.accepted(A, Term(9, "P")) == ()


def test_workers_however_many_depose_a_server_that_relies_on_a_standby_and_none_that_is_alone() -> None:
    other = Configuration(Term(7, "X"))
    lie = Vote(other.term, False, other.term, other)
    alone = ElectedSeat("P", patience=10)
    alone.set_roster([A, B, C])
    assert [alone.voted(each, lie) for each in (A, B, C)] == [(), (), ()]
    alone.attach("S")
    assert alone.voted(A, lie) == ()
    assert alone.record() == (1, (Acknowledge(1),))
    p, _ = paired(A, B, C)
    assert p.voted(A, lie) == p.voted(A, lie) == ()
    assert p.voted(B, lie) == (StepDown(other, "term 7 of X is in force: X alone serves"),)


# ---------------------------------------------------------------- every interleaving


def explored(world: World, max_states: int = 200_000) -> Found:
    return explore(world.start, world.nexts, check=world.check, max_states=max_states)


#: Workers, what happens beside messages that are lost, late, repeated or out of order, and where it begins.
WORLDS = {
    "the standby is attached; a record": (2, Budget(records=1), False),
    "another standby comes": (2, Budget(records=1, standbys=1), True),
    "another standby comes while the first is being attached": (1, Budget(records=1, standbys=1), False),
    "a worker is started again; the roster changes": (1, Budget(rosters=1, restarts=1), True),
    "three workers": (3, Budget(records=1), True),
}


@pytest.mark.parametrize("name", [*list(WORLDS)[:-1], pytest.param("three workers", marks=pytest.mark.tier("check"))])
def test_no_interleaving_loses_or_contradicts_what_was_acknowledged(name: str) -> None:
    workers, budget, begun = WORLDS[name]
    found = explored(World(workers, budget, paired=begun))
    assert found.complete, str(found)


@pytest.mark.parametrize(
    ("workers", "every", "budget", "begun"),
    [
        (1, 2, Budget(), False),
        (2, 40, Budget(), False),
        (3, 120, Budget(), True),
        (1, 200, Budget(rosters=1, restarts=1), True),
    ],
)
def test_from_any_state_the_job_goes_on_when_a_majority_and_a_server_with_all_records_live(
    workers: int, every: int, budget: Budget, begun: bool
) -> None:
    world = Calm(workers, budget, paired=begun, worker=Newcomer)
    tried, stuck = stalls(world, every)
    assert stuck is None
    assert tried > 100


def test_an_elector_that_does_not_know_the_standby_holds_the_job_up() -> None:
    world = Calm(1, Budget(rosters=1, restarts=1), paired=True, worker=Newcomer, seat=Counts)
    assert stalls(world, 40)[1] is not None


class Counts(ElectedSeat):
    """Counts every member as an elector, whether or not it knows where the standby is."""

    def set_roster(self, electors: Iterable[succession.Elector]) -> Decisions:
        self._target = self._met = frozenset(electors)
        return self._advance()


def stalls(world: Calm, every: int) -> tuple[int, Any]:
    """How many states were tried, and one from which the job does not go on though it should; None if there is none."""
    seen: list[tuple[State, int]] = []

    def nexts(state: State, net: int) -> Any:
        seen.append((state, net))
        return world.nexts(state, net)

    assert explore(world.start, nexts, check=world.check, max_states=400_000).complete
    tried = 0
    for state, net in seen[::every]:
        for servers in ((), (0,), (1,)):
            for people in ((), (0,)):
                left = world.crashed(state, servers=servers, workers=people)
                if world.able(left):
                    tried += 1
                    if not world.goes_on(left, net):
                        return tried, (servers, people, left)
    return tried, None


# ---------------------------------------------------------------- what each rule is for


class Forgets(Acceptor):
    """Votes again and again, whatever it has promised."""

    def vote(self, term: Term, base: Term) -> Vote:
        return Vote(term, base >= self.accepted.term, term, self.served)

    def accept(self, configuration: Configuration) -> bool:
        self.accepted = configuration
        return True


class VotesForTheOlder(Acceptor):
    """Votes for a server that has missed something."""

    def vote(self, term: Term, base: Term) -> Vote:
        return super().vote(term, max(base, self.accepted.term))


class Few(ElectedSeat):
    """Needs half of the workers, not more than half."""

    def _majority(self, electors: frozenset[succession.Elector]) -> bool:
        return 2 * len(electors & self.electorate) >= len(self.electorate)


class Hasty(ElectedSeat):
    """Acknowledges before the standby has the record."""

    def record(self) -> tuple[int, Decisions]:
        number, _ = super().record()
        return number, self._settle(number)


class OneRound(ElectedSeat):
    """Serves as soon as it has the votes."""

    def voted(self, elector: succession.Elector, vote: Vote) -> Decisions:
        decisions = super().voted(elector, vote)
        return decisions + self._won("") if self.role is Role.CONFIRMING else decisions


class TakesOn(ElectedSeat):
    """A standby that takes records when it serves already."""

    def received(self, primary: str, number: int, change: ConfigChange | None = None) -> Decisions:
        if self.role is Role.ALONE and primary == "P" and number > self.recorded:
            return (Receipt(number),)
        return super().received(primary, number, change)


class Same(Worker):
    """Keeps its session when it is started again, though it has forgotten its promises."""

    def step(self, event: tuple[Any, ...]) -> tuple[Any, ...]:
        out = super().step(event)
        self.session = 1
        return out


@pytest.mark.parametrize(
    ("mutant", "workers", "budget", "begun"),
    [
        ({"acceptor": Forgets}, 1, Budget(records=1), True),
        ({"acceptor": VotesForTheOlder}, 1, Budget(records=1), True),
        ({"seat": Few}, 2, Budget(records=1), True),
        ({"seat": Hasty}, 1, Budget(records=1), True),
        ({"seat": OneRound}, 1, Budget(records=1), True),
        ({"seat": TakesOn}, 1, Budget(records=1), True),
        ({"worker": Same}, 1, Budget(records=1, restarts=1), True),
    ],
    ids=lambda value: next(iter(value.values())).__name__ if isinstance(value, dict) else "",
)
def test_without_one_of_the_rules_the_exploration_finds_a_violation(
    mutant: dict[str, Any], workers: int, budget: Budget, begun: bool
) -> None:
    found = explored(World(workers, budget, paired=begun, **mutant))
    assert found.violation, str(found)


def test_an_electorate_that_changes_by_several_at_once_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(succession, "_one_step", lambda electorate, target: target or electorate)
    found = explored(World(1, Budget(rosters=1, restarts=1), paired=True))
    assert found.violation, str(found)
