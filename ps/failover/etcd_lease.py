"""Holds the lease of a seat in etcd and carries out the transactions that the seat asks for.

    Seat --Transact--> on_transact() --> etcd --> decided()
         <-- observed() <-- renew, look, several times within a lease

Rules of this file
  1. It decides nothing. One call to etcd is open at a time, on a thread; the seat hears of the replies in order.
  2. An etcd that does not answer is logged, not an error: the seat holds back answers until it is back.
"""

import asyncio
import logging

from torch_ps.common.errors import NameTaken, PsError
from torch_ps.ps.core.failover.leased import LeasedSeat
from torch_ps.ps.core.failover.seat import Transact
from torch_ps.ps.failover.etcd import EtcdClient, Seen
from torch_ps.ps.job.seat_driver import SeatDriver, SeatListener

log = logging.getLogger("torch_ps.ps")

#: Reads of the seat's keys within one lease.
LOOKS = 5
#: Shortest lease that etcd grants, in seconds.
SHORTEST_LEASE = 2


class EtcdLease(SeatListener):
    """One server's lease.

    Args:
        driver: Driver of this server's seat, which is replaced when the server follows another primary.
        ttl: Seconds that a lease lasts.
    """

    def __init__(self, driver: SeatDriver, etcd: EtcdClient, ttl: float) -> None:
        self._driver, self._etcd, self._pause = driver, etcd, ttl / LOOKS
        self._wanted: Transact | None = None
        self._wake = asyncio.Event()
        self._silent = False

    def on_transact(self, transact: Transact) -> None:
        """Try ``transact`` at once; it replaces one that has not been tried yet."""
        self._wanted = transact
        self._wake.set()

    async def hold(self) -> None:
        """Renew the lease, read the keys and try transactions until cancelled.

        Raises:
            NameTaken: This server may not serve; the message says which one does.
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
        """End the lease at once, after the last answer of this server."""
        try:
            await asyncio.to_thread(self._etcd.give_up)
        except PsError as error:
            log.warning("cannot end the lease in etcd, which keeps the seat until it runs out: %s", error)
