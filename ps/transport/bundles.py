"""Connections of the data port that carry one stream together: waits until all of a bundle are there, then serves it.

    connection 0 --proved--> serve --.
    connection 1 --proved--> serve --+--> all here: striped, READY --> Exchange, on the task of connection 0
    connection 2 --proved--> serve --'                                    '--ended--> all are closed

Rules of this file
  1. A bundle is complete within ``SECONDS`` or ends, and a connection that does not fit into one ends alone.
  2. Each connection is held by a task of its own, so each counts where connections are counted.

Source: see ``torch_ps.common.wire.striped_socket``.
"""

import asyncio
import contextlib

from torch_ps.common.wire.port_proof import READY, Place
from torch_ps.ps.transport.carrier import Serve
from torch_ps.ps.transport.socket_carrier import SocketCarrier

#: Seconds in which the connections of one stream have to be there.
SECONDS = 10.0


class Bundles:
    """The bundles of one data port, by group.

    Args:
        exchange: Handler of an Exchange; ends the carrier with the error, if there is one.
    """

    def __init__(self, exchange: Serve) -> None:
        self._exchange = exchange
        self._bundles: dict[bytes, _Bundle] = {}

    async def serve(self, carrier: SocketCarrier, place: Place) -> None:
        """Serve the stream that this connection is a part of, until it ends."""
        if place.count == 1:
            return await self._exchange(carrier)
        bundle = self._bundles.setdefault(place.group, _Bundle(place.count))
        if not bundle.takes(place):
            return None
        try:
            bundle.add(carrier, place)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(SECONDS):
                    await bundle.changed.wait()
            if bundle.ended.is_set() or not bundle.complete:
                return None
            if place.number:
                await bundle.ended.wait()
                return None
            striped = False
            with contextlib.suppress(OSError):
                striped = await carrier.stripe([bundle.carriers[number] for number in range(1, place.count)], READY)
            if striped:
                await self._exchange(carrier)
        finally:
            bundle.end()
            if self._bundles.get(place.group) is bundle:
                del self._bundles[place.group]


class _Bundle:
    """The connections of one stream.

    Args:
        count: Number of connections that it has when it is complete.

    Attributes:
        carriers: One for each connection that is there, by place.
        changed: Set when all are there, or the bundle has ended.
        ended: Set when it has ended.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self.carriers: dict[int, SocketCarrier] = {}
        self.changed, self.ended = asyncio.Event(), asyncio.Event()

    @property
    def complete(self) -> bool:
        return len(self.carriers) == self._count

    def takes(self, place: Place) -> bool:
        """Whether a connection with this place is one that is still missing."""
        return place.count == self._count and place.number not in self.carriers and not self.ended.is_set()

    def add(self, carrier: SocketCarrier, place: Place) -> None:
        self.carriers[place.number] = carrier
        if self.complete:
            self.changed.set()

    def end(self) -> None:
        self.ended.set()
        self.changed.set()
