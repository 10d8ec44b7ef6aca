"""Consistent cut: the version at which all shards copy their state, so that the copies are one state of the job.

A cut is a version V. Every bucket of every shard comes to V, in every mode, one step at a time. Its part of the cut is
its values and its ledger right after that step. The lead plans V ahead and announces it with a roster epoch.

No shard passes V without knowing of it. Pushes carry the newest epoch that their worker has seen, and a shard parks a
push of an epoch that it does not know. When the lead's smallest version is k, every session, live or ended, has at most
one step that another shard has and the lead has not. So without a push that carries the epoch, a synchronous bucket
comes to k + 1 at most, and a bucket of another mode to k + (number of sessions so far). To come to a later V it takes
such a push, which waits until the shard knows of V.

    CutPlanner (lead) --V--> Membership --Announce(roster with cut V)--> Shard --> Cut --> Apply(V) with its record
       ^                                                                                       |
       +---- reported(shard, V) / failed(shard, V) <-- written beside training <---------------+

Rules of this file
  1. There is one cut at a time. The next one is planned when all shards have reported, or one of them has failed.
  2. Further state of the cut is a *section*: an object with ``export`` and ``restore`` of plain JSON data. The lead's
     sections are taken in the call that decides the last of its buckets, except for those that ``note`` was given
     earlier: which samples are done is decided with the first bucket.

Source: consistent cuts, Chandy and Lamport, ACM TOCS 1985; here versions do the work of their markers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Generic, Protocol, TypeVar

from torch_ps.common.errors import ConfigError, ProtocolError

R = TypeVar("R")

#: Seconds from the first report of a cut after which it is given up.
REPORT_SECONDS = 900.0


class Section(Protocol):
    """A part of the core whose state belongs to a cut."""

    def export(self) -> dict[str, Any]:
        """Plain JSON data: dicts with text keys, lists, texts, finite numbers, booleans and None."""

    def restore(self, data: Mapping[str, Any]) -> None:
        """Become what ``export`` described, before any other call.

        Raises:
            KeyError, TypeError, ValueError: ``data`` is not what ``export`` gives.
        """


class Sections:
    """The sections of one process by name, and restored state for sections that are added later."""

    def __init__(self) -> None:
        self._of: dict[str, Section] = {}
        self._restored: dict[str, Mapping[str, Any]] = {}

    def add(self, name: str, section: Section) -> None:
        """Have ``section`` in every cut from now on. Its restored state, if there is any, is given to it now."""
        self._of[name] = section
        if name in self._restored:
            section.restore(self._restored.pop(name))

    def export(self) -> dict[str, Any]:
        """State of all sections by name; restored state that waits for its section is passed on as it is."""
        return {**self._restored, **{name: section.export() for name, section in self._of.items()}}

    def restore(self, data: Mapping[str, Mapping[str, Any]]) -> None:
        """Give each section its state, now or when it is added."""
        self._restored = dict(data)
        for name in [name for name in self._of if name in data]:
            self._of[name].restore(self._restored.pop(name))


class Cut:
    """One shard's part of a cut: the version that is copied next, and what belongs to it.

    Args:
        num_buckets: number of buckets of this shard.
        sections: sections of this process, which are taken with the last bucket.
    """

    def __init__(self, num_buckets: int, sections: Sections | None = None) -> None:
        self._num_buckets, self._sections = num_buckets, sections or Sections()
        #: Version that is copied next; 0 plans none.
        self.version = 0
        self._recorded = 0
        self._noted: dict[str, dict[str, Any]] = {}
        #: Version and sections of the last cut that all buckets have passed.
        self.taken: tuple[int, dict[str, Any]] = (0, {})
        #: Version that a bucket had passed before it was planned, in the process whose place this one has taken.
        self.missed = 0

    def plan(self, version: int, newest: int = 0) -> None:
        """Copy at ``version`` instead of the version planned before; 0 plans none.

        Args:
            newest: version of the bucket that has come farthest.
        """
        if version != self.version:
            self.version, self._recorded, self._noted = version, 0, {}
            self.missed = version if version <= newest else 0

    def passes(self, version: int) -> bool:
        """Whether a bucket that has come to ``version`` is to be copied; each bucket asks once per version."""
        if version != self.version:
            return False
        self._recorded += 1
        if self._recorded == self._num_buckets:
            self.taken = version, {**self._sections.export(), **self._noted}
        return True

    def note(self, name: str, state: dict[str, Any]) -> None:
        """Take the section ``name`` with the bucket that is passing the cut now, not with the last one."""
        self._noted[name] = state
        if self._recorded == self._num_buckets:
            self.taken = self.version, {**self.taken[1], name: state}

    def rest(self, version: int) -> None:
        """Take a job that stands still, with all buckets at ``version``, for a cut."""
        self.taken = version, self._sections.export()


class CutPlanner(Generic[R]):
    """The lead's part of cuts: when the next one is, and whether the last one is whole.

    Args:
        every: number of versions between two cuts; 0 where ``seconds`` decide.
        seconds: seconds between two cuts; 0 where ``every`` decides.
        num_shards: number of shards that report each cut.
        now: time of the start, from which ``seconds`` count.

    Raises:
        ConfigError: ``every`` and ``seconds`` are both given, or neither, or one is negative.
    """

    def __init__(self, *, every: int, seconds: float, num_shards: int, now: float) -> None:
        if every < 0 or seconds < 0 or bool(every) == bool(seconds):
            raise ConfigError(f"a checkpoint is due every N steps or every S seconds; got {every} and {seconds}")
        self._every, self._seconds, self._num_shards = every, seconds, num_shards
        self._last, self._first_report = now, now
        self._version = 0  # of the cut that is planned and not over
        self._given_up = 0  # newest version that was planned and will not be whole
        self._reports: dict[int, R] = {}
        self._early: dict[int, tuple[int, R]] = {}  # per shard, the last report of a version that is not planned

    def due(self, now: float, open_step: int, num_sessions: int, *, stale: bool) -> int | None:
        """The version to announce now; None where nothing is to be announced.

        Args:
            open_step: smallest version of a bucket of the lead.
            num_sessions: number of sessions so far, see ``Membership.num_sessions``.
            stale: whether pushes are applied one by one, see ``Mode.stale``.
        """
        if self._version and self._reports and now - self._first_report > REPORT_SECONDS:
            self._give_up(now)
        if self._version or now - self._last < self._seconds:
            return None
        first = open_step + max(num_sessions + 1 if stale else 2, 2)
        self._version = -(-first // self._every) * self._every if self._every else first
        return self._version

    def reported(self, shard: int, version: int, report: R, now: float) -> tuple[R, ...] | None:
        """Take the report of a shard that has written its part.

        Returns:
            The reports of all shards in order when this was the last one; else None.

        Raises:
            ProtocolError: there is no such shard.
        """
        self._check(shard)
        if version != self._version:
            self._early[shard] = version, report  # the shard was told to stop before the lead, or it is given up
            return None
        self._first_report = self._first_report if self._reports else now
        self._reports[shard] = report
        if len(self._reports) < self._num_shards:
            return None
        whole = tuple(self._reports[each] for each in range(self._num_shards))
        self._over(now)
        return whole

    def failed(self, shard: int, version: int, now: float) -> bool:
        """Give up a cut of which a shard could not write its part.

        Returns:
            Whether it is given up now: False where it was given up before, or this shard has written its part.

        Raises:
            ProtocolError: there is no such shard.
        """
        self._check(shard)
        if version != self._version or shard in self._reports:
            return False
        self._give_up(now)
        return True

    def gave_up(self, version: int) -> bool:
        """Whether parts of ``version`` are of no use any more. Parts of a later version may be of the last cut."""
        return version <= self._given_up

    def awaits_others(self, shard: int, version: int) -> bool:
        """Whether ``version`` is the cut under way and ``shard`` has reported its part, so that others are missing."""
        return version == self._version and shard in self._reports

    def last(self, shard: int, version: int) -> None:
        """Expect reports of ``version``, at which the job stands still, in place of any other.

        Args:
            shard: number of the shard that writes its part anew, so that an earlier report of it no longer holds.
            version: version of all buckets.
        """
        if version != self._version:
            early = {each: report for each, (told, report) in self._early.items() if told == version}
            self._version, self._reports = version, early
        self._reports.pop(shard, None)

    def _give_up(self, now: float) -> None:
        self._given_up = self._version
        self._over(now)

    def _over(self, now: float) -> None:
        self._version, self._reports, self._last = 0, {}, now

    def _check(self, shard: int) -> None:
        if not 0 <= shard < self._num_shards:
            raise ProtocolError(f"shard must be in [0, {self._num_shards}); got {shard}")
