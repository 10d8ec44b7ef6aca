"""One data set on its way through its epochs: which positions are free, and what each of its readers has.

    free --deal--> dealt --fetched--> given --covered by a push--> done
      ^              +------ leaves, gives back, push dropped ----+
      +--------------------------------------------------------------+

Decides nothing about who may have what when: that is ``data.py``.

Source: the last portions get smaller, as in guided self-scheduling, Polychronopoulos and Kuck, 1987.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from torch_ps.ps.core.ranges import Range, check, count, cut, heard, merged, take
from torch_ps.ps.core.roster import Life, Roster

#: Batches of a worker in one portion, at most.
MAX_ROUNDS = 16


@dataclass(frozen=True, slots=True)
class DataSet:
    """One data set in one order per epoch; workers that name the same one share its samples."""

    name: str
    size: int
    seed: int
    shuffled: bool

    @property
    def called(self) -> str:
        """As people know it."""
        return f"data set {self.name!r}" if self.name else f"the data set of {self.size} samples with seed {self.seed}"


@dataclass(slots=True)
class Reader:
    """What one life of a worker has of one data set; ``fetched`` and ``settled`` count samples since it began."""

    batch: int
    epochs: int
    broke_off: bool = False  # it gave back what it had, and has not asked again
    dealt: list[Range] = field(default_factory=list)
    given: list[Range] = field(default_factory=list)
    fetched: int = 0
    settled: int = 0

    @property
    def has(self) -> list[Range]:
        return [*self.given, *self.dealt]

    def unfetch(self, received: int) -> None:
        """Only the first ``received`` samples ever given are with the worker; those after them are dealt, as before."""
        known = take(self.given, count(self.given) - max(self.fetched - received, 0))
        self.fetched -= count(self.given)
        self.dealt, self.given = [*self.given, *self.dealt], known


@dataclass(slots=True)
class Course:
    """One data set on its way through its epochs."""

    data: DataSet
    epoch: int
    free: list[Range]
    readers: dict[Life, Reader] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        return not self.free and not any(r.given or r.dealt for r in self.readers.values())

    def put_back(self, ranges: Iterable[Range]) -> None:
        self.free = merged([*self.free, *ranges])

    def deal(self, roster: Roster, asking: Reader, *, stale: bool) -> None:
        """Give from what is free: to ``asking`` alone where workers are not in step (``stale``), else to all."""
        readers = [r for m in roster.members if (r := self.readers.get(m.life)) and not r.broke_off]
        readers = [r for r in readers if r.epochs > self.epoch]
        left = count(self.free)
        if stale:
            rounds = min(max(left // (2 * asking.batch * len(readers)), 1), MAX_ROUNDS)
            asking.dealt += take(self.free, min(rounds * asking.batch, left))
            return
        whole = sum(r.batch for r in readers)
        for _ in range(min(max(left // (4 * whole), 1), MAX_ROUNDS)):
            for reader, part in zip(readers, cut(count(self.free), [r.batch for r in readers]), strict=True):
                reader.dealt += take(self.free, part)

    # ------------------------------------------------------------ as plain JSON data

    def export(self) -> dict[str, Any]:
        """What a checkpoint keeps: the epoch, and which positions of it are not done."""
        return {
            "name": self.data.name,
            "size": self.data.size,
            "seed": self.data.seed,
            "shuffled": self.data.shuffled,
            "epoch": self.epoch,
            "left": [list(r) for r in merged([*self.free, *(x for r in self.readers.values() for x in r.has)])],
        }

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> Self:
        """What ``export`` described: whatever was given is free again.

        Raises:
            KeyError, TypeError, ValueError: it is not that.
        """
        data = DataSet(str(told["name"]), int(told["size"]), int(told["seed"]), bool(told["shuffled"]))
        left = check([(int(start), int(stop)) for start, stop in told["left"]], data.size)
        return cls(data, int(told["epoch"]), left)

    def hand_over(self) -> dict[str, Any]:
        """What a standby is told: who has what, too."""
        readers = [_told(life, reader) for life, reader in self.readers.items()]
        return {**self.export(), "free": [list(r) for r in self.free], "readers": readers}

    def take_over(self, told: Mapping[str, Any]) -> None:
        """Become what ``hand_over`` described.

        Raises:
            KeyError, TypeError, ValueError: it is not that.
        """
        self.free = heard(told["free"], self.data.size)
        self.readers = dict(_heard(each, self.data.size) for each in told["readers"])


def _told(life: Life, reader: Reader) -> list[Any]:
    dealt, given = ([list(r) for r in ranges] for ranges in (reader.dealt, reader.given))
    return [*life, reader.batch, reader.epochs, reader.broke_off, dealt, given, reader.fetched, reader.settled]


def _heard(told: Any, size: int) -> tuple[Life, Reader]:
    """The inverse of ``_told``."""
    worker, session, batch, epochs, broke_off, dealt, given, fetched, settled = told
    reader = Reader(int(batch), int(epochs), bool(broke_off), heard(dealt, size), heard(given, size))
    reader.fetched, reader.settled = int(fetched), int(settled)
    return (str(worker), int(session)), reader
