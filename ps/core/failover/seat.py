"""Who may serve a shard: one ``Seat`` per server, which says what it may acknowledge and when it takes over.

A record is whatever changes the shard's state: an update, a roster, an electorate. The primary numbers them and the
standby takes them in order. So the standby's state is that of the primary at some record, and may go on from there.

    ALONE --attach--> PAIRED --the standby is lost--> ASKING --majority--> CONFIRMING --majority--> ALONE
                      STANDBY --asked by a majority--> ASKING --majority--> CONFIRMING --majority--> ALONE
    any --another configuration is in force--> DEPOSED

Rules of this file
  1. In ALONE everything may be acknowledged; in PAIRED, and on the way from there, what the standby has taken. A
     standby takes nothing from the primary any more from the moment that it has been given the votes to serve.
  2. A configuration is this server's from the moment that everyone in it relies on it: one with a standby, when the
     standby has it. What is proposed and not there yet gives no right to anything.
  3. A server that finds another configuration in force steps down and never serves again under its name.
  4. How a server gets to be ALONE again is decided by ``elected.py`` (workers vote) or ``leased.py`` (a key in etcd).
     Both are a ``Seat``; the shell obeys the same effects.
  5. Repeats, delays and messages of long ago do no harm: each names its server or its term.

What the shell holds back until ``Acknowledge``: answers to pushes and pulls of the state that a record made, and the
effect of a change of the roster on those who do not have it yet.

Source: primary and backup with a configuration that is decided apart from the records is Vertical Paxos (Lamport,
Malkhi, Zhou, PODC 2009).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Self

from torch_ps.common.errors import ProtocolError
from torch_ps.common.wire.terms import Configuration, Term, Vote


class Role(Enum):
    """What a server is."""

    ALONE = "alone"  # primary without a standby
    PAIRED = "paired"  # primary with a standby
    STANDBY = "standby"
    ASKING = "asking"  # wants to go on alone, and asks whether it may
    CONFIRMING = "confirming"  # may, once that is known where it has to be
    DEPOSED = "deposed"


#: Name and session of a worker that may vote.
Elector = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Acknowledge:
    """Primary: what waits for records up to this number may go out."""

    number: int


@dataclass(frozen=True, slots=True)
class ConfigChange:
    """Primary: send this to the standby as the record ``number``, in order with the others."""

    number: int
    configuration: Configuration
    electorate: frozenset[Elector]


@dataclass(frozen=True, slots=True)
class Append:
    """Standby: keep and apply this record, the next in order; what is not taken is dropped."""

    number: int


@dataclass(frozen=True, slots=True)
class Receipt:
    """Standby: tell the primary that all records up to this number are here (and what comes next)."""

    number: int


@dataclass(frozen=True, slots=True)
class Refuse:
    """Tell the server that sent a record: nothing is taken from it any more.

    Attributes:
        serving: this configuration is in force; False: it may come to be.
    """

    configuration: Configuration
    serving: bool


@dataclass(frozen=True, slots=True)
class RequestVotes:
    """Ask every elector for its vote; each answers with a ``Vote``."""

    term: Term
    base: Term
    electorate: frozenset[Elector]


@dataclass(frozen=True, slots=True)
class Declare:
    """Tell every worker.

    Attributes:
        serving: it is in force; False: electors are to accept it, and answer that they have.
    """

    configuration: Configuration
    serving: bool


@dataclass(frozen=True, slots=True)
class Serve:
    """This server was the standby and is the primary now: build the job from the records taken, then listen."""

    configuration: Configuration
    reason: str


@dataclass(frozen=True, slots=True)
class StepDown:
    """Stop: another configuration is in force. A primary ends; a standby may attach anew, under a new name."""

    configuration: Configuration
    reason: str


@dataclass(frozen=True, slots=True)
class Transact:
    """With etcd: write this configuration, and this server as its holder, if both are as they were; see ``leased.py``.

    Attributes:
        revision: revision at which the configuration was last written; 0: never.
        holder: name of the server that held the seat; "" if its lease has expired.
    """

    revision: int
    holder: str
    configuration: Configuration


Decision = Acknowledge | ConfigChange | Append | Receipt | Refuse | RequestVotes | Declare | Serve | StepDown | Transact
Decisions = tuple[Decision, ...]


class Seat(ABC):
    """A server's right to serve.

    Args:
        me: name of this life of this server, ``ADDRESS/RANDOM``.
        primary: name of the server whose standby this is; "" for a server that starts the job and serves alone.

    Attributes:
        configuration: newest that this server belongs to; what it asks for votes with.
        partner: primary: name of the standby; standby: name of the primary; "" is none.
        recorded: number of the last record made (primary) or taken (standby).
        safe: primary: number up to which may be acknowledged.
    """

    def __init__(self, me: str, primary: str = "") -> None:
        self.me, self.partner = me, primary
        self.role = Role.STANDBY if primary else Role.ALONE
        self.configuration = Configuration() if primary else Configuration(Term(0, me))
        self.electorate: frozenset[Elector] = frozenset()
        self.recorded = self.safe = 0
        self._follows = bool(primary)  # the records are another server's
        self._claimed = False  # was given the votes to go on alone, and is not there yet
        self._change = 0  # number of the last ConfigChange, until the standby has it; 0: none is under way
        self._proposed = self.configuration  # by the last ConfigChange
        self._heard = Term()  # highest that somebody has, has asked for or has promised
        self._target = self.electorate  # what the electorate is to become

    #: Whether a server that is alone may come to hold back, too.
    lapses = False

    def at(self, now: float) -> Self:
        """The time of the call that follows; only a seat that is held by a lease depends on it."""
        return self

    def may_follow(self, term: Term) -> bool:
        """Standby: whether to give up what is here, and this seat, for the state of a primary of ``term``."""
        mine = self.configuration
        if self.role is Role.DEPOSED or self.me not in (mine.primary, mine.standby):
            return True
        return mine.standby == self.me and term >= mine.term  # not when it has been given the votes

    @property
    def follows(self) -> bool:
        """Whether this server only takes records (or has stopped to): it makes none of its own."""
        return self._follows or self.role is Role.DEPOSED

    # -------------------------------------------------------------- primary

    def record(self) -> tuple[int, Decisions]:
        """Number a record that has been made; to be sent to the standby, if there is one, in this order.

        Raises:
            ProtocolError: this server is not the primary.
        """
        if self.follows:
            raise ProtocolError(f"{self.me} is {self.role.value} and makes no records")
        self.recorded += 1
        return self.recorded, self._settle(self.recorded) if self.role is Role.ALONE else ()

    def attach(self, standby: str) -> Decisions:
        """A standby has the state of some record and gets all that come after it: rely on it from now on.

        Raises:
            ProtocolError: this server is not alone.
        """
        if self.role is not Role.ALONE:
            raise ProtocolError(f"{self.me} is {self.role.value}; a standby can be attached to a primary that is alone")
        self.partner = standby
        return self._advance()

    def receipt(self, standby: str, number: int) -> Decisions:
        """The standby has all records up to ``number``; a sign of life of it, too.

        Raises:
            ProtocolError: it has more than there are.
        """
        if self.follows or standby != self.partner or self.role is Role.ALONE:
            return ()
        if number > self.recorded:
            raise ProtocolError(f"{standby} says that it has record {number}; there are {self.recorded}")
        if self.role is Role.ASKING and not self._claimed:
            self.role = Role.PAIRED
        decisions = self._settle(number)
        if self._change and number >= self._change:
            self._change = 0
            if self._proposed.term > self.configuration.term:
                self.configuration = self._proposed
                decisions += (Declare(self.configuration, True),)
        return decisions + self._advance()

    def lost(self, standby: str) -> Decisions:
        """The standby is gone, or silent for too long."""
        if standby != self.partner or self._follows:
            return ()
        if self.role is Role.ALONE:
            self.partner = ""
        if self.role is not Role.PAIRED:
            return ()
        self.role = Role.ASKING
        return self._claim()

    def set_roster(self, electors: Iterable[Elector]) -> Decisions:
        """The roster has changed: its members are to vote.

        While there is a standby the electorate follows in steps of one elector, each a record, so that the majorities
        of what either server knows always meet. It never becomes empty: its last member stays until there is another.
        """
        self._target = frozenset(electors)
        return self._advance()

    # -------------------------------------------------------------- standby

    def received(self, primary: str, number: int, change: ConfigChange | None = None) -> Decisions:
        """A record has come; ``change`` is the one of the primary's seat that it is, if any."""
        if not self._follows or self._claimed or self.role is Role.DEPOSED or primary != self.partner:
            return (Refuse(self.configuration, not (self._follows or self._claimed)),)
        if number != self.recorded + 1:
            return (Receipt(self.recorded),)
        self.recorded = number
        if change is not None:
            self.configuration = change.configuration
            self.electorate = self._target = change.electorate
            self._hear(change.configuration.term)
        return Append(number), Receipt(number)

    def begin_at(self, number: int) -> None:
        """Standby: the state of the record ``number`` has been transferred.

        Raises:
            ProtocolError: it is not a standby, or has taken records already.
        """
        if self.role is not Role.STANDBY or self.recorded:
            raise ProtocolError(f"{self.me} is {self.role.value} and has record {self.recorded}")
        self.recorded = number

    # -------------------------------------------------------------- both

    def refused(self, configuration: Configuration, *, serving: bool) -> Decisions:
        """The other server takes nothing more, or a worker has said who serves; see ``Refuse``."""
        self._hear(configuration.term)
        if not serving or configuration.term <= self.configuration.term:
            return ()
        if self.role is Role.DEPOSED or self.me in (configuration.primary, configuration.standby):
            return ()
        self.role = Role.DEPOSED
        return (StepDown(configuration, f"{configuration.term} is in force: {configuration} serves"),)

    @abstractmethod
    def tick(self, now: float) -> Decisions:
        """Call it about every second: what has not been answered is asked again."""

    def asked(self, elector: Elector, now: float) -> Decisions:
        """Standby: a worker cannot reach the primary and asks this server to take over. Workers repeat it."""
        return ()

    def voted(self, elector: Elector, vote: Vote) -> Decisions:
        """A worker answers an ``RequestVotes``, or refuses what was declared."""
        return ()

    def accepted(self, elector: Elector, term: Term) -> Decisions:
        """A worker has accepted what was declared."""
        return ()

    # -------------------------------------------------------------- the way of deciding

    @abstractmethod
    def _claim(self) -> Decisions:
        """Begin to ask whether this server may go on alone; the role is ASKING."""

    @abstractmethod
    def _ready(self) -> bool:
        """Whether a standby can be relied on."""

    def _hear(self, term: Term) -> None:
        self._heard = max(self._heard, term)

    def _next_term(self) -> Term:
        self._heard = Term(self._heard.number + 1, self.me)
        return self._heard

    def _won(self, reason: str) -> Decisions:
        """It is certain that nobody else can come to serve: go on alone."""
        followed, self._follows = self._follows, False
        self.role, self.partner, self._change, self._claimed = Role.ALONE, "", 0, False
        serve = (Serve(self.configuration, reason),) if followed else ()
        return *serve, Declare(self.configuration, True), *self._settle(self.recorded), *self._advance()

    def _settle(self, number: int) -> Decisions:
        if number <= self.safe:
            return ()
        self.safe = number
        return (Acknowledge(number),)

    def _advance(self) -> Decisions:
        """Bring electorate and standby nearer to what they are to be."""
        if self._follows:
            return ()
        if self.role is Role.ALONE:
            self.electorate = self._target or self.electorate
            return self._reconfigure() if self.partner and self._ready() else ()
        if self.role is not Role.PAIRED or self._change:
            return ()
        electorate = _one_step(self.electorate, self._target)
        if electorate == self.electorate:
            return ()
        self.electorate = electorate
        return (self._send_change(),)

    def _reconfigure(self) -> Decisions:
        """From the next record on nothing is acknowledged without the standby, in a new term."""
        self.role = Role.PAIRED
        self._proposed = Configuration(self._next_term(), self.partner)
        return (self._send_change(),)

    def _send_change(self) -> ConfigChange:
        self.recorded += 1
        self._change = self.recorded
        return ConfigChange(self.recorded, self._proposed, self.electorate)


def _one_step(electorate: frozenset[Elector], target: frozenset[Elector]) -> frozenset[Elector]:
    """Nearer to ``target`` by one elector; who is new comes in before others go."""
    come, go = sorted(target - electorate), sorted(electorate - target)
    if come:
        return electorate | {come[0]}
    return electorate - {go[0]} if go and len(electorate) > 1 else electorate
