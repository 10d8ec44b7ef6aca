"""Ledger of one bucket: what has been applied, so that nothing is applied twice and nothing acknowledged is forgotten.

Rules of this file
  1. Only a decided ``Apply`` advances the version. The call that decides, to apply a push or to refuse it for good,
     writes its entry.
  2. There is one entry per live worker: its session and the last step of it that was decided. The steps of a session
     grow, so the last one answers for all before it. An entry ends with its session, so the size follows the roster.
  3. ``as_dict`` is plain JSON data, and ``restore(as_dict())`` makes an equal ledger.
  4. A standby gets all of it once, then with each ``Apply`` the entries that are new: an update costs what it touches,
     however many workers there are.

Source: the client sessions of Raft, by which commands are executed once: Ongaro, 2014, section 6.3.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch_ps.ps.core.consistent_cut import Cut
from torch_ps.ps.core.effects import Apply, Contribution, Release, UpdateKey


@dataclass(frozen=True, slots=True)
class Entry:
    """The last decided push of one session: how stale it was, and whether it was applied or refused."""

    session: int
    step: int
    staleness: int
    applied: bool = True


class Ledger:
    """How far one bucket is: its version, the pushes and samples it has absorbed, and the entries of its workers.

    Attributes:
        cut: cut of the shard, which says which version is recorded; None records none.
        replicated: whether a standby follows, which is told of every version.
        version: number of steps that were applied.
        floor: smallest clock of the roster, where the mode keeps one.
        num_pushes: number of pushes that were applied.
        samples: sum of their weights.
        contributors: workers whose pushes made the version, in rank order.
    """

    def __init__(self, bucket: int) -> None:
        self.bucket = bucket
        self.cut: Cut | None = None
        self.replicated = False
        self.version = 0
        self.floor = 0
        self.num_pushes = 0
        self.samples = 0.0
        self.contributors: tuple[str, ...] = ()
        self._entries: dict[str, Entry] = {}
        self._untold: set[str] = set()  # whose entries a standby does not have

    def entry(self, worker: str, session: int) -> Entry | None:
        """The last decided push of this session; None where there is none."""
        entry = self._entries.get(worker)
        return entry if entry is not None and entry.session == session else None

    def apply(
        self,
        contributions: tuple[Contribution, ...],
        reason: str,
        *,
        lr_scale: float = 1.0,
        group: UpdateKey | None = None,
    ) -> Apply:
        """Advance the version by one step of ``contributions``, in rank order; no ``group`` means a step of all."""
        self.version += 1
        self.num_pushes += len(contributions)
        self.contributors = tuple([c.worker for c in contributions])
        for c in contributions:
            self.samples += c.weight
            self._enter(c.worker, Entry(c.session, c.step, c.staleness))
        group = group or ("", 0, self.version - 1)
        record, cut = None, self.cut
        if cut is not None and cut.version == self.version and cut.passes(self.version):
            record = self.as_dict()
        progress = None
        if self.replicated:
            progress, self._untold = self._as_dict(sorted(self._untold & self._entries.keys())), set()
        return Apply(
            self.bucket, self.version, contributions, reason, lr_scale, group=group, record=record, progress=progress
        )

    def refuse(self, worker: str, session: int, step: int, staleness: int) -> None:
        """Enter a push that is never applied, so that its repeat is answered in the same way."""
        self._enter(worker, Entry(session, step, staleness, applied=False))

    def _enter(self, worker: str, entry: Entry) -> None:
        self._entries[worker] = entry
        if self.replicated:
            self._untold.add(worker)

    def replicate(self) -> dict[str, Any]:
        """The ledger of now, for a standby; later ones carry a ``progress`` each, which ``merge_progress`` takes."""
        self.replicated, self._untold = True, set()
        return self.as_dict()

    def replicate_none(self) -> None:
        """Stop ``replicate``: there is no standby any more."""
        self.replicated, self._untold = False, set()

    def answer(
        self,
        worker: str | None,
        session: int,
        step: int | None,
        *,
        next_step: int,
        reason: str,
        staleness: int = 0,
        applied: bool = True,
        stable: bool = False,
    ) -> Release:
        """Answer with the newest version."""
        return Release(
            worker=worker,
            session=session,
            bucket=self.bucket,
            step=step,
            version=self.version,
            next_step=next_step,
            staleness=staleness,
            samples=self.samples,
            applied=applied,
            contributors=self.contributors,
            reason=reason,
            stable=stable,
        )

    def keep(self, members: Container[tuple[str, int]]) -> None:
        """Drop the entries of sessions that are not among ``members``: nothing of theirs can be repeated."""
        self._entries = {w: e for w, e in self._entries.items() if (w, e.session) in members}

    def as_dict(self) -> dict[str, Any]:
        """The ledger as plain JSON data."""
        return self._as_dict(self._entries)

    def _as_dict(self, workers: Iterable[str]) -> dict[str, Any]:
        entries = {worker: self._entries[worker] for worker in workers}
        return {
            "bucket": self.bucket,
            "version": self.version,
            "floor": self.floor,
            "num_pushes": self.num_pushes,
            "samples": self.samples,
            "contributors": list(self.contributors),
            "ledger": {w: [e.session, e.step, e.staleness, e.applied] for w, e in entries.items()},
        }

    def restore(self, data: Mapping[str, Any]) -> None:
        """Become what ``as_dict`` described, for whichever bucket.

        Raises:
            KeyError, TypeError, ValueError: ``data`` is not what ``as_dict`` gives; nothing has changed.
        """
        numbers = [_count(data[name]) for name in ("version", "floor", "num_pushes")]
        samples = float(data["samples"])
        if not 0 <= samples < math.inf:
            raise ValueError(f"samples must be finite and >= 0; got {samples}")
        contributors = tuple(str(w) for w in data["contributors"])
        entries = {
            str(w): Entry(_count(e[0]), _count(e[1]), _count(e[2]), bool(e[3])) for w, e in data["ledger"].items()
        }
        self.version, self.floor, self.num_pushes = numbers
        self.samples, self.contributors, self._entries = samples, contributors, entries


def merge_progress(before: Mapping[str, Any], told: dict[str, Any]) -> dict[str, Any]:
    """The ledger that a standby has after ``Apply.progress``, as ``as_dict`` gives it; ``before`` is used up.

    Raises:
        KeyError, TypeError, ValueError: ``told`` is not that.
    """
    entries, new = before["ledger"], dict(told["ledger"])
    entries.update(new)
    return {**told, "ledger": entries}


def drop_entries(ledger: Mapping[str, Any], sessions: Mapping[str, int]) -> dict[str, Any]:
    """A ledger as ``as_dict`` gives it, with entries of these sessions only, given by worker."""
    return {**ledger, "ledger": {w: e for w, e in ledger["ledger"].items() if sessions.get(w) == e[0]}}


def _count(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"a whole number >= 0 is needed; got {value!r}")
    return value
