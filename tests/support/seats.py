"""A shard's servers and workers around the real seats and acceptors, as machines for exploring.

Rules of this file
  1. Nothing here decides: it carries out what the seats say, as the shell does.
  2. A message to workers is one for all, and any of them may hear it: also one that has joined since.
  3. A record's content names who made it, so records of one number that differ are seen to.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch_ps.common.wire.terms import Configuration, Term, Vote
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
)
from torch_ps.worker.transport.paxos_acceptor import Acceptor

PATIENCE = 10.0


class Server:
    """One process: its seat, its state (all records, in order) and the standbys that it sends records to."""

    def __init__(self, seat: ElectedSeat, log: tuple[Any, ...] = (), feeds: tuple[str, ...] = ()) -> None:
        self.seat, self.log, self.feeds = seat, log, feeds
        self.up = True

    def step(self, event: tuple[Any, ...]) -> tuple[Any, ...]:
        kind, *about = event
        seat = self.seat
        match kind:
            case "crash":
                self.up = False
                return ()
            case "feed":
                self.feeds = (*self.feeds, about[0])
                return ()
            case "record" | "roster":
                return tuple(self._make(about[0] if kind == "roster" else None))
            case "received":
                sender, number, content = about
                change = content if isinstance(content, ConfigChange) else None
                return tuple(self._obey(seat.received(sender, number, change), sender, content))
            case "refused":
                return tuple(self._obey(seat.refused(about[0], serving=about[1])))
            case "all":
                return tuple(out for each in about for out in self.step(each))
            case "promised":
                seat.promised(about[0])
                return ()
        return tuple(self._obey(getattr(seat, kind)(*about)))

    def tidied(self) -> Server:
        """Without what cannot matter any more, so that states that behave alike are one."""
        seat = self.seat
        if seat.role is Role.DEPOSED:
            self.up = False
        if not self.up:
            self.seat, self.log, self.feeds = type(seat)(seat.me, patience=PATIENCE), (), ()
            return self
        if seat.role is not Role.ASKING:
            seat._asked, seat._votes = Term(), frozenset()
        if seat.role is not Role.CONFIRMING:
            seat._accepts = frozenset()
        if not seat._follows:
            seat._asks = {}
        if seat._follows or not seat.partner:
            seat._met = frozenset()
        return self

    def _make(self, roster: frozenset[Any] | None) -> Iterator[Any]:
        number, decisions = self.seat.record()
        content = (self.seat.me, number) if roster is None else (self.seat.me, number, roster)
        self.log = (*self.log, content)
        yield from self._send(number, content)
        yield from self._obey(decisions)
        if roster is not None:
            yield from self._obey(self.seat.set_roster(roster))

    def _send(self, number: int, content: Any) -> Iterator[Any]:
        for standby in self.feeds:
            yield "send", standby, ("received", self.seat.me, number, content)

    def _obey(self, decisions: Decisions, sender: str = "", content: Any = None) -> Iterator[Any]:
        me = self.seat.me
        for each in decisions:
            match each:
                case Acknowledge():
                    yield "ack", each.number
                case ConfigChange():
                    self.log = (*self.log, each)
                    yield from self._send(each.number, each)
                case Introduce():
                    yield "send", "", ("introduce", me, each.standby)
                case Append():
                    self.log = (*self.log, content)
                case Receipt():
                    yield "send", sender, ("receipt", me, each.number)
                case Refuse() if each.serving:
                    yield "send", sender, ("refused", each.configuration, True)
                case Refuse():
                    yield "send", sender, ("promised", each.configuration.term)
                case RequestVotes():
                    yield "send", "", ("ask", me, each.term, each.base)
                case Declare():
                    if each.serving and not each.configuration.standby:
                        yield "alone", each.configuration.term
                    yield "send", "", ("declare", me, each.configuration, each.serving)
                case Serve():
                    rosters = [made[2] for made in self.log if isinstance(made, tuple) and len(made) == 3]
                    yield from self._obey(self.seat.set_roster(rosters[-1]) if rosters else ())


class Worker:
    """One name; a restart is another process under it.

    ``knows``: servers that it can ask to take over. A worker that knows all of them may do whatever one may that does
    not, so what must never happen is looked for with it, in fewer states. Whether the job goes on depends on who knows.
    """

    begins_with = frozenset({"P", "S", "T"})

    def __init__(self, name: str, acceptor: Acceptor) -> None:
        self.name, self.acceptor, self.session, self.up = name, acceptor, 1, True
        self.knows = self.begins_with

    @property
    def elector(self) -> tuple[str, int]:
        return self.name, self.session

    def step(self, event: tuple[Any, ...]) -> tuple[Any, ...]:
        match event:
            case ("crash",):
                self.up = False
            case ("restart",):
                self.up, self.session, self.acceptor = True, self.session + 1, type(self.acceptor)()
                self.knows = self.begins_with
            case ("introduce", server, standby):
                self.knows |= {standby}
                return (("send", server, ("met", self.elector, standby)),)
            case ("ask", server, term, base):
                return tuple(self._voted(server, self.acceptor.vote(term, base)))
            case ("declare", _, configuration, True):
                if self.acceptor.learn(configuration) and configuration.standby:
                    self.knows |= {configuration.standby}
            case ("declare", server, configuration, False):
                if self.acceptor.accept(configuration):
                    return (("send", server, ("accepted", self.elector, configuration.term)),)
                return tuple(self._voted(server, self.acceptor.refusal(configuration.term)))
        return ()

    def _voted(self, server: str, vote: Vote) -> Iterator[Any]:
        """A vote that is refused says two things, neither of which depends on who says it."""
        if vote.granted:
            yield "send", server, ("voted", self.elector, Vote(vote.term, True, vote.term, Configuration()))
            return
        yield "send", server, ("promised", vote.promised)
        if vote.served.term.number:
            yield "send", server, ("refused", vote.served, True)


class Newcomer(Worker):
    """Knows no more than the address of the first primary before it hears of others."""

    begins_with = frozenset({"P"})
