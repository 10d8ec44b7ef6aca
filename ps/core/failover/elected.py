"""Elected seat: a server serves alone when a majority of the workers has voted for it and has accepted that.

    asked / lost --> RequestVotes(term) --majority votes--> Declare(not in force yet) --majority accepts--> alone

Rules of this file
  1. There are two rounds, each of a majority of the same electorate. The first ends older terms: its voters accept
     nothing older. The second makes sure that every later candidate hears of the new term. With one round the job would
     be unsafe, or would stop for good when votes are split.
  2. Terms grow: where a vote is refused because a higher term was promised, the server asks for a still higher one.
  3. A server that has the votes has the newest configuration that there can be. From then on that is the base of its
     requests, also where it has to ask again.
  4. Where a server is ALONE nobody else can have come to serve, so what workers say of that is wrong, however many say
     it. One that relies on a standby believes a majority, as the standby may serve by now.
  5. A worker does not speak to a server of a lower term than it has promised. A server that hears of such a promise
     takes a higher term; one with a standby does so by a record, so that both agree.

Source: Paxos over the configuration; the electorate changes by one at a time (Ongaro's thesis, section 4.1).
"""

from __future__ import annotations

from torch_ps.common.wire.terms import Configuration, Term, Vote
from torch_ps.ps.core.failover.seat import ConfigChange, Decisions, Declare, Elector, RequestVotes, Role, Seat


class ElectedSeat(Seat):
    """A right to serve that is given by workers.

    Args:
        patience: seconds after which a worker's wish that this standby takes over lapses, > 0.
    """

    def __init__(self, me: str, primary: str = "", *, patience: float) -> None:
        super().__init__(me, primary)
        self._patience = patience
        self._asks: dict[Elector, float] = {}  # who has asked this standby to take over, and when last
        self._asked = Term()  # that votes are asked for
        self._votes: frozenset[Elector] = frozenset()
        self._accepts: frozenset[Elector] = frozenset()
        self._others: dict[Elector, Configuration] = {}  # newer ones that workers say are in force

    def asked(self, elector: Elector, now: float) -> Decisions:
        if not self._follows or elector not in self.electorate:
            return ()
        self._asks = {**self._asks, elector: now}
        return self._stand() if self.role is Role.STANDBY else ()

    def received(self, primary: str, number: int, change: ConfigChange | None = None) -> Decisions:
        decisions = super().received(primary, number, change)
        if self.role is Role.ASKING and self.configuration.term > self._asked and not self._claimed:
            self.role = Role.STANDBY  # the primary lives, and has taken a higher term
        return decisions

    def voted(self, elector: Elector, vote: Vote) -> Decisions:
        self._hear(vote.promised)
        stopped = self._served(elector, vote.served)
        if stopped or self.role is not Role.ASKING or vote.term != self._asked or not vote.granted:
            return stopped
        self._votes |= {elector}
        if not self._majority(self._votes):
            return ()
        self.role, self._claimed, self._votes, self._accepts = Role.CONFIRMING, True, frozenset(), frozenset()
        self.configuration = Configuration(self._asked)
        return (Declare(self.configuration, False),)

    def _served(self, elector: Elector, configuration: Configuration) -> Decisions:
        """Hear from a worker which configuration is in force. One worker may be wrong; a majority has made it so."""
        self._hear(configuration.term)
        if self.role is Role.ALONE or elector not in self.electorate or configuration.term <= self.configuration.term:
            return ()
        self._others = {**self._others, elector: configuration}
        told = {who for who, each in self._others.items() if each.term > self.configuration.term}
        return self.refused(configuration, serving=True) if self._majority(frozenset(told)) else ()

    def accepted(self, elector: Elector, term: Term) -> Decisions:
        if self.role is not Role.CONFIRMING or term != self.configuration.term:
            return ()
        self._accepts |= {elector}
        if not self._majority(self._accepts):
            return ()
        reason = f"{len(self._accepts)} of {len(self.electorate)} workers have given it the seat"
        self._asks, self._accepts = {}, frozenset()
        return self._won(reason)

    def promised(self, term: Term) -> None:
        """Hear of a worker that does not speak to this server, as it has promised ``term``."""
        self._hear(term)

    def tick(self, now: float) -> Decisions:
        """Ask again what has not been answered, and take a higher term where workers have promised one."""
        self._asks = {elector: at for elector, at in self._asks.items() if now - at <= self._patience}
        behind = self._heard > self.configuration.term
        match self.role:
            case Role.STANDBY:
                return self._stand()
            case Role.ASKING if self._follows and not self._claimed and not self._wanted():
                self.role = Role.STANDBY
            case Role.ASKING:
                return self._claim() if self._heard > self._asked else (self._ask(),)
            case Role.CONFIRMING if behind:
                self.role = Role.ASKING
                return self._claim()
            case Role.CONFIRMING:
                return (Declare(self.configuration, False),)
            case Role.PAIRED if behind and not self._change:
                return self._reconfigure()
            case Role.ALONE if behind and self.configuration.term.number:
                self.configuration = Configuration(self._next_term())
                return (Declare(self.configuration, True),)
        return ()

    def _stand(self) -> Decisions:
        if self.configuration.standby != self.me or not self._wanted():
            return ()  # it may not have all records yet; or too few workers want it
        self.role = Role.ASKING
        return self._claim()

    def _claim(self) -> Decisions:
        self._asked, self._votes = self._next_term(), frozenset()
        return (self._ask(),)

    def _ask(self) -> RequestVotes:
        return RequestVotes(self._asked, self.configuration.term, self.electorate)

    def _wanted(self) -> bool:
        return self._majority(frozenset(self._asks))

    def _ready(self) -> bool:
        return bool(self.electorate)

    def _majority(self, electors: frozenset[Elector]) -> bool:
        return 2 * len(electors & self.electorate) > len(self.electorate)
