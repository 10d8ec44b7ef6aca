"""All that can happen to a shard's servers and their seat in etcd, for ``explore``.

    server --try--> etcd: the transaction is done, now or later --slot--> decided
           --look--> renewed, looked at ---------------------- --slot--> observed, now, later or never

Rules of this file
  1. Nothing here decides: it carries out what the seats say, as the shell does. One answer of etcd is under way at a
     time; a transaction whose answer was given up may still be done. Records and receipts are as in ``shard.py``.
  2. Time is a number that all clocks show. A lease that is due may run out later, and never earlier.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from tests.support.explore import Machines, Numbered, bits
from tests.support.seats import Server
from torch_ps.common.wire.terms import Configuration, Term
from torch_ps.ps.core.failover.leased import LeasedSeat
from torch_ps.ps.core.failover.seat import Decisions, Role, Transact

#: Of a lease, in units of the clock.
TTL = 1
NAMES = ("P", "S", "T")
NOBODY = -1


class Tenant(Server):
    """A server whose seat is a key in etcd; every event begins with the time."""

    seat: LeasedSeat  # type: ignore[assignment]

    def __init__(self, seat: LeasedSeat, log: tuple[Any, ...] = ()) -> None:
        super().__init__(seat, log)  # type: ignore[arg-type]
        self.wanted: Transact | None = None

    def step(self, event: tuple[Any, ...]) -> tuple[Any, ...]:
        now, kind, *about = event
        self.seat.at(now)
        if kind == "want":
            self.wanted = None
            return ()
        if kind == "age":
            if 0.0 < self.seat._until <= now:
                self.seat._until = 0.0
            return ()
        out = super().step((kind, *about))
        self.seat.at(0.0)
        if self.seat.role is Role.DEPOSED or not self.up:
            self.up, self.log, self.feeds, self.wanted = False, (), (), None
            self.seat = type(self.seat)(self.seat.me)
        return out

    def _obey(self, decisions: Decisions, sender: str = "", content: Any = None) -> Iterator[Any]:
        for each in decisions:
            if isinstance(each, Transact):
                self.wanted = each
        return super()._obey(decisions, sender, content)


class Key(NamedTuple):
    """State of etcd. ``leases``: for each server its lease and the time when that may run out; 0: no lease."""

    revision: int
    configuration: Configuration | None
    holder: int
    leases: tuple[tuple[int, int], ...]


class State(NamedTuple):
    """All but the messages. ``slots``: of each server, the number of an answer that is under way."""

    servers: tuple[int, ...]
    key: Key
    slots: tuple[int, ...]
    untils: tuple[int, ...]  # of each server: its lease holds until then, as far as it knows
    clock: int
    acked: int
    alone: Term
    records: int  # that may yet be made
    standbys: int  # that may yet come


Next = tuple[Any, State, int, str]


class Tenants:
    """A primary, and a standby that has its state.

    Args:
        paired: the standby is in force; else it is about to be.
        records, standbys: number of records that may yet be made, and of standbys that may come.
        ticks: most ticks of the clock.
        terms: highest number of a term that is looked at.
        seat: the real class, or a mutant.
        compares: fields that a transaction compares: "revision", "holder".
        late: a transaction may be done when nobody waits for it any more.
        from_answer: a lease is believed from when the answer came, which is a mistake.
    """

    def __init__(
        self,
        *,
        paired: bool = True,
        records: int = 1,
        standbys: int = 0,
        ticks: int = 1,
        terms: int = 3,
        seat: type[LeasedSeat] = LeasedSeat,
        compares: tuple[str, ...] = ("revision", "holder"),
        late: bool = False,
        from_answer: bool = False,
    ) -> None:
        self._seat, self._ticks, self.terms = seat, ticks, terms
        self._compares, self._late, self._from_answer = compares, late, from_answer
        self.servers = Machines[Tenant, tuple[Any, ...]](lambda server, event: server.step(event))
        self.events, self.answers, self.logs = Numbered[Any](), Numbered[Any](), Numbered[tuple[Any, ...]]()
        primary, standby = Tenant(seat("P")), Tenant(seat("S", "P"))
        numbers = (self.servers.number(primary), self.servers.number(standby))
        key = Key(0, None, NOBODY, ((0, 0), (0, 0)))
        nothing = self.logs.number(())
        state = State(numbers, key, (NOBODY,) * 2, (0, 0), 0, nothing, Term(), records, standbys)
        state, net = self._at_rest(state, 0, 0)
        _, state, net, _ = self.server(state, net, 0, ("record",))
        first = self.servers[state.servers[0]]
        standby.log = first.log
        standby.seat.begin_at(first.seat.recorded)
        first.feeds = ("S",)
        state = state._replace(servers=(self.servers.number(first), self.servers.number(standby)))
        if paired:
            _, state, net, _ = self.server(state, net, 0, ("attach", "S"))
            for i in (0, 1, 0):
                state, net = self._at_rest(state, net, i)
            net = 0
        self.start = state, net

    # -------------------------------------------------------------- what may happen

    def nexts(self, state: State, net: int) -> Iterator[Next]:
        for each in self._all(state, net):
            if each[1] != state or each[2] != net:
                yield each

    def _all(self, state: State, net: int) -> Iterator[Next]:
        for number in bits(net):
            to, event = self.events.values[number]
            if to == "etcd":
                yield self._execute(state, net, event)
            elif self.servers[state.servers[NAMES.index(to)]].up:
                yield self.server(state, net, NAMES.index(to), event)
        for i, number in enumerate(state.servers):
            if self.servers[number].up:
                yield from self._of_server(state, net, i, self.servers[number])
        if state.clock < self._ticks:
            yield "tick", self._tick(state), net, ""
        for i, (which, due) in enumerate(state.key.leases):
            if which and state.clock >= due:
                yield ("expires", NAMES[i]), self._expired(state, i), net, ""

    def _of_server(self, state: State, net: int, i: int, server: Tenant) -> Iterator[Next]:
        seat = server.seat
        if state.slots[i] != NOBODY:
            yield self._answered(state, net, i)
        event, after, sent, _ = self._try(state, net, i) if server.wanted is not None else self._look(state, net, i)
        if self._late:
            yield event, after, sent, ""  # in place of an answer that never came
        else:
            yield event, self._with_slot(after, i, NOBODY), sent, ""
            if after.slots[i] != NOBODY:
                yield self._answered(after, sent, i)
        if seat.follows:
            return
        if state.records:
            yield self.server(state._replace(records=state.records - 1), net, i, ("record",))
        if seat.partner:
            yield self.server(state, net, i, ("lost", seat.partner))
        if seat.role is not Role.ALONE:
            return
        for standby in server.feeds:
            if not seat.partner and standby == NAMES[len(state.servers) - 1]:
                yield self.server(state, net, i, ("attach", standby))
        if state.standbys and len(state.servers) < len(NAMES):
            yield self._transfer(state, net, i, NAMES[len(state.servers)])

    # -------------------------------------------------------------- etcd

    def _tick(self, state: State) -> State:
        """A unit of time passes. What is over is over, whenever it ended: states that behave alike are one."""
        clock = state.clock + 1
        servers = [
            self.servers.step(number, self.events.number(("", (float(clock), "age"))), (float(clock), "age"))[0]
            for number in state.servers
        ]
        slots = []
        for slot in state.slots:
            *answer, until = self.answers.values[slot] if slot != NOBODY else (0,)
            slots.append(self.answers.number((*answer, 0)) if slot != NOBODY and until <= clock else slot)
        leases = tuple((which, 0 if due <= clock else due) for which, due in state.key.leases)
        return state._replace(
            servers=tuple(servers),
            slots=tuple(slots),
            untils=tuple(0 if until <= clock else until for until in state.untils),
            key=state.key._replace(leases=leases),
            clock=clock,
        )

    def _expired(self, state: State, i: int) -> State:
        key = state.key
        leases = (*key.leases[:i], (0, key.leases[i][1]), *key.leases[i + 1 :])
        return state._replace(key=key._replace(leases=leases, holder=NOBODY if key.holder == i else key.holder))

    def _look(self, state: State, net: int, i: int) -> Next:
        key, until = state.key, state.clock + TTL
        which = key.leases[i][0] or 1 + max(which for which, _ in key.leases)
        leases = (*key.leases[:i], (which, until), *key.leases[i + 1 :])
        state = state._replace(key=key._replace(leases=leases))
        holder = NAMES[key.holder] if key.holder != NOBODY else ""
        answer = self.answers.number(("observed", key.revision, key.configuration, holder, until))
        return ("look", NAMES[i]), self._with_slot(state, i, answer), net, ""

    def _try(self, state: State, net: int, i: int) -> Next:
        wanted = self.servers[state.servers[i]].wanted
        message = self.events.number(("etcd", ("try", i, state.key.leases[i][0], wanted)))
        _, after, _, _ = self.server(state, net, i, ("want",))
        after = self._with_slot(after, i, NOBODY)
        if self._late:
            return ("try", NAMES[i]), after, net | 1 << message, ""
        return self._execute(after, net, self.events.values[message][1])

    def _execute(self, state: State, net: int, event: Any) -> Next:
        _, i, which, wanted = event
        key = state.key
        holder = NAMES[key.holder] if key.holder != NOBODY else ""
        same = ("revision" not in self._compares or wanted.revision == key.revision) and (
            "holder" not in self._compares or wanted.holder == holder
        )
        if not same or not which or key.leases[i][0] != which:
            return ("nothing done", event), state, net, ""
        state = state._replace(
            key=key._replace(revision=key.revision + 1, configuration=wanted.configuration, holder=i)
        )
        answer = self.answers.number(("decided", wanted, key.revision + 1, state.untils[i]))
        if state.slots[i] == NOBODY:
            state = self._with_slot(state, i, answer)
        return ("done", event), state, net, ""

    def _answered(self, state: State, net: int, i: int) -> Next:
        kind, *about, until = self.answers.values[state.slots[i]]
        if kind == "observed":
            until = state.clock + TTL if self._from_answer else until
            state = state._replace(untils=(*state.untils[:i], until, *state.untils[i + 1 :]))
        return self.server(self._with_slot(state, i, NOBODY), net, i, (kind, *about, until))

    def _with_slot(self, state: State, i: int, answer: int) -> State:
        return state._replace(slots=(*state.slots[:i], answer, *state.slots[i + 1 :]))

    # -------------------------------------------------------------- servers

    def _transfer(self, state: State, net: int, i: int, name: str) -> Next:
        source = self.servers[state.servers[i]]
        new = Tenant(self._seat(name, source.seat.me), source.log)
        new.seat.begin_at(source.seat.recorded)
        _, state, _, wrong = self.server(state, net, i, ("feed", name))
        state = state._replace(
            servers=(*state.servers, self.servers.number(new)),
            key=state.key._replace(leases=(*state.key.leases, (0, 0))),
            slots=(*state.slots, NOBODY),
            untils=(*state.untils, 0),
            standbys=state.standbys - 1,
        )
        return ("comes", name), state, net, wrong

    def server(self, state: State, net: int, i: int, event: Any) -> Next:
        timed = (float(state.clock), *event)
        number, out = self.servers.step(state.servers[i], self.events.number(("", timed)), timed)
        if self.servers[number].seat._heard.number > self.terms:
            return (NAMES[i], event), state, net, ""
        state = state._replace(servers=(*state.servers[:i], number, *state.servers[i + 1 :]))
        server, wrong = self.servers[number], ""
        for kind, *about in out:
            match kind:
                case "send" if about[1][0] in ("received", "receipt"):  # workers have no say here
                    net |= 1 << self.events.number(tuple(about))
                case "ack":
                    acked = self.logs.values[state.acked]
                    wrong = wrong or self._wrong_ack(state, i, server, about[0], acked)
                    if about[0] > len(acked):
                        state = state._replace(acked=self.logs.number(server.log[: about[0]]))
                case "alone":
                    wrong = wrong or (f"{about[0]} comes into force after {state.alone}" * (about[0] < state.alone))
                    state = state._replace(alone=about[0])
        return (NAMES[i], event), state, net, wrong

    def _wrong_ack(self, state: State, i: int, server: Tenant, number: int, acked: tuple[Any, ...]) -> str:
        if state.key.holder != i:
            return f"{NAMES[i]} acknowledges without the seat"
        both = min(number, len(acked))
        if number > len(server.log) or server.log[:both] != acked[:both]:
            return f"{NAMES[i]} acknowledges {server.log[:number]} after {acked} was acknowledged"
        return ""

    # -------------------------------------------------------------- what must hold

    def check(self, state: State) -> str:
        acked = self.logs.values[state.acked]
        for i, server in enumerate(map(self.servers.__getitem__, state.servers)):
            seat = server.seat
            serves = server.up and seat.role is Role.ALONE and state.key.holder == i and state.clock < seat._until
            if serves and server.log[: len(acked)] != acked:
                return f"{NAMES[i]} serves without {acked} that was acknowledged; it has {server.log}"
        return ""

    def crashed(self, state: State, i: int) -> State:
        return self.server(state, 0, i, ("crash",))[1]

    def able(self, state: State) -> bool:
        """Whether a server lives that may serve: etcd names it, and it knows."""
        written = state.key.configuration
        for server in map(self.servers.__getitem__, state.servers):
            seat = server.seat
            if not server.up or written is None:
                continue
            if written.primary == seat.me or (written.standby == seat.me and seat.configuration == written):
                return True
        return False

    def goes_on(self, state: State, net: int, rounds: int = 12) -> bool:
        """Whether something new is acknowledged once answers and messages arrive and leases that are due run out."""
        before = len(self.logs.values[state.acked])
        for _ in range(rounds):
            for i, number in enumerate(state.servers):
                if self.servers[number].up:
                    state, net = self._at_rest(state, net, i)
            for i, number in enumerate(state.servers):
                if self.servers[number].up and not self.servers[number].seat.follows:
                    _, state, net, _ = self.server(state, net, i, ("record",))
            if len(self.logs.values[state.acked]) > before:
                return True
            state = state._replace(clock=state.clock + 1)
            for i, (which, due) in enumerate(state.key.leases):
                if which and state.clock >= due and not self.servers[state.servers[i]].up:
                    state = self._expired(state, i)
        return False

    def _at_rest(self, state: State, net: int, i: int) -> tuple[State, int]:
        """One server looks, tries what it wants, and hears what there is to hear."""
        for _ in range(4):
            if not self.servers[state.servers[i]].up:
                break
            server = self.servers[state.servers[i]]
            step = (
                self._answered if state.slots[i] != NOBODY else self._try if server.wanted is not None else self._look
            )
            _, state, net, _ = step(state, net, i)
            for number in bits(net):
                to, event = self.events.values[number]
                if to == "etcd" and event[1] == i:
                    _, state, net, _ = self._execute(state, net, event)
                elif to == NAMES[i]:
                    _, state, net, _ = self.server(state, net, i, event)
            seat = self.servers[state.servers[i]].seat
            gone = [
                j for j, number in enumerate(state.servers) if NAMES[j] == seat.partner and not self.servers[number].up
            ]
            if gone and not seat.follows:
                _, state, net, _ = self.server(state, net, i, ("lost", seat.partner))
        return state, net
