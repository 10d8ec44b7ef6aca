"""Progress of one dataset through its epochs: which positions are free, and which ones each reader holds.

    free --deal--> dealt --fetch--> given --covered by a push--> done
      ^              +------ leaves, returns, push dropped ----+
      +--------------------------------------------------------+

Rules of this file
  1. Who may have samples, and when, is decided in ``sample_assigner.py``; how many each reader gets, in ``deal``.
  2. Every position of an epoch is in exactly one place: free, dealt or given to one reader, or done.

Source: portions shrink towards the end of an epoch as in guided self-scheduling, Polychronopoulos and Kuck, 1987.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from torch_ps.ps.core.ranges import Range, check_ranges, merge, num_positions, parse_ranges, split_round, take_front
from torch_ps.ps.core.roster import Roster, SessionKey

#: Batches of a worker in one portion, at most.
MAX_ROUNDS = 16


@dataclass(frozen=True, slots=True)
class DatasetSpec:
    """Names one dataset, which has one order per epoch; workers that name the same one share its samples.

    Attributes:
        name: at most 100 characters; "" is a dataset known by its size and seed.
        size: samples, >= 1.
        seed: seed of the order, >= 0.
    """

    name: str
    size: int
    seed: int
    shuffled: bool

    @property
    def title(self) -> str:
        """The dataset for a sentence."""
        return f"data set {self.name!r}" if self.name else f"the data set of {self.size} samples with seed {self.seed}"


@dataclass(slots=True)
class Reader:
    """What one session of a worker holds of one dataset.

    Attributes:
        stopped: the session returned what it held and has not asked again.
        dealt: positions that are its own and have not been sent.
        given: positions that have been sent and are not done.
        fetched: samples sent since the session began.
        settled: samples done or freed since the session began.
        ended: epochs that were over when the session last asked with nothing in its hands.
    """

    batch: int
    epochs: int
    stopped: bool = False
    dealt: list[Range] = field(default_factory=list)
    given: list[Range] = field(default_factory=list)
    fetched: int = 0
    settled: int = 0
    ended: int = 0

    @property
    def holds(self) -> list[Range]:
        return [*self.given, *self.dealt]

    def fetch(self) -> tuple[Range, ...]:
        """Send all that is dealt."""
        ranges, self.dealt = tuple(self.dealt), []
        self.given += ranges
        self.fetched += num_positions(ranges)
        return ranges

    def unfetch(self, received: int) -> None:
        """Keep the first ``received`` samples ever sent as given; those after them are dealt again."""
        known = take_front(self.given, num_positions(self.given) - max(self.fetched - received, 0))
        self.fetched -= num_positions(self.given)
        self.dealt, self.given = [*self.given, *self.dealt], known

    def settle(self, samples: int) -> list[Range]:
        """Take the first ``samples`` samples of this session off its hands; gives those that it still held."""
        if samples <= self.settled:
            return []
        ranges = take_front(self.given, samples - self.settled)
        self.settled = samples
        return ranges


@dataclass(slots=True)
class DatasetProgress:
    """One dataset on its way through its epochs.

    Attributes:
        owner: name of the worker that has brought it; "" after a restart.
    """

    spec: DatasetSpec
    epoch: int
    free: list[Range]
    readers: dict[SessionKey, Reader] = field(default_factory=dict)
    owner: str = ""

    @property
    def complete(self) -> bool:
        """Whether every position of the epoch is done."""
        return not self.free and not any(r.given or r.dealt for r in self.readers.values())

    @property
    def untouched(self) -> bool:
        """Whether nobody reads it and no sample of it is done."""
        return not self.readers and not self.epoch and num_positions(self.free) == self.spec.size

    def begin_epoch(self) -> None:
        self.epoch, self.free = self.epoch + 1, [(0, self.spec.size)]

    def put_back(self, ranges: Iterable[Range]) -> None:
        self.free = merge([*self.free, *ranges])

    def keep(self, members: Container[SessionKey]) -> bool:
        """Free what sessions hold that are not among ``members``; returns whether there were any."""
        gone = [key for key in self.readers if key not in members]
        for key in gone:
            self.put_back(self.readers.pop(key).holds)
        return bool(gone)

    def deal(self, roster: Roster, asking: Reader, *, stale: bool) -> None:
        """Deal free positions: to ``asking`` alone where workers are not in step (``stale``), else to all readers."""
        readers = [r for m in roster.members if (r := self.readers.get(m.key)) and not r.stopped]
        readers = [r for r in readers if r.epochs > self.epoch]
        left = num_positions(self.free)
        if stale:
            rounds = min(max(left // (2 * asking.batch * len(readers)), 1), MAX_ROUNDS)
            asking.dealt += take_front(self.free, min(rounds * asking.batch, left))
            return
        batches = [r.batch for r in readers]
        for _ in range(min(max(left // (4 * sum(batches)), 1), MAX_ROUNDS)):
            for reader, part in zip(readers, split_round(num_positions(self.free), batches), strict=True):
                reader.dealt += take_front(self.free, part)

    # ------------------------------------------------------------ state, as plain JSON data

    def export(self) -> dict[str, Any]:
        """What a checkpoint keeps: the epoch, and the positions of it that are not done."""
        return {
            **spec_to_data(self.spec),
            "epoch": self.epoch,
            "left": [list(r) for r in merge([*self.free, *(x for r in self.readers.values() for x in r.holds)])],
        }

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Self:
        """The progress that ``export`` described, with nothing held by anybody.

        Raises:
            KeyError, TypeError, ValueError: ``data`` is not what ``export`` gives.
        """
        spec = spec_from_data(data)
        left = check_ranges([(int(start), int(stop)) for start, stop in data["left"]], spec.size)
        return cls(spec, int(data["epoch"]), left)

    def hand_over(self) -> dict[str, Any]:
        """What a standby gets: ``export``, and who holds what."""
        readers = [_reader_to_data(key, reader) for key, reader in self.readers.items()]
        return {**self.export(), "owner": self.owner, "free": [list(r) for r in self.free], "readers": readers}

    def take_over(self, data: Mapping[str, Any]) -> None:
        """Become what ``hand_over`` described.

        Raises:
            KeyError, TypeError, ValueError: ``data`` is not what ``hand_over`` gives.
        """
        self.owner = str(data["owner"])
        self.free = parse_ranges(data["free"], self.spec.size)
        self.readers = dict(_reader_from_data(each, self.spec.size) for each in data["readers"])


def spec_to_data(spec: DatasetSpec) -> dict[str, Any]:
    """A spec as plain JSON data."""
    return {"name": spec.name, "size": spec.size, "seed": spec.seed, "shuffled": spec.shuffled}


def spec_from_data(data: Mapping[str, Any]) -> DatasetSpec:
    """The inverse.

    Raises:
        KeyError, TypeError, ValueError: ``data`` is not that.
    """
    return DatasetSpec(str(data["name"]), int(data["size"]), int(data["seed"]), bool(data["shuffled"]))


def _reader_to_data(key: SessionKey, reader: Reader) -> list[Any]:
    dealt, given = ([list(r) for r in ranges] for ranges in (reader.dealt, reader.given))
    return [
        *key,
        reader.batch,
        reader.epochs,
        reader.stopped,
        dealt,
        given,
        reader.fetched,
        reader.settled,
        reader.ended,
    ]


def _reader_from_data(data: Any, size: int) -> tuple[SessionKey, Reader]:
    worker, session, batch, epochs, stopped, dealt, given, fetched, settled, ended = data
    reader = Reader(int(batch), int(epochs), bool(stopped), parse_ranges(dealt, size), parse_ranges(given, size))
    reader.fetched, reader.settled, reader.ended = int(fetched), int(settled), int(ended)
    return (str(worker), int(session)), reader
