"""What a worker keeps to while servers change: one ``Promises`` per shard, for as long as the process lives.

Rules of this file
  1. Sans-IO. Nothing here is ever taken back, also not when the worker joins again; a new process begins without any.
  2. A vote is for a term at least as high as every one before, and for a server whose configuration is at least as new
     as the newest that this worker has accepted. So a server that has missed something is not voted for by those who
     took part in it.
  3. A worker speaks to (pushes to, takes answers from) no server of a lower term than it has promised, except to the
     one that it has promised it.

Source: the acceptor of Paxos, with the restriction on votes of Raft, section 5.4.1.
"""

from __future__ import annotations

from torch_ps.common.wire.terms import Configuration, Term, Vote


class Acceptor:
    """What one worker has promised about one shard."""

    def __init__(self) -> None:
        self.promised = Term()  # highest term that it keeps to
        self.accepted = Configuration()  # newest one that it has accepted, in force or about to be
        self.served = Configuration()  # newest one that it knows to be in force

    def vote(self, term: Term, base: Term) -> Vote:
        """Answer a server that asks for a vote.

        Args:
            term: that it wants to serve in.
            base: of the configuration that it has the state of.
        """
        if term < self.promised or base < self.accepted.term:
            return self.refusal(term)
        self.promised = term
        return Vote(term, True, term, self.served)

    def refusal(self, term: Term) -> Vote:
        """What to answer a server whose term is not kept to: it learns of the higher one, and takes a higher still."""
        return Vote(term, False, self.promised, self.served)

    def accept(self, configuration: Configuration) -> bool:
        """A server has been given the votes; False: answer with ``refusal``, as a higher term has been promised."""
        if configuration.term < self.promised:
            return False
        self.promised, self.accepted = configuration.term, configuration
        return True

    def learn(self, configuration: Configuration) -> bool:
        """A server says that this configuration is in force; whether to speak to it."""
        if configuration.term > self.served.term:
            self.served = configuration
            self.accept(configuration)
        return self.may_speak(configuration.term)

    def may_speak(self, term: Term) -> bool:
        """Whether to speak to a server that serves in ``term``."""
        return term >= self.promised or term.server == self.promised.server or self.promised.number == 0
