"""Terms, configurations and votes: which server of a shard serves, and a worker's answer to a request for its vote.

Rules of this file
  1. Plain values that servers and workers exchange. ``ps/core/failover/seat.py`` decides for a server,
     ``worker/transport/paxos_acceptor.py`` for a worker.
  2. A server's name stands for one process. A restarted server has another name, so promises to and acknowledgements of
     the former process do not count for it.
  3. A term carries the name of its server, so two servers never have the same term, whatever numbers they choose.

Term 0 is that of a job whose servers never had a standby: no other server can serve, so workers promise nothing.

Source: terms are the ballots of Paxos, Lamport, 1998.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Term:
    """A period in which one server is the primary; ordered by number, then by server.

    Attributes:
        number: number of the term, >= 0.
        server: name of the primary, ``ADDRESS/RANDOM``.
    """

    number: int = 0
    server: str = ""

    def __str__(self) -> str:
        return f"term {self.number} of {self.server}"


@dataclass(frozen=True, slots=True)
class Configuration:
    """The primary of a term and its standby.

    Attributes:
        term: term, which names the primary.
        standby: server whose receipt the primary needs before it acknowledges a push; "" if it serves alone.
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
        term: term that the server asked for.
        granted: whether the worker promises the term; if not, ``promised`` and ``served`` say why.
        promised: highest term that this worker has promised.
        served: newest configuration that the worker knows to be in force.
    """

    term: Term
    granted: bool
    promised: Term
    served: Configuration
