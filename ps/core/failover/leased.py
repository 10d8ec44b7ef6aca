"""Leased seat: the right to serve is a key in etcd, held under a lease. Workers do not vote.

    etcd:  configuration   written by transactions only, each of which names the revision that it replaces
           holder          the primary's name; goes away with its lease

    look --> observed(holder gone, this standby is the configuration's) --> Transact --> decided(True) --> alone
    lost --> Transact(alone) --> decided(True) --> alone

Rules of this file
  1. Of two servers that want to replace the same configuration one succeeds: its transaction changes the revision.
  2. A standby takes over only from a configuration that names it and that it has the record of, and only when the lease
     of the holder has run out. A server that starts takes the seat only when nobody holds it and there is no standby.
  3. Nothing is acknowledged when this server's lease may have run out, by its own clock and counted from before the
     renewal was sent. So even a job that is started again elsewhere has one server that acknowledges.
  4. The next look shows what became of a transaction whose answer was lost.

Source: Gray and Cheriton, SOSP 1989, for leases; the documentation of etcd for transactions and revisions.
"""

from __future__ import annotations

import math
from typing import Self

from torch_ps.common.errors import NameTaken
from torch_ps.common.wire.terms import Configuration
from torch_ps.ps.core.failover.seat import Decisions, Role, Seat, Transact


class LeasedSeat(Seat):
    """A right to serve that is a key in etcd.

    A server that starts the job begins as ASKING: it acknowledges nothing before the seat is its own.
    """

    lapses = True
    votes = False

    def __init__(self, me: str, primary: str = "") -> None:
        super().__init__(me, primary)
        if not primary:
            self.role = Role.ASKING
        self._now = -math.inf
        self._until = -math.inf  # this server's lease holds until then at least
        self._due = 0  # may be acknowledged once it is known to hold
        self._revision = 0  # of the configuration, when it was last looked at

    def at(self, now: float) -> Self:
        self._now = now
        return self

    def observed(self, revision: int, configuration: Configuration | None, holder: str, until: float) -> Decisions:
        """Take what etcd holds. The shell looks several times within a lease.

        Args:
            revision: revision at which the configuration was last written.
            configuration: newest configuration; None where none was written.
            holder: server that holds the seat; "" is nobody.
            until: time until which this server's lease holds at least, in seconds of its own clock.

        Raises:
            NameTaken: this server was started and may not serve; the message says who does, or may.
        """
        self._until, self._revision = until if holder == self.me else -math.inf, revision
        if self.role is Role.DEPOSED:
            return ()
        if configuration is not None:
            self._hear(configuration.term)
        if self._starts and (configuration is None or configuration.primary != self.me):
            return self._start(configuration, holder)
        if configuration is None or (self._follows and not self.configuration.term.number):
            return ()  # the key has been deleted by hand; or this standby has not been taken in yet
        if stopped := self.refused(configuration, serving=True):
            return stopped
        if self._is_done(configuration) and holder == self.me:
            return self._done(configuration)
        if self._follows:
            self.role = Role.STANDBY
            return self._claim() if configuration == self.configuration and not holder else ()
        if holder not in ("", self.me):
            return ()
        if self.role is Role.ASKING:
            return self._claim()
        if self.role is Role.PAIRED and not self._change and self._proposed.term > configuration.term:
            return self._write(holder, self._proposed)
        if not holder:  # our lease had run out, and nobody has come meanwhile
            return self._write("", configuration)
        return self._settle(self._due)

    def decided(self, transact: Transact, revision: int, until: float) -> Decisions:
        """Take a transaction that is done. One that is not, or of which nothing is known, shows at the next look.

        Args:
            revision: revision that the transaction has written.
            until: time until which this server's lease holds at least, in seconds of its own clock.
        """
        self._until, self._revision = until, revision
        return self._done(transact.configuration) if self._is_done(transact.configuration) else ()

    def tick(self, now: float) -> Decisions:
        return ()

    # -------------------------------------------------------------- inside

    @property
    def _starts(self) -> bool:
        return self.role is Role.ASKING and not self._follows and not self.configuration.term.number

    def _start(self, configuration: Configuration | None, holder: str) -> Decisions:
        if configuration is not None and holder:
            raise NameTaken(f"{holder} serves in {configuration.term}; start this server with --standby-of its address")
        if configuration is not None and configuration.standby:
            raise NameTaken(
                f"{configuration.standby} has all that {configuration.primary} has acknowledged and may take over; "
                "start this server with --standby-of its address, or delete the key in etcd if both are lost"
            )
        return self._write("", Configuration(self._next_term()))

    def _claim(self) -> Decisions:
        self.role = Role.ASKING
        return self._write("" if self._follows else self._held_by, Configuration(self._next_term()))

    @property
    def _held_by(self) -> str:
        return self.me if self._until > -math.inf else ""

    def _write(self, holder: str, configuration: Configuration) -> Decisions:
        return (Transact(self._revision, holder, configuration),)

    def _is_done(self, configuration: Configuration) -> bool:
        """Whether etcd has a configuration that this server wants and has not adopted yet."""
        if configuration.primary != self.me or configuration.term <= self.configuration.term:
            return False
        return not configuration.standby or (self.role is Role.PAIRED and not self._change)

    def _done(self, configuration: Configuration) -> Decisions:
        if configuration.standby:
            self._proposed = configuration
            return (self._send_change(),)
        self.configuration = configuration
        return self._won("the lease of its primary has run out" if self._follows else "the seat is its own")

    def _reconfigure(self) -> Decisions:
        self.role = Role.PAIRED
        self._proposed = Configuration(self._next_term(), self.partner)
        return self._write(self._held_by, self._proposed)

    def _ready(self) -> bool:
        return True

    def _settle(self, number: int) -> Decisions:
        self._due = max(self._due, number)
        return super()._settle(self._due) if self._now < self._until else ()
