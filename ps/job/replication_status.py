"""Whether this server serves its shard, and how far it and its partner are apart: a view for whoever reports it."""

from typing import Protocol


class LagSource(Protocol):
    """A primary."""

    def lag(self) -> tuple[int, float]:
        """Records that the standby has not acknowledged, and seconds that the oldest answer has waited for it."""


class ReplicaSource(Protocol):
    """A standby, or a server that was one."""

    @property
    def closed(self) -> str:
        """Why this server does not serve; "" once it does."""

    def progress(self) -> tuple[int, bool]:
        """Version that every bucket here has reached, and whether all of the shard is here."""


class ReplicationStatus:
    """Reads both sides when asked; holds nothing itself.

    Args:
        primary: This server as a primary.
        standby: This server as a standby; None if it was started as a primary.
    """

    def __init__(self, primary: LagSource, standby: ReplicaSource | None) -> None:
        self._primary, self._standby = primary, standby

    @property
    def closed(self) -> str:
        """Why this process does not serve, "" if it does."""
        return self._standby.closed if self._standby is not None else ""

    def lag(self) -> tuple[int, float]:
        """Records and seconds, see ``LagSource.lag``; zeros without a standby."""
        return self._primary.lag()

    def progress(self) -> tuple[int, bool]:
        """Version and completeness, see ``ReplicaSource.progress``; (0, False) on a server started as a primary."""
        return self._standby.progress() if self._standby is not None else (0, False)
