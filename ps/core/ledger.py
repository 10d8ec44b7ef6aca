"""What has been applied to a bucket, so that nothing is applied twice and nothing acknowledged is forgotten.

Rules of this file
  1. Only a decided ``Apply`` advances a version. It, or a refusal for good, writes an entry, in the call that decides.
  2. One entry per live worker: its session and the last step of it that was decided. Steps of one session grow, so
     the last one answers for all before it. An entry ends with its session, so the size follows the roster.
  3. ``as_dict`` is plain JSON data; ``restore(as_dict())`` makes the same progress.

Source: the ledger of design section 5; "exactly once" as in Raft's client sessions, Ongaro 2014, section 6.3.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

from torch_ps.ps.core.consistent_cut import Cut
from torch_ps.ps.core.effects import Apply, Contribution, Group, Release


@dataclass(frozen=True, slots=True)
class Entry:
    """The last push of one session that was decided, how stale it was, and whether it was applied or refused."""

    session: int
    step: int
    staleness: int
    applied: bool = True


class Ledger:
    """How far one bucket is: its version, the pushes and samples it has absorbed and its ledger.

    ``floor`` is the smallest clock of the roster where the mode keeps one. ``cut`` says which version is recorded;
    ``replicated`` that a standby follows, which gets every version.
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

    def entry(self, worker: str, session: int) -> Entry | None:
        """The last decided push of this session; None when it has none."""
        entry = self._entries.get(worker)
        return entry if entry is not None and entry.session == session else None

    def apply(
        self,
        contributions: tuple[Contribution, ...],
        reason: str,
        *,
        lr_scale: float = 1.0,
        group: Group | None = None,
    ) -> Apply:
        """Record one optimizer step; ``contributions`` are in rank order, maybe none. No ``group``: a step of all."""
        self.version += 1
        self.num_pushes += len(contributions)
        self.contributors = tuple([c.worker for c in contributions])
        for c in contributions:
            self.samples += c.weight
            self._entries[c.worker] = Entry(c.session, c.step, c.staleness)
        group = group or ("", 0, self.version - 1)
        record, cut = None, self.cut
        if cut is not None and cut.version == self.version and cut.passes(self.version):
            record = self.as_dict()
        progress = self.as_dict() if self.replicated else None
        return Apply(
            self.bucket, self.version, contributions, reason, lr_scale, group=group, record=record, progress=progress
        )

    def refuse(self, worker: str, session: int, step: int, staleness: int) -> None:
        """Record that this push is not applied and never will be; its repeat hears the same."""
        self._entries[worker] = Entry(session, step, staleness, applied=False)

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
        """The answer that this bucket gives now."""
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
        """End the entries of every (worker, session) that is not among ``members``; nothing of them can be repeated."""
        self._entries = {w: e for w, e in self._entries.items() if (w, e.session) in members}

    def as_dict(self) -> dict[str, Any]:
        return {
            "bucket": self.bucket,
            "version": self.version,
            "floor": self.floor,
            "num_pushes": self.num_pushes,
            "samples": self.samples,
            "contributors": list(self.contributors),
            "ledger": {w: [e.session, e.step, e.staleness, e.applied] for w, e in self._entries.items()},
        }

    def restore(self, data: Mapping[str, Any]) -> None:
        """Become what ``as_dict`` described, whatever bucket it was of.

        Raises:
            KeyError, TypeError, ValueError: it is not what ``as_dict`` gives; nothing has changed.
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


def _count(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"a whole number >= 0 is needed; got {value!r}")
    return value
