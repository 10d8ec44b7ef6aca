"""Whether a job goes on from any state, once messages arrive and time passes.

Rules of this file
  1. What a dead server has said does not arrive any more: its connections are gone.
  2. A worker asks a standby to take over only while the primary is gone.
"""

from __future__ import annotations

from collections.abc import Iterable

from tests.support.explore import bits
from tests.support.seats import Server
from tests.support.shard import NAMES, State, World
from torch_ps.ps.core.failover.seat import Role


class Calm(World):
    """A world that comes to rest."""

    def crashed(self, state: State, *, servers: Iterable[int] = (), workers: Iterable[int] = ()) -> State:
        for i in servers:
            state = self.server(state, 0, i, ("crash",))[1]
        for i in workers:
            state = self.worker(state, 0, i, ("crash",))[1]
        return state

    def able(self, state: State) -> bool:
        """Whether the job should go on: a server lives that may, with a majority that would let it if it asks."""
        workers = [w for w in map(self.workers.__getitem__, state.workers) if w.up]
        for server in map(self.servers.__getitem__, state.servers):
            seat = server.seat
            if not server.up or (seat.follows and seat.configuration.standby != seat.me and not seat._claimed):
                continue
            would = {w.elector for w in workers if w.acceptor.accepted.term <= seat.configuration.term}
            if seat.role is Role.ALONE or 2 * len(would & seat.electorate) > len(seat.electorate):
                return True
        return False

    def goes_on(self, state: State, net: int, rounds: int = 12) -> bool:
        """Whether a record is acknowledged that is made after all messages arrive and time passes, ``rounds`` times."""
        self._terms, terms = 1 << 30, self._terms
        net = self._of_the_living(state, net)
        try:
            for _ in range(rounds):
                state, net = self._calm(state, net)
                for i, number in enumerate(state.servers):
                    server = self.servers[number]
                    if server.up and not server.seat.follows and self._spoken_to(state, server):
                        _, after, sent, _ = self.server(state, net, i, ("record",))
                        made = self.servers[after.servers[i]].seat.recorded
                        after, _ = self._calm(after, sent)
                        if self.servers[after.servers[i]].seat.safe >= made:
                            return True
            return False
        finally:
            self._terms = terms

    def _of_the_living(self, state: State, net: int) -> int:
        """Without what dead servers have said: it was under way on connections that are no more."""
        dead = [name for name, number in zip(NAMES, state.servers, strict=False) if not self.servers[number].up]
        for number in bits(net):
            _, event = self.events.values[number]
            if event[0] in ("ask", "declare", "introduce", "receipt", "received") and event[1] in dead:
                net &= ~(1 << number)
        return net

    def _spoken_to(self, state: State, server: Server) -> bool:
        workers = (w for w in map(self.workers.__getitem__, state.workers) if w.up)
        return all(w.acceptor.may_speak(server.seat.configuration.term) for w in workers)

    def _calm(self, state: State, net: int) -> tuple[State, int]:
        """Everybody who lives hears everything; whoever misses somebody notices; a second passes."""
        for i, number in enumerate(state.servers):
            seat = self.servers[number].seat
            other = state.servers[NAMES.index(seat.partner)] if seat.partner else number
            gone = not self.servers[other].up or self.servers[other].seat._claimed
            if self.servers[number].up and not seat.follows and gone:
                _, state, net, _ = self.server(state, net, i, ("lost", seat.partner))
            for worker in map(self.workers.__getitem__, state.workers):
                if not worker.up or not self.servers[state.servers[i]].up:
                    continue
                if seat.follows and gone and seat.me in worker.knows:
                    _, state, net, _ = self.server(state, net, i, ("asked", worker.elector, 0.0))
                elif not seat.follows and not worker.acceptor.may_speak(seat.configuration.term):
                    _, state, net, _ = self.server(state, net, i, ("promised", worker.acceptor.promised))
            if self.servers[state.servers[i]].up:
                _, state, net, _ = self.server(state, net, i, ("tick", 0.0))
        before = None
        while before != (state, net):
            before = state, net
            for number in bits(net):
                to, event = self.events.values[number]
                for i, each in enumerate(state.servers):
                    if to == NAMES[i] and self.servers[each].up:
                        _, state, net, _ = self.server(state, net, i, event, number)
                for i, each in enumerate(state.workers):
                    if not to and event[0] in ("ask", "declare", "introduce") and self.workers[each].up:
                        _, state, net, _ = self.worker(state, net, i, event, number)
        return state, net
