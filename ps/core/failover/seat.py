"""Seat: a server's right to serve its shard, which says what it may acknowledge and when it takes over.

    ALONE --attach--> PAIRED --the standby is lost--> ASKING --majority--> CONFIRMING --majority--> ALONE
                      STANDBY --asked by a majority--> ASKING --majority--> CONFIRMING --majority--> ALONE
    any --another configuration is in force--> DEPOSED

All changes of a role are in ``ps/core/state_tables.py``; who makes which call is in ``torch_ps.ps.core.failover``.

Rules of this file
  1. An ALONE server may acknowledge everything. A PAIRED one, and one that comes from there, may acknowledge what its
     standby has taken. A standby that has been given the votes to serve takes nothing from the primary any more.
  2. A server adopts a configuration when everyone in it relies on it: one with a standby, when the standby has it. A
     configuration that is only proposed gives no right to anything.
  3. A server that finds another configuration in force steps down and never serves again under its name.
  4. How a server gets to be ALONE again is decided by ``ps/core/failover/elected.py`` (workers vote) or
     ``ps/core/failover/leased.py`` (a key in etcd). The shell obeys the same decisions of both.
  5. Repeated, delayed and old messages do no harm: each names its server or its term.
  6. A worker that does not know where the standby is cannot ask it to take over. So a standby is relied on when every
     member of the roster has said that it knows it, and a newcomer counts as an elector once it has.

The shell holds back until ``Acknowledge``: answers to pushes and pulls of the state that a record made, and a changed
roster from those who do not have it yet.

Source: Vertical Paxos (Lamport, Malkhi, Zhou, PODC 2009): primary and backup, with a configuration that is decided
apart from the records.
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
    """What a server is to its shard."""

    ALONE = "alone"  # primary without a standby
    PAIRED = "paired"  # primary with a standby
    STANDBY = "standby"
    ASKING = "asking"  # wants to serve alone, and asks whether it may
    CONFIRMING = "confirming"  # has the votes; serves once a majority knows of it
    DEPOSED = "deposed"


#: Largest distance between two terms that a server hears of one after the other: each attempt to serve adds 1.
MAX_JUMP = 1 << 32

#: Name and session of a worker that may vote.
Elector = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Acknowledge:
    """On a primary: let go out what waits for records up to this number."""

    number: int


@dataclass(frozen=True, slots=True)
class ConfigChange:
    """On a primary: send this to the standby as the record ``number``, in order with the others."""

    number: int
    configuration: Configuration
    electorate: frozenset[Elector]


@dataclass(frozen=True, slots=True)
class Introduce:
    """On a primary: tell every worker of this standby, also those that connect later; each answers that it knows it."""

    standby: str


@dataclass(frozen=True, slots=True)
class Append:
    """On a standby: keep and apply the record that has come, the next in order. Without this decision, drop it."""

    number: int


@dataclass(frozen=True, slots=True)
class Receipt:
    """On a standby: tell the primary that all records up to this number are here."""

    number: int


@dataclass(frozen=True, slots=True)
class Refuse:
    """Tell the server that sent a record that nothing is taken from it any more.

    Attributes:
        serving: whether ``configuration`` is in force; False where it may come to be.
    """

    configuration: Configuration
    serving: bool


@dataclass(frozen=True, slots=True)
class RequestVotes:
    """Ask every elector for its ``Vote``.

    Attributes:
        term: term that this server wants to serve in.
        base: term of the configuration whose state this server has.
    """

    term: Term
    base: Term
    electorate: frozenset[Elector]


@dataclass(frozen=True, slots=True)
class Declare:
    """Tell every worker of a configuration.

    Attributes:
        serving: whether it is in force; False where electors are to accept it, and to answer that they have.
    """

    configuration: Configuration
    serving: bool


@dataclass(frozen=True, slots=True)
class Serve:
    """This standby is the primary now: build the job from the records that were taken, then listen."""

    configuration: Configuration
    reason: str


@dataclass(frozen=True, slots=True)
class StepDown:
    """Another configuration is in force: a primary ends; a standby may attach again, under a new name."""

    configuration: Configuration
    reason: str


@dataclass(frozen=True, slots=True)
class Transact:
    """Write this configuration to etcd, and this server as its holder, if both are as they were.

    Attributes:
        revision: revision at which the configuration was last written; 0 where it was never written.
        holder: server that held the seat; "" is nobody, as that lease has run out.
    """

    revision: int
    holder: str
    configuration: Configuration


Decision = (
    Acknowledge
    | ConfigChange
    | Introduce
    | Append
    | Receipt
    | Refuse
    | RequestVotes
    | Declare
    | Serve
    | StepDown
    | Transact
)
Decisions = tuple[Decision, ...]


class Seat(ABC):
    """A server's right to serve.

    Args:
        me: name of this life of this server, ``ADDRESS/RANDOM``.
        primary: name of the server whose standby this one is; "" for a server that starts the job.

    Attributes:
        configuration: newest configuration that this server belongs to; its term is the base of a request for votes.
        partner: name of a primary's standby, or of a standby's primary; "" is none.
        recorded: number of the last record made (primary) or taken (standby).
        safe: number of the last record that a primary may acknowledge.
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
        self._met: frozenset[Elector] = frozenset()  # members that know where the partner is

    #: Whether a server that is alone may have to hold back acknowledgements.
    lapses = False
    #: Whether workers vote.
    votes = True

    def at(self, now: float) -> Self:
        """Set the time of the call that follows. Only a seat that is held by a lease depends on it."""
        return self

    def may_follow(self, term: Term) -> bool:
        """Whether a standby gives up its records, and this seat, for the state of a primary of ``term``."""
        mine = self.configuration
        if self.role is Role.DEPOSED or self.me not in (mine.primary, mine.standby):
            return True
        return mine.standby == self.me and term >= mine.term  # not when it has been given the votes

    @property
    def follows(self) -> bool:
        """Whether this server makes no records of its own: it is a standby, or deposed."""
        return self._follows or self.role is Role.DEPOSED

    # -------------------------------------------------------------- primary

    def record(self) -> tuple[int, Decisions]:
        """Number a record that was made. The shell sends records to the standby in the order of their numbers.

        Raises:
            ProtocolError: this server is not the primary.
        """
        if self.follows:
            raise ProtocolError(f"{self.me} is {self.role.value} and makes no records")
        self.recorded += 1
        return self.recorded, self._settle(self.recorded) if self.role is Role.ALONE else ()

    def attach(self, standby: str) -> Decisions:
        """Rely on a standby as soon as all members have met it.

        It has the state of some record, and gets all that come after it.

        Raises:
            ProtocolError: this server is not alone.
        """
        if self.role is not Role.ALONE:
            raise ProtocolError(f"{self.me} is {self.role.value}; a standby can be attached to a primary that is alone")
        self.partner, self._met = standby, frozenset()
        return Introduce(standby), *self._advance()

    def met(self, elector: Elector, standby: str) -> Decisions:
        """Hear from a member that it knows where the standby is. Members say so on every new stream."""
        if self.follows or standby != self.partner:
            return ()
        self._met |= {elector}
        return self._advance()

    def receipt(self, standby: str, number: int) -> Decisions:
        """Take a receipt: the standby has all records up to ``number``, and lives.

        Raises:
            ProtocolError: there are fewer records.
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
        """Go on without the standby, which is gone or silent for too long."""
        if standby != self.partner or self._follows:
            return ()
        if self.role is Role.ALONE:
            self.partner = ""
        if self.role is not Role.PAIRED:
            return ()
        self.role = Role.ASKING
        return self._claim()

    def set_roster(self, electors: Iterable[Elector]) -> Decisions:
        """Have the members of a changed roster vote.

        While there is a standby, the electorate follows the roster one elector at a time, each change a record, so that
        a majority of what one server knows meets every majority of what the other knows. The electorate never becomes
        empty: its last member stays until there is another.
        """
        self._target = frozenset(electors)
        self._met &= self._target
        return self._advance()

    # -------------------------------------------------------------- standby

    def received(self, primary: str, number: int, change: ConfigChange | None = None) -> Decisions:
        """Take the record that has come from ``primary``.

        Args:
            change: change of the configuration that the record is; None is any other record.
        """
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
        """Begin as a standby with the state of the record ``number``, which has been transferred.

        Raises:
            ProtocolError: this is not a standby, or it has taken records already.
        """
        if self.role is not Role.STANDBY or self.recorded:
            raise ProtocolError(f"{self.me} is {self.role.value} and has record {self.recorded}")
        self.recorded = number

    # -------------------------------------------------------------- both

    def refused(self, configuration: Configuration, *, serving: bool) -> Decisions:
        """Hear of another configuration, from the other server (see ``Refuse``) or from a worker."""
        self._hear(configuration.term)
        if not serving or configuration.term <= self.configuration.term:
            return ()
        if self.role is Role.DEPOSED or self.me in (configuration.primary, configuration.standby):
            return ()
        self.role = Role.DEPOSED
        return (StepDown(configuration, f"{configuration.term} is in force: {configuration} serves"),)

    @abstractmethod
    def tick(self, now: float) -> Decisions:
        """Ask again what has not been answered. The shell calls this about every half second."""

    def asked(self, elector: Elector, now: float) -> Decisions:
        """Take the wish of a worker that cannot reach the primary: this standby is to take over. Workers repeat it."""
        return ()

    def voted(self, elector: Elector, vote: Vote) -> Decisions:
        """Take the vote of a worker, or its refusal of what was declared."""
        return ()

    def accepted(self, elector: Elector, term: Term) -> Decisions:
        """Take the answer of a worker that has accepted what was declared."""
        return ()

    # -------------------------------------------------------------- the way of deciding

    @abstractmethod
    def _claim(self) -> Decisions:
        """Begin to ask whether this server may go on alone; the role is ASKING."""

    @abstractmethod
    def _ready(self) -> bool:
        """Whether a standby can be relied on."""

    def _hear(self, term: Term) -> None:
        """Note the highest term. One that is out of all proportion is no term of this job, and would use numbers up."""
        if term.number <= self._heard.number + MAX_JUMP:
            self._heard = max(self._heard, term)

    def _next_term(self) -> Term:
        self._heard = Term(self._heard.number + 1, self.me)
        return self._heard

    def _won(self, reason: str) -> Decisions:
        """Serve alone: it is certain that nobody else can come to serve."""
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
        """Bring the electorate and the standby one step nearer to what they are to be."""
        if self._follows:
            return ()
        if self.role is Role.ALONE:
            self.electorate = self._target or self.electorate
            return self._reconfigure() if self.partner and self._ready() and self._target <= self._met else ()
        if self.role is not Role.PAIRED or self._change or not self.votes:
            return ()
        electorate = _one_step(self.electorate, self._target & (self._met | self.electorate))
        if electorate == self.electorate:
            return ()
        self.electorate = electorate
        return (self._send_change(),)

    def _reconfigure(self) -> Decisions:
        """Propose a new term with the standby. From the next record on nothing is acknowledged without it."""
        self.role = Role.PAIRED
        self._proposed = Configuration(self._next_term(), self.partner)
        return (self._send_change(),)

    def _send_change(self) -> ConfigChange:
        self.recorded += 1
        self._change = self.recorded
        return ConfigChange(self.recorded, self._proposed, self.electorate)


def _one_step(electorate: frozenset[Elector], target: frozenset[Elector]) -> frozenset[Elector]:
    """The electorate one elector nearer to ``target``: additions come before removals."""
    come, go = sorted(target - electorate), sorted(electorate - target)
    if come:
        return electorate | {come[0]}
    return electorate - {go[0]} if go and len(electorate) > 1 else electorate
