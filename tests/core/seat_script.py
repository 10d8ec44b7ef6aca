"""Commands of data-driven cases about a seat: servers, the workers that vote, and the key in etcd.

server P | server S follows=P          a server; ``by=etcd`` gives it a leased seat
roster P a b c                         the workers that may vote
meet P S a b c                         these workers tell P that they know where S is
attach P S | lost P S | record P       calls of a primary
deliver P S | receipt P S 2            the next record of P comes to S; S says that it has records up to a number
asks S a | vote S a | accept S a       a worker asks S to take over, answers its RequestVotes, accepts what it declared
refuse P S                             P hears of the configuration of S
tick P | now 5                         time
look P | write P | expire              a seat in etcd: looks at the key, its last Transact is done, the lease runs out
state P                                role, configuration and what may be acknowledged
"""

from __future__ import annotations

from tests.core.datadriven import Call
from torch_ps.common.errors import PsError
from torch_ps.common.wire.terms import Configuration, Term
from torch_ps.ps.core.failover.elected import ElectedSeat
from torch_ps.ps.core.failover.leased import LeasedSeat
from torch_ps.ps.core.failover.seat import (
    Acknowledge,
    Append,
    ConfigChange,
    Decision,
    Decisions,
    Declare,
    Elector,
    Introduce,
    Receipt,
    Refuse,
    RequestVotes,
    Seat,
    Serve,
    StepDown,
    Transact,
)
from torch_ps.worker.transport.paxos_acceptor import Acceptor

LEASE = 10.0


class SeatScript:
    """A few servers of one shard; workers a, b, c, ... have session 1."""

    def __init__(self) -> None:
        self.now = 0.0
        self.seats: dict[str, Seat] = {}
        self.sent: dict[str, list[ConfigChange | int]] = {}  # records of each server, in order
        self.delivered: dict[tuple[str, str], int] = {}
        self.acceptors: dict[str, Acceptor] = {}
        self.asked: dict[str, RequestVotes] = {}
        self.declared: dict[str, Declare] = {}
        self.wanted: dict[str, Transact] = {}
        self.key: tuple[int, Configuration | None, str] = (0, None, "")  # revision, configuration, holder

    def __call__(self, call: Call) -> str:
        try:
            said = getattr(self, f"do_{call.command}")(call)
        except PsError as error:
            return f"{type(error).__name__}: {error}"
        return said or "ok"

    def do_server(self, call: Call) -> str:
        name, follows = call.words[0], call.settings.get("follows", "")
        leased = call.settings.get("by") == "etcd"
        seat: Seat = LeasedSeat(name, follows) if leased else ElectedSeat(name, follows, patience=10)
        self.seats[name], self.sent[name] = seat, []
        if follows:
            seat.begin_at(self.seats[follows].recorded)
            self.delivered[follows, name] = len(self.sent[follows])
        return seat.role.value

    def do_now(self, call: Call) -> str:
        self.now = float(call.words[0])
        return ""

    def do_roster(self, call: Call) -> str:
        name, *workers = call.words
        return self._tell(name, self._seat(name).set_roster([_elector(w) for w in workers]))

    def do_attach(self, call: Call) -> str:
        name, standby = call.words
        return self._tell(name, self._seat(name).attach(standby))

    def do_meet(self, call: Call) -> str:
        name, standby, *workers = call.words
        decisions = [each for worker in workers for each in self._seat(name).met(_elector(worker), standby)]
        return self._tell(name, tuple(decisions))

    def do_lost(self, call: Call) -> str:
        name, standby = call.words
        return self._tell(name, self._seat(name).lost(standby))

    def do_record(self, call: Call) -> str:
        name = call.words[0]
        number, decisions = self._seat(name).record()
        self.sent[name].append(number)
        return "\n".join(filter(None, [f"record {number}", self._tell(name, decisions)]))

    def do_deliver(self, call: Call) -> str:
        sender, name = call.words
        number = self.delivered.get((sender, name), 0)
        record = self.sent[sender][number]
        self.delivered[sender, name] = number + 1
        change = record if isinstance(record, ConfigChange) else None
        number = change.number if change is not None else int(str(record))
        return self._tell(name, self._seat(name).received(sender, number, change))

    def do_receipt(self, call: Call) -> str:
        name, standby, number = call.words
        return self._tell(name, self._seat(name).receipt(standby, int(number)))

    def do_asks(self, call: Call) -> str:
        name, worker = call.words
        return self._tell(name, self._seat(name).asked(_elector(worker), self.now))

    def do_vote(self, call: Call) -> str:
        name, worker = call.words
        asked = self.asked[name]
        vote = self.acceptors.setdefault(worker, Acceptor()).vote(asked.term, asked.base)
        lines = [f"{worker} {'grants' if vote.granted else 'refuses'} {vote.term}; it has promised {vote.promised}"]
        said = self._tell(name, self._seat(name).voted(_elector(worker), vote))
        return "\n".join(filter(None, [*lines, said]))

    def do_accept(self, call: Call) -> str:
        name, worker = call.words
        configuration = self.declared[name].configuration
        assert self.acceptors.setdefault(worker, Acceptor()).accept(configuration)
        return self._tell(name, self._seat(name).accepted(_elector(worker), configuration.term))

    def do_refuse(self, call: Call) -> str:
        name, other = call.words
        return self._tell(name, self._seat(name).refused(self._seat(other).configuration, serving=True))

    def do_tick(self, call: Call) -> str:
        return self._tell(call.words[0], self._seat(call.words[0]).tick(self.now))

    def do_look(self, call: Call) -> str:
        name = call.words[0]
        seat = self._seat(name)
        assert isinstance(seat, LeasedSeat)
        return self._tell(name, seat.observed(*self.key, self.now + LEASE))

    def do_write(self, call: Call) -> str:
        name = call.words[0]
        seat, wanted = self._seat(name), self.wanted[name]
        assert isinstance(seat, LeasedSeat)
        revision, _, holder = self.key
        if (wanted.revision, wanted.holder) != (revision, holder):
            return f"not done: the key is at revision {revision}, held by {holder or 'nobody'}"
        self.key = revision + 1, wanted.configuration, name
        return self._tell(name, seat.decided(wanted, revision + 1, self.now + LEASE))

    def do_expire(self, call: Call) -> str:
        self.key = *self.key[:2], ""
        return ""

    def do_state(self, call: Call) -> str:
        seat = self._seat(call.words[0])
        where = f"{seat.configuration.term}: {seat.configuration}"
        return f"{seat.role.value}, {where}; record {seat.recorded}, safe {seat.safe}"

    def _seat(self, name: str) -> Seat:
        return self.seats[name].at(self.now)

    def _tell(self, name: str, decisions: Decisions) -> str:
        for each in decisions:
            match each:
                case ConfigChange():
                    self.sent[name].append(each)
                case RequestVotes():
                    self.asked[name] = each
                case Declare():
                    self.declared[name] = each
                case Transact():
                    self.wanted[name] = each
        return "\n".join(map(line, decisions))


def line(decision: Decision) -> str:
    """One decision, in one line."""
    match decision:
        case Acknowledge() | Append() | Receipt():
            return f"{type(decision).__name__} {decision.number}"
        case ConfigChange():
            electors = " ".join(sorted(name for name, _ in decision.electorate)) or "nobody"
            configuration = _configuration(decision.configuration)
            return f"ConfigChange as record {decision.number}: {configuration}; electors {electors}"
        case Introduce():
            return f"Introduce {decision.standby}"
        case RequestVotes():
            return f"RequestVotes for {decision.term}, from {_term(decision.base)}"
        case Declare() | Refuse():
            force = "in force" if decision.serving else "not in force yet"
            return f"{type(decision).__name__} {_configuration(decision.configuration)}, {force}"
        case Serve() | StepDown():
            return f"{type(decision).__name__} {_configuration(decision.configuration)}: {decision.reason}"
        case Transact():
            held = f"revision {decision.revision} held by {decision.holder or 'nobody'}"
            return f"Transact {_configuration(decision.configuration)}, in place of {held}"


def _configuration(configuration: Configuration) -> str:
    return f"{_term(configuration.term)}, {configuration}"


def _term(term: Term) -> str:
    return f"term {term.number}" if term.server else "no term"


def _elector(worker: str) -> Elector:
    return worker, 1
