"""Who is meant to serve a shard: terms, configurations, and what a worker says when it is asked for its vote.

Rules of this file
  1. Plain facts that servers and workers exchange. Who decides what is the business of ``ps/core/failover/seat.py`` on
     a server and of ``worker/transport/acceptor.py`` on a worker.
  2. A server's name is that of one life of one process. A server that is started again has another name, so nothing
     that was promised to, or acknowledged by, a life of before counts for it.
  3. A term belongs to one server, whose name it carries: two servers never have the same, however they number them.

Term 0 is that of a job whose servers never had a standby: nobody else can serve, so there is nothing to promise.

Source: terms are the ballots of Paxos (Lamport, 1998).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Term:
    """Numbers who is meant to serve; ordered by number, then by server.

    Attributes:
        number: >= 0.
        server: the primary, ``ADDRESS/RANDOM``.
    """

    number: int = 0
    server: str = ""

    def __str__(self) -> str:
        return f"term {self.number} of {self.server}"


@dataclass(frozen=True, slots=True)
class Configuration:
    """Who serves in a term.

    Attributes:
        standby: the server without whose receipt the primary acknowledges nothing; "" is none: the primary is alone.
    """

    term: Term = Term()
    standby: str = ""

    @property
    def primary(self) -> str:
        return self.term.server

    def __str__(self) -> str:
        return f"{self.primary} with standby {self.standby}" if self.standby else f"{self.primary} alone"


@dataclass(frozen=True, slots=True)
class Vote:
    """A worker's answer to a server that asks for its vote.

    Attributes:
        term: that was asked for.
        granted: the worker keeps to this term now; False: it does not, see ``promised`` and ``served``.
        promised: highest term that this worker keeps to.
        served: newest configuration that it knows to be in force.
    """

    term: Term
    granted: bool
    promised: Term
    served: Configuration
