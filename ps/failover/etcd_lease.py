"""A seat in etcd is looked at, held and asked for, beside everything else that a server does.

    Seat --Transact--> want() --> etcd --> decided()
         <-- observed() <-- renew, look, several times within a lease

Rules of this file
  1. Decides nothing. One call of etcd is under way at a time, on a thread; what it says is told to the seat in order.
  2. That etcd does not answer is logged and not the end: what is held back then is held back by the seat.
"""

import asyncio
import logging

from torch_ps.common.errors import NameTaken, PsError
from torch_ps.ps.core.failover.leased import LeasedSeat
from torch_ps.ps.core.failover.seat import Transact
from torch_ps.ps.failover.etcd import EtcdClient, Seen
from torch_ps.ps.job.seat_driver import SeatDriver

log = logging.getLogger("torch_ps.ps")

#: Looks at the seat within one lease.
LOOKS = 5
#: Seconds; etcd gives none that is shorter.
SHORTEST_LEASE = 2


class EtcdLease:
    """One server's hold of a seat.

    Args:
        seat_driver: of this server; its seat comes to be another one when it follows anew.
        ttl: seconds that a lease lasts.
    """

    def __init__(self, seat_driver: SeatDriver, etcd: EtcdClient, ttl: float) -> None:
        self._driver, self._etcd, self._pause = seat_driver, etcd, ttl / LOOKS
        self._wanted: Transact | None = None
        self._wake = asyncio.Event()
        self._silent = False

    def want(self, transact: Transact) -> None:
        """Try this at once; only the last one counts."""
        self._wanted = transact
        self._wake.set()

    async def keep(self) -> None:
        """Hold, look and ask until cancelled.

        Raises:
            NameTaken: this server may not serve; says who does.
        """
        while True:
            await self._turn()
            try:
                await asyncio.wait_for(self._wake.wait(), self._pause)
            except TimeoutError:
                continue

    async def _turn(self) -> None:
        self._wake.clear()
        wanted, self._wanted = self._wanted, None
        try:
            if wanted is not None:
                await self._try(wanted)
            else:
                await self._look()
        except NameTaken:
            raise
        except PsError as error:
            if not self._silent:
                log.warning("%s; trying again", error)
            self._silent = True
            return
        if self._silent:
            log.warning("etcd answers again")
        self._silent = False

    async def _look(self) -> None:
        seat = self._seat
        seen, until = await asyncio.to_thread(self._renew_and_look)
        if seat is self._seat:
            self._driver.obey(seat.observed(*seen, until))

    def _renew_and_look(self) -> tuple[Seen, float]:
        self._etcd.renew()
        return self._etcd.look(), self._etcd.until

    async def _try(self, wanted: Transact) -> None:
        seat = self._seat
        revision = await asyncio.to_thread(self._etcd.transact, wanted, seat.me)
        if revision and seat is self._seat:
            self._driver.obey(seat.decided(wanted, revision, self._etcd.until))

    @property
    def _seat(self) -> LeasedSeat:
        seat = self._driver.seat
        if not isinstance(seat, LeasedSeat):
            raise TypeError(f"{type(seat).__name__} is not held in etcd")
        return seat

    async def give_up(self) -> None:
        """Let go of the seat at once, when this server has said its last."""
        try:
            await asyncio.to_thread(self._etcd.give_up)
        except PsError as error:
            log.warning("the seat is held until its lease runs out: %s", error)
