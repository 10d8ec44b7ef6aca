"""What a worker has promised the servers of one shard: one ``Acceptor`` per shard, for as long as the process lives.

Rules of this file
  1. Sans-IO. No promise is ever taken back, also not when the worker joins again; a new process begins without any.
  2. The worker votes for a term at least as high as every one before, and for a server whose configuration is at least
     as new as the newest that the worker has accepted. So a server that has missed a configuration gets no votes from
     the workers that took part in it.
  3. The worker pushes to, and takes answers from, no server of a lower term than it has promised, except the server
     that it has promised the term to.

Source: the acceptor of Paxos, with the restriction on votes of Raft, section 5.4.1.
"""

from __future__ import annotations

from torch_ps.common.wire.terms import Configuration, Term, Vote


class Acceptor:
    """The promises of one worker about one shard.

    Attributes:
        promised: highest term that the worker has promised to keep to.
        accepted: newest configuration that the worker has accepted, in force or about to be.
        served: newest configuration that the worker knows to be in force.
    """

    def __init__(self) -> None:
        self.promised = Term()
        self.accepted = Configuration()
        self.served = Configuration()

    def vote(self, term: Term, base: Term) -> Vote:
        """Answer a server that asks for a vote.

        Args:
            term: term that the server wants to serve in.
            base: term of the configuration whose state the server has.
        """
        if term < self.promised or base < self.accepted.term:
            return self.refusal(term)
        self.promised = term
        return Vote(term, True, term, self.served)

    def refusal(self, term: Term) -> Vote:
        """The answer to a server whose ``term`` is too low. It tells the promised term, so the server asks for more."""
        return Vote(term, False, self.promised, self.served)

    def accept(self, configuration: Configuration) -> bool:
        """Accept the configuration of a server that has won the votes.

        Returns:
            False if a higher term has been promised; answer with ``refusal`` then.
        """
        if configuration.term < self.promised:
            return False
        self.promised, self.accepted = configuration.term, configuration
        return True

    def learn(self, configuration: Configuration) -> bool:
        """Note that a server says that ``configuration`` is in force.

        Returns:
            Whether the worker may speak to that server.
        """
        if configuration.term > self.served.term:
            self.served = configuration
            self.accept(configuration)
        return self.may_speak(configuration.term)

    def may_speak(self, term: Term) -> bool:
        """Whether the worker may speak to a server that serves in ``term``."""
        return term >= self.promised or term.server == self.promised.server or self.promised.number == 0
