"""Which datasets a job has: those that somebody may read on, by number, and which epochs of the others are over.

    named for the first time --number--> read --all epochs asked for are over--> over: nothing but its epochs is kept
                                         '--its readers have left------------> unread: goes on when somebody asks again
    over --more epochs are asked for--> read, with a new number

Rules of this file
  1. A number is given out once, so a push or a request that names an old one is known to be late.
  2. Datasets are bounded for each worker and in all. Of unread ones the oldest gives way; one of which no sample has
     been done is forgotten with its last reader.
  3. A standby gets all once, then what has changed: an update costs what it touches, however many datasets there are.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

from torch_ps.common.errors import ProtocolError
from torch_ps.ps.core.dataset_progress import DatasetProgress, DatasetSpec, Reader, spec_from_data, spec_to_data
from torch_ps.ps.core.roster import SessionKey

#: Datasets that one worker has brought and that are not over, at most.
MAX_OF_WORKER = 1024
#: Datasets that are not over, at most: in all, and of them those that nobody reads.
MAX_DATASETS, MAX_UNREAD = 65_536, 1024
#: Datasets that are over and of which the epochs are known. Beyond that the oldest is forgotten, and begins anew if
#: somebody asks for it.
MAX_OVER = 16_384


class DatasetRegister:
    """The datasets of one job.

    Attributes:
        live: datasets that are not over, by number, the oldest first.
    """

    def __init__(self) -> None:
        self.live: dict[int, DatasetProgress] = {}
        self._numbers: dict[DatasetSpec, int] = {}
        self._over: dict[DatasetSpec, tuple[int, tuple[SessionKey, ...]]] = {}  # epochs, and who has stopped reading
        self._next = 0
        self._of_worker: dict[str, int] = {}
        self._serial = 0  # of the last state or change that was given out
        self._tracks = False  # whether somebody is told of changes
        self._changed: set[int] = set()
        self._newly_over: dict[DatasetSpec, None] = {}

    @property
    def next_number(self) -> int:
        """Number of the next dataset; every smaller one was given out."""
        return self._next

    def number_of(self, spec: DatasetSpec) -> int | None:
        """Number of a dataset that is not over."""
        return self._numbers.get(spec)

    def epochs_over(self, spec: DatasetSpec) -> int:
        """Epochs of a dataset that are over where it is over; 0 where it is not."""
        return self._over.get(spec, (0, ()))[0]

    def begin(self, spec: DatasetSpec, worker: str) -> int:
        """Have a dataset read that is not: a new one, or one that is over and of which more epochs are asked for.

        Raises:
            ProtocolError: the worker has brought, or the job has, as many as there may be.
        """
        mine = self._of_worker.get(worker, 0)
        if mine >= MAX_OF_WORKER or len(self.live) >= MAX_DATASETS:
            whose = f"has brought {mine}" if mine >= MAX_OF_WORKER else f"is in a job with {len(self.live)}"
            raise ProtocolError(
                f"worker {worker!r} asks for one more data set and {whose} that are not read to their end; use "
                "epochs=N, not a seed per epoch"
            )
        epochs, stopped = self._over.pop(spec, (0, ()))
        dataset = DatasetProgress(spec, epochs - 1, []) if epochs else DatasetProgress(spec, 0, [(0, spec.size)])
        dataset.owner, dataset.readers = worker, {key: Reader(1, epochs, stopped=True) for key in stopped}
        self._add(self._next, dataset)
        self._next += 1
        return self._next - 1

    def changed(self, number: int) -> None:
        """Note that a dataset has changed."""
        if self._tracks:
            self._changed.add(number)

    def end_if_over(self, number: int) -> None:
        """Keep nothing but the epochs of a dataset whose readers have all read as many as they asked for."""
        dataset = self.live[number]
        if dataset.complete and all(r.stopped or r.epochs <= r.ended for r in dataset.readers.values()):
            stopped = tuple(key for key, reader in dataset.readers.items() if reader.stopped)
            self._remove(number)
            self._note_over(dataset.spec, dataset.epoch + 1, stopped)
            if self._tracks:
                self._newly_over[dataset.spec] = None

    def keep(self, members: Container[SessionKey]) -> None:
        """Forget who is not among ``members``; what such readers hold is free."""
        for spec, (epochs, stopped) in list(self._over.items()):
            if stopped and not all(key in members for key in stopped):
                self._over[spec] = epochs, tuple(key for key in stopped if key in members)
        unread = []
        for number, dataset in list(self.live.items()):
            if dataset.keep(members):
                self.changed(number)
            if dataset.untouched:
                self._remove(number)
            else:
                self.end_if_over(number)
            if number in self.live and not dataset.readers:
                unread.append(number)
        for number in unread[: max(len(unread) - MAX_UNREAD, 0)]:
            self._remove(number)

    # ------------------------------------------------------------ state, as plain JSON data

    def export(self) -> list[dict[str, Any]]:
        """What a checkpoint keeps: per dataset, the epoch and the positions of it that are not done."""
        over = [
            {**spec_to_data(spec), "epoch": epochs - 1, "left": list[Any]()} for spec, (epochs, _) in self._over.items()
        ]
        return over + [dataset.export() for dataset in self.live.values()]

    def restore(self, state: Any) -> None:
        """Go on from ``export``, in a job without workers yet: what was held and not done is free.

        Raises:
            KeyError, TypeError, ValueError: ``state`` is not what ``export`` gives; nothing has changed.
        """
        found = DatasetRegister()
        for each in state:
            dataset = DatasetProgress.of(each)
            if dataset.complete:
                found._note_over(dataset.spec, dataset.epoch + 1, ())
            else:
                found._add(found._next, dataset)
                found._next += 1
        self._become(found)

    def hand_over(self) -> dict[str, Any]:
        """All state, for a standby; ``changes`` goes on from here, until ``track_none``."""
        self._tracks, self._changed, self._newly_over, self._serial = True, set(), {}, self._serial + 1
        return {
            "serial": self._serial,
            "next": self._next,
            "sets": {str(number): dataset.hand_over() for number, dataset in self.live.items()},
            "over": dict(_over_to_data(spec, *record) for spec, record in self._over.items()),
        }

    def track_none(self) -> None:
        """Tell nobody of changes any more: there is no standby."""
        self._tracks, self._changed, self._newly_over = False, set(), {}

    def changes(self) -> dict[str, Any]:
        """What has changed since the last ``hand_over`` or ``changes``; ``merge_changes`` takes it."""
        sets = {str(n): self.live[n].hand_over() if n in self.live else None for n in sorted(self._changed)}
        over = dict(_over_to_data(spec, *self._over[spec]) for spec in self._newly_over if spec in self._over)
        self._changed, self._newly_over, self._serial = set(), {}, self._serial + 1
        return {"serial": self._serial, "next": self._next, "changed": sets, "over": over}

    def take_over(self, state: Mapping[str, Any]) -> None:
        """Go on from ``hand_over``, with all ``changes`` since merged into it.

        Raises:
            KeyError, TypeError, ValueError: ``state`` is not that; nothing has changed.
        """
        found = DatasetRegister()
        for each in state["over"].values():
            epochs, stopped = int(each["epochs"]), tuple((str(w), int(s)) for w, s in each["stopped"])
            found._note_over(spec_from_data(each), epochs, stopped)
        for number, each in state["sets"].items():
            dataset = DatasetProgress.of(each)
            dataset.take_over(each)
            found._over.pop(dataset.spec, None)
            found._add(int(number), dataset)
        found._next, found._serial = int(state["next"]), int(state["serial"])
        if any(number >= found._next for number in found.live):
            raise ValueError(f"data sets {sorted(found.live)} of {found._next}")
        self._become(found)

    # ------------------------------------------------------------ inside

    def _become(self, other: DatasetRegister) -> None:
        self.__dict__ = other.__dict__

    def _add(self, number: int, dataset: DatasetProgress) -> None:
        self.live[number], self._numbers[dataset.spec] = dataset, number
        self._of_worker[dataset.owner] = self._of_worker.get(dataset.owner, 0) + 1
        self.changed(number)

    def _remove(self, number: int) -> None:
        dataset = self.live.pop(number)
        del self._numbers[dataset.spec]
        self._of_worker[dataset.owner] -= 1
        if not self._of_worker[dataset.owner]:
            del self._of_worker[dataset.owner]
        self.changed(number)

    def _note_over(self, spec: DatasetSpec, epochs: int, stopped: tuple[SessionKey, ...]) -> None:
        self._over[spec] = epochs, stopped
        if len(self._over) > MAX_OVER:
            del self._over[next(iter(self._over))]


def merge_changes(state: dict[str, Any], told: dict[str, Any]) -> dict[str, Any]:
    """What a standby has after one more record: ``told`` is ``hand_over``, ``changes``, or was overtaken by ``state``.

    Raises:
        KeyError, TypeError, ValueError: a change is missing between the two; nothing has changed.
    """
    if "changed" not in told:
        return told
    have, serial = int(state["serial"]), int(told["serial"])
    if serial <= have:
        return state
    if serial != have + 1:
        raise ValueError(f"change {serial} of the data sets follows {have}")
    sets, over = state["sets"], state["over"]
    for number, each in told["changed"].items():
        if each is None:
            sets.pop(number, None)
        else:
            sets[number] = each
    over.update(told["over"])
    for key in list(over)[: max(len(over) - MAX_OVER, 0)]:
        del over[key]
    return {**state, **{key: value for key, value in told.items() if key not in ("changed", "over")}}


def _over_to_data(spec: DatasetSpec, epochs: int, stopped: tuple[SessionKey, ...]) -> tuple[str, dict[str, Any]]:
    key = f"{spec.size} {spec.seed} {spec.shuffled} {spec.name}"
    return key, {**spec_to_data(spec), "epochs": epochs, "stopped": [list(key) for key in stopped]}
