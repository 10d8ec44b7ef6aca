"""A seat in etcd is looked at, held and asked for, beside everything else that a server does.

    Seat --Transact--> want() --> etcd --> decided()
         <-- observed() <-- renew, look, several times within a lease

Rules of this file
  1. Decides nothing. One call of etcd is under way at a time, on a thread; what it says is told to the seat in order.
  2. That etcd does not answer is logged and not the end: what is held back then is held back by the seat.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable

from torch_ps.common.errors import PsError
from torch_ps.ps.core.succession import Decision, Transact
from torch_ps.ps.core.tenure import LeasedSeat
from torch_ps.ps.etcd import Etcd, Seen, clock

log = logging.getLogger("torch_ps.ps")

#: Looks at the seat within one lease.
LOOKS = 5


class Tenure:
    """One server's hold of a seat.

    Args:
        seat: of this server, which may come to be another one when it follows anew.
        obey: carries out what the seat decides; calls ``want`` for a ``Transact``.
        ttl: seconds that a lease lasts.
    """

    def __init__(
        self, seat: Callable[[], LeasedSeat], etcd: Etcd, obey: Callable[[Iterable[Decision]], object], ttl: float
    ) -> None:
        self._seat, self._etcd, self._obey, self._pause = seat, etcd, obey, ttl / LOOKS
        self._wanted: tuple[LeasedSeat, Transact] | None = None
        self._wake = asyncio.Event()
        self._silent = False

    def want(self, transact: Transact) -> None:
        """Try this at once; only the last one counts."""
        self._wanted = self._seat(), transact
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
                await self._try(*wanted)
            else:
                await self._look()
        except PsError as error:
            if not self._silent:
                log.warning("%s; trying again", error)
            self._silent = True
            return
        if self._silent:
            log.warning("etcd answers again")
        self._silent = False

    async def _look(self) -> None:
        seat = self._seat()
        seen, until = await asyncio.to_thread(self._renew_and_look)
        if seat is self._seat():
            self._obey(seat.at(clock()).observed(*seen, until))

    def _renew_and_look(self) -> tuple[Seen, float]:
        self._etcd.renew()
        return self._etcd.look(), self._etcd.until

    async def _try(self, seat: LeasedSeat, wanted: Transact) -> None:
        revision = await asyncio.to_thread(self._etcd.transact, wanted, seat.me)
        if revision and seat is self._seat():
            self._obey(seat.at(clock()).decided(wanted, revision, self._etcd.until))
