"""Every change of state that the machines can make is a row of its table, and every row is a change that they make."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import Any, ClassVar, TypeVar

import pytest

from tests.core.job import member, push, roster, trace
from tests.support.explore import copied, explore
from tests.support.shard import Budget, World
from tests.support.tenants import Tenants
from torch_ps.common.errors import NameTaken, PsError
from torch_ps.common.wire.terms import Configuration, Term, Vote
from torch_ps.ps.core import state_tables
from torch_ps.ps.core.consistent_cut import CutPlanner
from torch_ps.ps.core.dataset_progress import DatasetProgress, DatasetSpec
from torch_ps.ps.core.effects import Apply, Discard, Effects, Evict, Release, Wait
from torch_ps.ps.core.failover.elected import ElectedSeat
from torch_ps.ps.core.failover.leased import LeasedSeat
from torch_ps.ps.core.failover.seat import Role, Seat
from torch_ps.ps.core.incarnation import Incarnation
from torch_ps.ps.core.mean_norms import NormAnswer, NormQuestion
from torch_ps.ps.core.membership import Membership
from torch_ps.ps.core.modes import Mode
from torch_ps.ps.core.sample_assigner import SampleAssigner, SampleRequest
from torch_ps.ps.core.shard import Shard
from torch_ps.ps.core.state_tables import StateTable

Row = tuple[str, str, str]
S = TypeVar("S", bound=Seat)
#: Named calls of a machine; a call that is refused changes nothing.
Calls = Iterable[tuple[str, Callable[[Any], object]]]


def changes(start: Any, calls: Calls, state: Callable[[Any], str], depth: int) -> set[Row]:
    """Every change of state within ``depth`` calls, in any order."""
    calls, found, seen, here = list(calls), set[Row](), set[str](), [start]
    for _ in range(depth):
        after = []
        for machine in here:
            for name, call in calls:
                then = copy.deepcopy(machine)
                try:
                    call(then)
                except PsError:
                    continue
                if state(then) != state(machine):
                    found.add((state(machine), name, state(then)))
                key = repr(trace(then))
                if key not in seen:
                    seen.add(key)
                    after.append(then)
        here = after
    return found


# ---------------------------------------------------------------- membership


def members() -> set[Row]:
    def state(lead: Membership) -> str:
        if lead.roster.member("a") is None:
            return "away"
        return "expected" if "a" in lead._expected else "member"

    def restore(lead: Membership) -> None:
        kept = lead.export() if lead.roster.members else {"epoch": 1, "members": [["a", 1, 0, 0]]}
        lead.__init__(quorum=1, lease=10.0)  # type: ignore[misc]
        lead.restore(kept)

    def session(lead: Membership) -> int:
        found = lead.roster.member("a")
        return found.session if found is not None else 0

    def late(lead: Membership) -> None:
        lead.tick(0.0, 0)
        lead.tick(11.0, 0)

    # A job that is restored is another machine, so a member that becomes expected by it is not a change of one.
    calls: list[tuple[str, Callable[[Any], object]]] = [
        ("join", lambda lead: lead.join("a", 0, 0.0, 0)),
        ("join of another with its rank", lambda lead: lead.join("b", 0, 0.0, 0)),
        ("leave", lambda lead: lead.leave("a", session(lead), 0.0, 0)),
        ("renew", lambda lead: lead.renew("a", session(lead), 0.0)),
        ("tick", late),
    ]
    fresh, restored = Membership(quorum=1, lease=10.0), Membership(quorum=1, lease=10.0)
    restore(restored)
    restores = {(state(fresh), "restore", state(restored))}
    return restores | changes(fresh, calls, state, 4) | changes(restored, calls, state, 4)


# ---------------------------------------------------------------- pushes


class Followed:
    """A shard, and what has become of one push of worker a, as a shell sees it from the effects alone."""

    def __init__(self, mode: Mode, epoch: int, first_step: int) -> None:
        self.core, self.step, self.epoch = Shard(buckets=1, mode=mode), int(mode.name == "ssp"), epoch
        self.state, self.held, self.applied, self.next_of_b = "sent", False, False, 0
        self.a, self.b = member("a", first_step=first_step), member("b", 2)
        self.core.set_roster(roster(2, self.a, self.b))
        for earlier in range(self.step):
            self.core.push(push("a", earlier, epoch=2))

    def push(self) -> None:
        effects = self.core.push(push("a", self.step, epoch=self.epoch))
        self.held = True
        self.obey(effects)

    def push_of_another(self) -> None:
        self.obey(self.core.push(push("b", self.next_of_b, session=2, epoch=2, base=self.core.versions[0])))
        self.next_of_b += 1

    def set_roster(self, *members: Any) -> None:
        """The next roster. A session that has left does not come back."""
        there = set(self.core.roster.members)
        self.obey(self.core.set_roster(roster(self.core.roster.epoch + 1, *(m for m in members if m in there))))

    def disconnected(self) -> None:
        self.obey(self.core.disconnected("a", 1))
        self.state = "sent" if self.state == "parked" else self.state

    def obey(self, effects: Effects) -> None:
        for effect in effects:
            match effect:
                case Apply() if any((c.worker, c.step) == ("a", self.step) for c in effect.contributions):
                    self.state, self.held, self.applied = "applied", False, True
                case Discard(worker="a"):
                    self.held = False
                case Wait(worker="a") if effect.step == self.step:
                    counted = "counted" if self.held else "applied" if self.applied else "dropped"
                    self.state = "parked" if ("a", 1, 0, True) in self.core._parked else counted
                case Release(worker="a") if effect.step == self.step:
                    self.state = "answered"
                case Evict(worker="a") if self.state not in ("sent", "answered"):
                    self.state = "evicted"


def pushes() -> set[Row]:
    calls: list[tuple[str, Callable[[Any], object]]] = [
        ("push", Followed.push),
        ("push of another", Followed.push_of_another),
        ("set_roster", lambda job: job.set_roster(job.a, job.b)),
        ("set_roster", lambda job: job.set_roster(job.a)),
        ("set_roster", lambda job: job.set_roster(job.b)),
        ("disconnected", Followed.disconnected),
    ]
    modes = Mode(), Mode(backup_workers=1), Mode(name="async"), Mode(name="ssp", slack=1)
    starts = [Followed(mode, epoch, first) for mode in modes for epoch in (2, 3) for first in (0, 2)]
    return {row for start in starts for row in changes(start, calls, lambda job: job.state, 5)}


# ---------------------------------------------------------------- questions for a norm


class Questions:
    """A shard, and what has become of one question of worker a, as a shell sees it from the answers alone."""

    def __init__(self, mode: Mode) -> None:
        self.core, self.state = Shard(buckets=1, mode=mode), "unasked"
        self.a, self.b = member("a"), member("b", 2)
        self.core.set_roster(roster(2, self.a, self.b))

    def ask(self, worker: str, session: int) -> None:
        if worker == "a":
            self.state = "waiting" if self.state == "unasked" else self.state
        self.hear(self.core.ask_norm(NormQuestion(worker, session, 0, 0, 2.0, 1.0, 2)))

    def push_of_another(self) -> None:
        self.core.push(push("b", 0, session=2, epoch=2))
        self.hear(self.core.norms_due())

    def set_roster(self, *members: Any) -> None:
        self.core.set_roster(roster(self.core.roster.epoch + 1, *members))
        if self.a not in members and self.state == "waiting":
            self.state = "unasked"
        self.hear(self.core.norms_due())

    def disconnected(self) -> None:
        self.core.disconnected("a", 1)
        self.state = "unasked" if self.state == "waiting" else self.state

    def hear(self, answers: tuple[NormAnswer, ...]) -> None:
        for answer in answers:
            if answer.worker == "a":
                self.state = "answered" if len(answer.asked) > 1 else "answered alone"


def questions() -> set[Row]:
    calls: list[tuple[str, Callable[[Any], object]]] = [
        ("ask", lambda job: job.ask("a", 1)),
        ("ask of another", lambda job: job.ask("b", 2)),
        ("push of another", Questions.push_of_another),
        ("set_roster", lambda job: job.set_roster(job.a)),
        ("set_roster", lambda job: job.set_roster(job.b)),
        ("disconnected", Questions.disconnected),
    ]
    return changes(Questions(Mode()), calls, lambda job: job.state, 4)


# ---------------------------------------------------------------- positions


class Positions:
    """A lead and what has become of position 0 of a data set of two samples, with readers a and b."""

    def __init__(self, mode: Mode) -> None:
        self.assigner, self.roster = SampleAssigner(mode), roster(2, member("a"), member("b", 2))
        self.steps = {"a": 0, "b": 0}

    def ask(self, worker: str, received: int = 1 << 30) -> None:
        self.assigner.ask(SampleRequest(worker, self.sessions[worker], SPEC, 1, 1, received), self.roster, 0)

    sessions: ClassVar = {"a": 1, "b": 2}

    def settle(self, *, applied: bool) -> None:
        for (worker, session), reader in list(self.live.readers.items()) if self.live is not None else []:
            if reader.fetched > reader.settled:
                self.assigner.claim(worker, session, self.steps[worker], ((0, reader.settled + 1),))
                self.assigner.settle(worker, session, self.steps[worker], applied=applied)
                self.steps[worker] += 1

    @property
    def live(self) -> DatasetProgress | None:
        return self.assigner._register.live.get(0)

    @property
    def state(self) -> str:
        dataset = self.live
        if dataset is None:
            return "done" if self.assigner._register.epochs_over(SPEC) else "free"
        if _first_of(dataset.free):
            return "free"
        if any(_first_of(reader.dealt) for reader in dataset.readers.values()):
            return "dealt"
        return "given" if any(_first_of(reader.given) for reader in dataset.readers.values()) else "done"


SPEC = DatasetSpec("", 2, 0, False)


def _first_of(ranges: list[tuple[int, int]]) -> bool:
    return any(start == 0 for start, _ in ranges)


def positions() -> set[Row]:
    calls: list[tuple[str, Callable[[Any], object]]] = [
        ("ask", lambda lead: lead.ask("a")),
        ("ask", lambda lead: lead.ask("b")),
        ("ask", lambda lead: lead.ask("a", 0)),  # nothing of what was given has arrived
        ("leave", lambda lead: lead.assigner.keep({("b", 2)})),
        ("give_back", lambda lead: lead.assigner.give_back("a", 1, SPEC, 0)),
        ("push applied", lambda lead: lead.settle(applied=True)),
        ("push dropped", lambda lead: lead.settle(applied=False)),
    ]
    starts = Positions(Mode()), Positions(Mode(name="async"))
    return {row for start in starts for row in changes(start, calls, lambda lead: lead.state, 5)}


# ---------------------------------------------------------------- cuts, places


def cuts() -> set[Row]:
    def state(planner: CutPlanner[int]) -> str:
        return "none" if not planner._version else "partial" if planner._reports else "planned"

    calls: list[tuple[str, Callable[[Any], object]]] = [
        ("due", lambda planner: planner.due(0.0, 0, 1, stale=False)),
        ("due", lambda planner: planner.due(901.0, 0, 1, stale=False)),
        ("last", lambda planner: planner.last(1, 5)),
    ]
    for version in (2, 5):
        calls.append(("failed", partial(CutPlanner.failed, shard=0, version=version, now=0.0)))
        for shard in (0, 1):
            report = partial(CutPlanner.reported, shard=shard, version=version, report=shard, now=0.0)
            calls.append(("reported", report))
    starts = [CutPlanner[int](every=every, seconds=60 - 30 * every, num_shards=2, now=0.0) for every in (0, 2)]
    return {row for start in starts for row in changes(start, calls, state, 4)}


def places(start: Incarnation | None = None) -> set[Row]:
    def state(lead: Incarnation) -> str:
        words = ("empty for good", "taken for good") if lead._closed else ("free", "taken")
        return words[1 in lead.digests]

    calls: list[tuple[str, Callable[[Any], object]]] = [
        ("enter", lambda lead: lead.enter(1, 2, "a7", "here", 0.0)),
        ("enter", lambda lead: lead.enter(1, 2, "a8", "here", 0.0)),
        ("close", Incarnation.close),
    ]
    return changes(start or Incarnation(5, 0, 2, lease=1.0), calls, state, 4)


# ---------------------------------------------------------------- seats


def observed(seat: type[S], found: set[Row], names: tuple[str, ...]) -> type[S]:
    """The same seat, which notes every change of its role by a call from outside."""

    def watched(name: str) -> Callable[..., Any]:
        def call(self: Any, *args: Any, **settings: Any) -> Any:
            depth, before = Depth.now, self.role
            Depth.now += 1
            try:
                return getattr(seat, name)(self, *args, **settings)
            finally:
                Depth.now -= 1
                if not depth and self.role is not before:
                    found.add((before.value, name, self.role.value))

        return call

    return type(seat.__name__, (seat,), {name: watched(name) for name in names})


class Depth:
    """Calls of a seat that are under way: what one makes of itself is no call from outside."""

    now = 0


#: Calls that a shell makes of any seat.
_CALLS = (
    *("record", "attach", "met", "receipt", "lost", "set_roster"),
    *("received", "refused", "tick", "asked", "voted", "accepted"),
)


def elected_seats() -> set[Row]:
    found = set[Row]()
    seat = observed(ElectedSeat, found, _CALLS)
    for workers, budget, paired in ((2, Budget(records=0, terms=3), True), (1, Budget(standbys=1, terms=3), False)):
        world = World(workers, budget, paired=paired, seat=seat)
        explore(world.start, world.nexts, check=world.check, max_states=20_000)
        for server in [world.servers[number] for number in range(len(world.servers))]:
            copied(server).seat.voted(("w0", 1), Vote(OTHER.term, False, OTHER.term, OTHER))
            copied(server).seat.refused(OTHER, serving=True)
    return found


def leased_seats() -> set[Row]:
    found = set[Row]()
    seat = observed(LeasedSeat, found, (*_CALLS, "observed", "decided"))
    for standbys, paired in ((0, False), (1, True)):
        world = Tenants(seat=seat, records=0, standbys=standbys, paired=paired)
        explore(world.start, world.nexts, check=world.check, max_states=20_000)
        for server in [world.servers[number] for number in range(len(world.servers))]:
            copied(server).seat.refused(OTHER, serving=True)
            with suppress(NameTaken):
                copied(server).seat.observed(9, OTHER, "X", 0.0)
    return found


#: In force at another server: any server may hear of it, by a worker or in etcd.
OTHER = Configuration(Term(99, "X"))

TABLES = {
    members: state_tables.MEMBER,
    pushes: state_tables.PUSH,
    questions: state_tables.QUESTION,
    positions: state_tables.POSITION,
    cuts: state_tables.CUT,
    places: state_tables.PLACE,
    elected_seats: state_tables.ELECTED_SEAT,
    leased_seats: state_tables.LEASED_SEAT,
}


@pytest.mark.parametrize("machine", TABLES, ids=lambda machine: machine.__name__)
def test_table_has_the_changes_that_the_machine_makes_and_no_other(machine: Callable[[], set[Row]]) -> None:
    table, made = TABLES[machine], machine()
    assert {"missing": made - table.rows, "never made": table.rows - made} == {"missing": set(), "never made": set()}


def test_every_table_is_tested() -> None:
    assert list(TABLES.values()) == list(state_tables.TABLES)


@pytest.mark.parametrize("table", state_tables.TABLES, ids=lambda table: table.title)
def test_table_names_states_that_it_explains_and_every_one_is_reached(table: StateTable) -> None:
    named = {state for before, _, after in table.rows for state in (before, after)}
    assert named == set(table.states)


def test_planted_change_of_a_machine_is_seen() -> None:
    class Reopens(Incarnation):
        """A place that is closed opens again."""

        def enter(self, shard: int, num_shards: int, digest: str, host: str, now: float) -> None:
            super().enter(shard, num_shards, digest, host, now)
            self._closed = False

    assert places(Reopens(5, 0, 2, lease=1.0)) - state_tables.PLACE.rows == {("taken for good", "enter", "taken")}


def test_tables_name_all_roles() -> None:
    assert set(state_tables.ELECTED_SEAT.states) | set(state_tables.LEASED_SEAT.states) == {r.value for r in Role}
