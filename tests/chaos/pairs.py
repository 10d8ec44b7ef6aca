"""The servers of a job whose shards have standbys, some of which die or stand still.

    primary dies --workers--> its standby serves --settle--> a standby of that one, in the place of the dead server

Rules of this file
  1. Two places per shard: a server that is started again listens where the dead one did, so that proxies lead to it.
  2. Mending is what a user would do: whoever has died is started again as the standby of the one that serves.
"""

import contextlib
import signal
import time
from collections.abc import Iterator
from typing import Any

from tests.support.processes import Child
from tests.support.replicated import Replicated, Server, running
from torch_ps.common.pb import parameter_server_pb2 as pb

#: Seconds in which a server has to say how it is; one that was stopped never does.
ANSWER_SECONDS = 2.0


class Pairs(Replicated):
    """``primaries`` and ``standbys`` are as they were when ``settle`` returned last."""

    def __str__(self) -> str:
        return ",".join("|".join(places) for places in self.places)

    def start(self) -> None:
        super().start()
        #: Addresses of the two servers of each shard.
        self.places = [[p.address, s.address] for p, s in zip(self.primaries, self.standbys, strict=True)]

    @property
    def processes(self) -> list[Child]:
        """All that live."""
        return [each.process for each in self.primaries + self.standbys if each.process.wait(0) is None]

    def status(self, server: Server | None = None, seconds: float = ANSWER_SECONDS) -> pb.StatusReply:
        """Status of a server; None: the server that serves shard 0."""
        return super().status(server or self._serving(0), seconds)

    def settle(self, seconds: float) -> None:
        """Have every shard with a primary and a standby again, ``seconds`` for each.

        Raises:
            AssertionError: nobody serves a shard, or a server has ended that should not have.
        """
        for shard in range(len(self.places)):
            deadline = time.monotonic() + seconds
            while not self._settled(shard):
                roles = [self.role(each) for each in (self.primaries[shard], self.standbys[shard])]
                assert time.monotonic() < deadline, f"shard {shard} has no pair after {seconds:g} s: {roles}"
                time.sleep(0.02)

    def _settled(self, shard: int) -> bool:
        one, other = self.primaries[shard], self.standbys[shard]
        for dead, alive in ((one, other), (other, one)):
            if (code := dead.process.wait(0)) is None:
                continue
            said = dead.process.output
            deposed = code == 1 and "was taken for dead and has acknowledged nothing" in said
            assert code == -signal.SIGKILL or deposed, f"a server ended with {code}:\n{said[-3000:]}"
            if self.role(alive) != "alone":
                return False
            self.primaries[shard] = alive
            self.standbys[shard] = self.server(standby_of=alive.address, listen=dead.address)
            return False
        if self.role(other) == "paired":
            self.primaries[shard], self.standbys[shard] = other, one
        return self.role(self.primaries[shard]) == "paired"

    def _serving(self, shard: int) -> Server:
        """The one that is no standby, if one answers."""
        one, other = self.primaries[shard], self.standbys[shard]
        return other if self.role(other) in ("alone", "paired") else one


@contextlib.contextmanager
def pairs(count: int, **settings: Any) -> Iterator[Pairs]:
    """Running servers, ended with SIGTERM on leaving; ``settings`` are options of ``ServerConfig``."""
    with running(lambda folder: Pairs(folder, count, settings, {})) as servers:
        yield servers
        servers.stop(*servers.standbys)
        servers.stop(*servers.primaries)
