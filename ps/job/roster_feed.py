"""The roster in force on one shard, and the callers of WatchRoster, who get every new one."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch_ps.common.errors import Overloaded, PsError
from torch_ps.common.wire.terms import Configuration
from torch_ps.ps.core.roster import Roster
from torch_ps.ps.job.seat_driver import SeatListener
from torch_ps.ps.observability.shard_metrics import Metrics
from torch_ps.ps.transport.streams import RosterQueue


class RosterFeed(SeatListener):
    """Holds the roster in force. All methods run on the event loop.

    Args:
        most: Largest number of watchers at a time.

    Attributes:
        roster: The roster in force.
        end: The error that the streams of watchers end with; None while the server runs.
        ended_well: Whether the server was told to stop, and no other one goes on in its place.
    """

    def __init__(self, metrics: Metrics, most: int) -> None:
        self.roster = Roster()
        self._metrics, self._most = metrics, most
        self._watchers: set[RosterQueue] = set()
        self.end: PsError | None = None
        self.ended_well = False

    def publish(self, roster: Roster) -> None:
        """Put ``roster`` in force and send it to every watcher."""
        self.roster = roster
        self._metrics.roster.set(len(roster.members))
        self._metrics.epoch.set(roster.epoch)
        self._send(roster)

    def on_configuration(self, configuration: Configuration) -> None:
        """Send the roster again: watchers learn with it which servers the lead now has."""
        self._send(self.roster)

    @contextmanager
    def watch(self) -> Iterator[RosterQueue]:
        """Register a watcher, whose queue begins with the roster in force and ends with None.

        Raises:
            Overloaded: There are as many watchers as are allowed.
        """
        if len(self._watchers) >= self._most:
            raise Overloaded(f"{len(self._watchers)} callers watch the roster already; try again later")
        queue = RosterQueue()
        queue.put_nowait(self.roster)
        self._watchers.add(queue)
        try:
            yield queue
        finally:
            self._watchers.discard(queue)

    def stop(self, error: PsError, *, well: bool) -> None:
        """End the queue of every watcher; ``end`` says why."""
        self.end, self.ended_well = error, well
        self._send(None)

    def _send(self, item: Roster | None) -> None:
        for queue in self._watchers:
            queue.put_nowait(item)
