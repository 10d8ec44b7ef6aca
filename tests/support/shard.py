"""All that can happen to a shard's servers and workers, for ``explore``.

    state = (servers, workers, what was acknowledged, newest term of a server alone, what may yet happen), messages sent

Rules of this file
  1. Votes, and what else a server collects until it has enough of it, arrive together when they are enough: those
     before the last one change nothing that can be seen, so their order is of no account.
  2. An update counts as acknowledged when its server may answer, whether or not the answer arrives.
  3. Nobody has to crash for good here: whoever never does anything again is as dead.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import combinations
from typing import Any, NamedTuple

from tests.support.explore import Machines, Numbered, bits
from tests.support.seats import PATIENCE, Server, Worker
from torch_ps.common.wire.terms import Term
from torch_ps.ps.core.failover.elected import ElectedSeat
from torch_ps.ps.core.failover.seat import Role
from torch_ps.worker.transport.paxos_acceptor import Acceptor

#: When every ask of time 0 has lapsed.
LATE = 100.0


class Budget(NamedTuple):
    """Events that may still happen; ``terms`` is the highest number of a term that is explored."""

    records: int = 0
    restarts: int = 0
    rosters: int = 0
    standbys: int = 0
    terms: int = 2


class State(NamedTuple):
    """All that there is but the network, in numbers of the world's tables."""

    servers: tuple[int, ...]
    workers: tuple[int, ...]
    acked: int
    alone: Term  # newest configuration of a server alone that came into force
    budget: Budget


#: What happened, the state after it, the messages ever sent, what is wrong or "".
Next = tuple[Any, State, int, str]


class Out(NamedTuple):
    """What came out of a machine: messages as bits, the last record that may be acknowledged, a term in force."""

    sent: int
    acknowledged: int
    alone: Term


NAMES = ("P", "S", "T")
KNOWN = frozenset(NAMES)
SILENT = Out(0, 0, Term())


class World:
    """A primary and a standby that is being attached, with ``workers`` workers.

    Args:
        paired: the standby is in force, and everybody has heard of it; else it is about to be.
        seat, acceptor, worker: the real classes, or mutants of them.
    """

    def __init__(
        self,
        workers: int,
        budget: Budget,
        *,
        paired: bool = False,
        seat: type[ElectedSeat] = ElectedSeat,
        acceptor: type[Acceptor] = Acceptor,
        worker: type[Worker] = Worker,
    ) -> None:
        self._seat, self._terms = seat, budget.terms
        self.servers = Machines[Server, Out](self._step)
        self.workers = Machines[Worker, Out](lambda worker, event: self._out(worker.step(event)))
        self.events = Numbered[Any]()  # messages are (to, event)
        self.logs = Numbered[tuple[Any, ...]]()
        self._introductions, self._looked = 0, 0  # which events are introductions, as bits, and how many were looked at
        people = [worker(f"w{i}", acceptor()) for i in range(workers)]
        p, s = Server(seat("P", patience=PATIENCE)), Server(seat("S", "P", patience=PATIENCE))
        p.step(("roster", frozenset(each.elector for each in people)))
        s.log, p.feeds = p.log, ("S",)
        s.seat.begin_at(p.seat.recorded)
        servers = self.servers.number(p), self.servers.number(s)
        numbers = tuple(self.workers.number(each) for each in people)
        state = State(servers, numbers, self.logs.number(p.log), Term(), budget)
        _, after, net, _ = self.server(state, 0, 0, ("attach", "S"))
        if paired:
            for each in people:
                _, after, net, _ = self.server(after, net, 0, ("met", each.elector, "S"))
            _, after, net, _ = self.server(after, net, 1, ("received", "P", 2, self.servers[after.servers[0]].log[-1]))
            _, after, net, _ = self.server(after, net, 0, ("receipt", "S", 2))
            configuration = self.servers[after.servers[0]].seat.configuration
            for i in range(workers):
                _, after, _, _ = self.worker(after, net, i, ("declare", "P", configuration, True))
            net = self._introduced(after, net) & self._introductions  # streams that are opened later begin with them
        self.start = after, net

    def _step(self, server: Server, event: Any) -> Out:
        out = self._out(server.step(event))
        server.tidied()
        return out

    def _out(self, out: tuple[Any, ...]) -> Out:
        sent, acknowledged, alone = SILENT
        for kind, *about in out:
            match kind:
                case "send":
                    sent |= 1 << self.events.number(tuple(about))
                case "ack":
                    acknowledged = about[0]
                case "alone":
                    alone = about[0]
        out_ = Out(sent, acknowledged, alone)
        return SILENT if out_ == SILENT else out_

    # -------------------------------------------------------------- what may happen

    def nexts(self, state: State, net: int) -> Iterator[Next]:
        """Everything that may happen next and changes something."""
        for event, after, sent, wrong in self._all_nexts(state, net):
            sent = self._introduced(after, sent)
            if after != state or sent != net:
                yield event, after, sent, wrong

    def _introduced(self, state: State, net: int) -> int:
        """The messages with the answers of all workers to introductions that have been sent.

        Where an answer changes nothing but the messages, the state with it represents the state without it.
        """
        for number in range(self._looked, len(self.events.values)):
            self._introductions |= (self.events.values[number][1][0] == "introduce") << number
        self._looked = len(self.events.values)
        for number in bits(net & self._introductions):
            for i, each in enumerate(state.workers):
                if self.workers[each].knows == KNOWN:
                    net = self.worker(state, net, i, self.events.values[number][1], number)[2]
        return net

    def _all_nexts(self, state: State, net: int) -> Iterator[Next]:
        yield from self.deliveries(state, net)
        for i, number in enumerate(state.servers):
            if self.servers[number].up:
                yield from self._of_server(state, net, i, self.servers[number])
        budget = state.budget
        for i, number in enumerate(state.workers):
            worker = self.workers[number]
            if budget.restarts:
                less = state._replace(budget=budget._replace(restarts=budget.restarts - 1))
                yield self.worker(less, net, i, ("restart",))
            for j, other in enumerate(state.servers):
                server = self.servers[other]
                if (
                    server.up
                    and not server.seat.follows
                    and not worker.acceptor.may_speak(server.seat.configuration.term)
                ):
                    yield self.server(state, net, j, ("promised", worker.acceptor.promised))

    def _of_server(self, state: State, net: int, i: int, server: Server) -> Iterator[Next]:
        seat, budget = server.seat, state.budget
        yield self.server(state, net, i, ("tick", 0.0))
        if seat.role is Role.STANDBY:
            people = map(self.workers.__getitem__, state.workers)
            asks = (("asked", w.elector, 0.0) for w in people if w.up and seat.me in w.knows)
            yield from self._together(state, net, i, asks)
        if seat.role is Role.ASKING and seat.follows:
            yield self.server(state, net, i, ("tick", LATE))
        if seat.follows:
            return
        if budget.records:
            less = state._replace(budget=budget._replace(records=budget.records - 1))
            yield self.server(less, net, i, ("record",))
        if seat.partner:
            yield self.server(state, net, i, ("lost", seat.partner))
        if budget.rosters:
            less = state._replace(budget=budget._replace(rosters=budget.rosters - 1))
            there = frozenset(w.elector for w in map(self.workers.__getitem__, state.workers) if w.up)
            for roster in {there, *(there - {each} for each in there)}:
                yield self.server(less, net, i, ("roster", roster))
        if seat.role is Role.ALONE:
            if budget.standbys and len(state.servers) < len(NAMES):
                yield self._transfer(state, net, i, NAMES[len(state.servers)])
            for standby in server.feeds:
                if standby == "T" and not seat.partner:
                    yield self.server(state, net, i, ("attach", standby))

    def deliveries(self, state: State, net: int) -> Iterator[Next]:
        """Every message that has a receiver that lives."""
        together: dict[tuple[str, Any, str], list[Any]] = {}
        for number in bits(net):
            to, event = self.events.values[number]
            if to:
                i = NAMES.index(to)
                if not self.servers[state.servers[i]].up:
                    continue
                if event[0] in ("accepted", "voted"):
                    term = event[2] if event[0] == "accepted" else event[2].term
                    together.setdefault((event[0], term, to), []).append(event)
                elif event[0] == "met" and self.servers[state.servers[i]].seat.role is Role.ALONE:
                    together.setdefault((event[0], event[2], to), []).append(event)
                else:
                    yield self.server(state, net, i, event, number)
            else:
                for i, each in enumerate(state.workers):
                    if self.workers[each].up:
                        yield self.worker(state, net, i, event, number)
        for (kind, _, to), events in together.items():
            i = NAMES.index(to)
            if kind == "met":  # by all members
                yield from self._together(state, net, i, events)
                continue
            for size in range(1, len(self.servers[state.servers[i]].seat.electorate) // 2 + 2):
                for some in combinations(events, size):
                    yield from self._together(state, net, i, some)

    def _together(self, state: State, net: int, i: int, events: Iterable[Any]) -> Iterator[Next]:
        """Events that are collected until there are enough of them, as one that is enough."""
        found = self.server(state, net, i, ("all", *events))
        if self.servers[found[1].servers[i]].seat.role is not self.servers[state.servers[i]].seat.role:
            yield found

    # -------------------------------------------------------------- what happens then

    def _transfer(self, state: State, net: int, i: int, name: str) -> Next:
        """A new standby gets a full state, and from then on the records."""
        source = self.servers[state.servers[i]]
        new = Server(self._seat(name, source.seat.me, patience=PATIENCE), source.log)
        new.seat.begin_at(source.seat.recorded)
        event, after, _, wrong = self.server(state, net, i, ("feed", name))
        budget = after.budget._replace(standbys=after.budget.standbys - 1)
        return event, after._replace(servers=(*after.servers, self.servers.number(new)), budget=budget), net, wrong

    def worker(self, state: State, net: int, i: int, event: Any, name: int = -1) -> Next:
        before = state.workers[i]
        number, out = self.workers.step(before, name if name >= 0 else self.events.number(("", event)), event)
        workers = (*state.workers[:i], number, *state.workers[i + 1 :])
        return (f"w{i}", event), state._replace(workers=workers), net | out.sent, ""

    def server(self, state: State, net: int, i: int, event: Any, name: int = -1) -> Next:
        before = state.servers[i]
        number, out = self.servers.step(before, name if name >= 0 else self.events.number(("", event)), event)
        named = (NAMES[i], event)
        if number == before and out is SILENT:
            return named, state, net, ""
        server = self.servers[number]
        if server.seat._heard.number > self._terms:
            return named, state, net, ""
        wrong, acked, alone = "", state.acked, state.alone
        if out.acknowledged:
            wrong = _conflict(server, out.acknowledged, self.logs.values[acked])
            if not wrong and out.acknowledged > len(self.logs.values[acked]):
                acked = self.logs.number(server.log[: out.acknowledged])
        if out.alone.number:
            wrong = wrong or (f"{out.alone} comes into force after {alone}" if out.alone < alone else "")
            alone = out.alone
        servers = (*state.servers[:i], number, *state.servers[i + 1 :])
        return named, State(servers, state.workers, acked, alone, state.budget), net | out.sent, wrong

    # -------------------------------------------------------------- what must hold

    def check(self, state: State) -> str:
        """Reason why a state is wrong: a server contradicts another one or an acknowledgement; "" if it is right."""
        alone = [s for s in map(self.servers.__getitem__, state.servers) if s.up and s.seat.role is Role.ALONE]
        if len(alone) > 1:
            return f"{alone[0].seat.me} and {alone[1].seat.me} both serve alone"
        acked = self.logs.values[state.acked]
        for server in alone:
            if server.log[: len(acked)] != acked:
                return f"{server.seat.me} serves without {acked} that was acknowledged; it has {server.log}"
        return ""


def _conflict(server: Server, number: int, acked: tuple[Any, ...]) -> str:
    both = min(number, len(acked))
    if number > len(server.log) or server.log[:both] != acked[:both]:
        return f"{server.seat.me} acknowledges {server.log[:number]} after {acked} was acknowledged"
    return ""
