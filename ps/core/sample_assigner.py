"""Sample assigner: which samples of an epoch each worker trains on. The lead gives them out; pushes settle them.

Rules of this file
  1. Positions are given out, not samples: 0 <= position < size, in the order of one epoch. Workers compute the order
     itself (shuffled or not); the same ``DatasetSpec`` means the same order on every worker.
  2. A position is free, held by one session of one worker, or done. The call that decides to apply a push to the lead's
     first bucket makes the positions that this push covers done. Positions that are held and not done become free when
     their worker leaves the roster, returns them, or has its push dropped.
  3. An epoch is over when all of its positions are done. Nobody gets a part of the next epoch before that.
  4. Where workers go in step, portions are dealt to all of them at once, in rounds of one batch each, in rank order and
     from the front: batch k of N workers with B samples holds the samples of batch k of one process with N B samples.
     So who gets what depends on the roster and the seed, never on who asked first, and an epoch begins when every
     worker that still reads has asked for it. A worker that reads a dataset which was begun later does not come back
     to an earlier one, of which a checkpoint or a worker that died has left samples: they are dealt without it. In the
     other modes a worker is served when it asks.

    SampleRequest --> DatasetProgress --deal--> Portion
    push: check, claim --> settle --> done, or free again

A push names what it covers as the number of samples that its worker has begun, since the session started, of a
dataset with a number. A repeat covers nothing new, so it needs no rule of its own. A request names, in the same way,
how many samples its worker has received: what was given beyond that was lost on its way and is given again. Both speak
of nothing where the number is that of a dataset which is over (``dataset_register.py``).
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

from torch_ps.common.errors import ProtocolError, UnknownWorker
from torch_ps.ps.core.dataset_progress import DatasetProgress, DatasetSpec, Reader
from torch_ps.ps.core.dataset_register import DatasetRegister
from torch_ps.ps.core.modes import Mode
from torch_ps.ps.core.policy import name_list
from torch_ps.ps.core.ranges import Range, num_positions
from torch_ps.ps.core.roster import MAX_NAME, Roster, SessionKey

#: What a push covers: pairs of the number of a dataset and the samples of it that this session has begun so far.
Covers = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """A worker asks for samples.

    Attributes:
        batch: samples of one of its batches, >= 1.
        epochs: the worker reads until this many epochs of the job are over, >= 1.
        received: samples of the dataset that this session has received and keeps, since it started, >= 0.
        number: number of the dataset that ``received`` counts; None: the one that is read now.
        together: whether the end waits, where workers go in step, until every reader has asked after its last samples:
            the worker has to take part in steps of other jobs that those still make.
    """

    worker: str
    session: int
    data: DatasetSpec
    batch: int
    epochs: int
    received: int
    together: bool = False
    number: int | None = None


@dataclass(frozen=True, slots=True)
class Portion:
    """Samples of one epoch to train on, in this order, cut into batches from the front.

    Attributes:
        number: number of the dataset, which pushes name in ``covers``.
    """

    number: int
    epoch: int
    ranges: tuple[Range, ...]


@dataclass(frozen=True, slots=True)
class Later:
    """There is nothing now; ask again when something has changed. ``waiting_for`` names workers in rank order."""

    waiting_for: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class Idle:
    """There is nothing now, and others cannot go on without this worker: push weight 0, then ask again.

    ``waiting_for`` names workers in rank order.
    """

    waiting_for: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class Over:
    """The epochs that were asked for are over."""

    reason: str


SampleResponse = Portion | Later | Idle | Over


class SampleAssigner:
    """The lead's machine: every dataset of the job, and who holds which samples of it.

    Args:
        mode: the job's mode. It says whether workers go in step, and whether one without samples holds up the others.
    """

    def __init__(self, mode: Mode) -> None:
        self._mode = mode
        self._register = DatasetRegister()
        #: What pushes cover that are not decided, by session and step.
        self.claims: dict[SessionKey, dict[int, Covers]] = {}
        self._newest: dict[SessionKey, int] = {}  # number of the newest dataset that a session has asked for
        self._before = 0  # newest session that may hold samples from an earlier lead

    def ask(self, request: SampleRequest, roster: Roster, open_step: int) -> SampleResponse:
        """Give samples to a member of ``roster``, or say what it waits for.

        Raises:
            UnknownWorker: an earlier lead gave samples to this session.
            ProtocolError: a number is out of its range, or there are too many datasets.
        """
        self._check_session(request.worker, request.session)
        _check_request(request)
        if request.epochs <= self._register.epochs_over(request.data):
            return Over(f"{_epochs(request.epochs)} of {request.data.title} are over")
        number = self._register.number_of(request.data)
        if number is None:
            number = self._register.begin(request.data, request.worker)
        self._register.changed(number)
        key = request.worker, request.session
        self._newest[key] = max(number, self._newest.get(key, 0))
        answer = self._ask(request, number, roster, open_step)
        if isinstance(answer, Over):
            self._register.end_if_over(number)
        return answer

    def _ask(self, request: SampleRequest, number: int, roster: Roster, open_step: int) -> SampleResponse:
        dataset, key = self._register.live[number], (request.worker, request.session)
        reader = dataset.readers.setdefault(key, Reader(request.batch, request.epochs))
        reader.batch, reader.epochs, reader.stopped = request.batch, request.epochs, False
        received = request.received if request.number in (None, number) else 0
        reader.unfetch(max(received, self._covered(key, number, reader)))
        title = dataset.spec.title
        if not reader.holds:
            reader.ended = dataset.epoch + dataset.complete
        if not reader.dealt:
            if reader.epochs <= dataset.epoch + dataset.complete:
                done = f"{_epochs(request.epochs)} of {title}"
                if request.together and (late := self._not_ended(dataset, roster, reader.epochs)):
                    return Later(late, f"{done} end for all at once, and not yet for {name_list(late)}")
                return Over(f"{done} are over")
            later = self._later(number, roster, open_step)
            if later is not None:
                return later
            if dataset.complete:
                dataset.begin_epoch()
            dataset.deal(roster, reader, stale=self._mode.stale)
        if reader.dealt:
            return Portion(number, dataset.epoch, reader.fetch())
        readers = [(m.name, dataset.readers.get(m.key)) for m in roster.members]
        names = tuple([name for name, each in readers if each is not None and each.holds])
        rest = sum(num_positions(each.holds) for _, each in readers if each is not None)
        reason = f"the last {rest} samples of epoch {dataset.epoch} of {title} are with {name_list(names)}"
        return Idle(names, reason) if self._mode.holds_others_up else Later(names, reason)

    def give_back(self, worker: str, session: int, data: DatasetSpec, received: int) -> None:
        """Free all samples of a worker that stops reading, but the ``received`` ones, counted as in a request."""
        number = self._register.number_of(data)
        dataset = self._register.live[number] if number is not None else None
        reader = dataset.readers.get((worker, session)) if dataset is not None else None
        if number is not None and dataset is not None and reader is not None:
            reader.unfetch(max(received, self._covered((worker, session), number, reader)))
            dataset.put_back(reader.dealt)
            reader.dealt, reader.stopped = [], True
            self._register.changed(number)
            self._register.end_if_over(number)

    # ------------------------------------------------------------ pushes

    def check(self, worker: str, session: int, covers: Covers) -> None:
        """Refuse a push that covers samples which its worker was not given.

        Raises:
            UnknownWorker: an earlier lead gave them.
            ProtocolError: nobody gave them.
        """
        if covers:
            self._check_session(worker, session)
        for number, samples in covers:
            dataset = self._register.live.get(number)
            if dataset is None and number < self._register.next_number:
                continue  # it is over, so this is a repeat
            reader = dataset.readers.get((worker, session)) if dataset is not None else None
            if reader is None or samples > reader.fetched:
                has = reader.fetched if reader is not None else 0
                raise ProtocolError(
                    f"a push of worker {worker!r} covers {samples} samples of data set {number}; it was given {has}"
                )

    def claim(self, worker: str, session: int, step: int, covers: Covers) -> None:
        """Note that a push which covers these samples was taken; ``settle`` says what becomes of it."""
        if covers:
            self.claims.setdefault((worker, session), {}).setdefault(step, covers)

    def settle(self, worker: str, session: int, step: int, *, applied: bool) -> None:
        """Make the samples of a push done or free; a push that covers nothing (any more) changes nothing."""
        key = worker, session
        claims = self.claims.get(key, {})
        covers = claims.pop(step, ())
        if not claims:
            self.claims.pop(key, None)
        for number, samples in covers:
            dataset = self._register.live.get(number)
            reader = dataset.readers.get(key) if dataset is not None else None
            if dataset is not None and reader is not None:
                ranges = reader.settle(samples)
                if not applied:
                    dataset.put_back(ranges)
                self._register.changed(number)

    def keep(self, members: Container[SessionKey]) -> None:
        """Free whatever sessions hold that are not among ``members``."""
        self.claims = {key: claims for key, claims in self.claims.items() if key in members}
        self._newest = {key: number for key, number in self._newest.items() if key in members}
        self._register.keep(members)

    # ------------------------------------------------------------ state

    def export(self) -> dict[str, Any]:
        """What a checkpoint keeps, as plain JSON data: per dataset, the epoch and the positions that are not done."""
        return {"sets": self._register.export()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from ``export``, in a job without workers yet: what was held and not done is free.

        Raises:
            KeyError, TypeError, ValueError: ``state`` is not what ``export`` gives; nothing has changed.
        """
        self._register.restore(state["sets"])
        self.claims, self._newest = {}, {}

    def hand_over(self) -> dict[str, Any]:
        """All state but the claims, as plain JSON data; claims come again with the pushes that are not decided."""
        return {"before": self._before, **self._register.hand_over()}

    def changes(self) -> dict[str, Any]:
        """What has changed since the last ``hand_over`` or ``changes``, for ``dataset_register.merge_changes``."""
        return {"before": self._before, **self._register.changes()}

    def track_none(self) -> None:
        """Nobody wants ``changes`` any more."""
        self._register.track_none()

    def take_over(self, state: Mapping[str, Any]) -> None:
        """Go on from ``hand_over``, with all ``changes`` since: workers keep the samples that they were given.

        Raises:
            KeyError, TypeError, ValueError: ``state`` is not what ``hand_over`` gives; nothing has changed.
        """
        before = int(state["before"])
        self._register.take_over(state)
        self._before, self.claims = before, {}
        self._newest = {key: number for number, dataset in self._register.live.items() for key in dataset.readers}

    def begin_after(self, epoch: int) -> None:
        """Have sessions of up to this roster epoch join again: they may hold samples that an earlier lead gave."""
        self._before = epoch

    # ------------------------------------------------------------ inside

    def _covered(self, key: SessionKey, number: int, reader: Reader) -> int:
        """Samples of a dataset that pushes of this session cover, whether they are settled or not."""
        claims = self.claims.get(key, {}).values()
        return max(reader.settled, *(samples for covers in claims for n, samples in covers if n == number), 0)

    def _check_session(self, worker: str, session: int) -> None:
        if session <= self._before:
            raise UnknownWorker(
                f"session {session} of worker {worker!r} is older than this lead, which gave it no samples; join again"
            )

    def _not_ended(self, dataset: DatasetProgress, roster: Roster, epochs: int) -> tuple[str, ...]:
        """Readers that have not asked since the first ``epochs`` epochs are over; none where nobody goes in step."""
        if self._mode.stale:
            return ()
        readers = [(m.name, dataset.readers.get(m.key)) for m in roster.members]
        return tuple([name for name, r in readers if r is not None and not r.stopped and r.ended < epochs])

    def _later(self, number: int, roster: Roster, open_step: int) -> Later | None:
        """Whom a deal waits for, where it is for all workers at once; None: it can be done now."""
        if self._mode.stale:
            return None
        if not roster.open:
            here = name_list(tuple([m.name for m in roster.members]))
            return Later((), f"the data is dealt when the first workers are complete; {here} joined")
        dataset = self._register.live[number]
        epoch = dataset.epoch + dataset.complete
        readers = [(m, dataset.readers.get(m.key)) for m in roster.members if m.first_step <= open_step]
        names = tuple(
            [
                m.name
                for m, r in readers
                if (r is None and self._newest.get(m.key, 0) <= number)
                or (r is not None and r.epochs <= epoch and not r.stopped)
            ]
        )
        if not names:
            return None
        what = f"epoch {epoch} of {dataset.spec.title}"
        return Later(names, f"{what} is dealt to all at once, and {name_list(names)} has not asked for it")


def _check_request(request: SampleRequest) -> None:
    """Refuse a request with a number out of its range.

    Raises:
        ProtocolError: there is one.
    """
    spec = request.data
    if not 1 <= spec.size < 1 << 53 or not 0 <= spec.seed < 1 << 63 or len(spec.name) > MAX_NAME:
        raise ProtocolError(
            f"worker {request.worker!r} names an impossible data set: {spec.size} samples, seed {spec.seed}"
        )
    if not 1 <= request.batch < 1 << 31 or not 1 <= request.epochs < 1 << 31:
        numbers = f"{request.batch} and {request.epochs}"
        raise ProtocolError(f"batch and epochs of worker {request.worker!r} must be >= 1; got {numbers}")


def _epochs(count: int) -> str:
    return "1 epoch" if count == 1 else f"{count} epochs"
