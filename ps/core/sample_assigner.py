"""Which samples of an epoch each worker trains on: portions of its order, given out by the lead and settled by pushes.

Rules of this file
  1. What is given are *positions* in the order of one epoch, 0 <= position < size. The order itself (shuffled or not)
     is the workers' business; the same data set means the same order everywhere.
  2. A position is free, given to one life of one worker, or done. It is done when a push that covers it is applied to
     the lead's first bucket, in the call that decides so. Whatever is given and not done comes back when its worker
     leaves the roster, gives it back, or has its push dropped.
  3. An epoch is over when every position is done. Nobody gets a part of the next one before that.
  4. Where workers go in step, portions are dealt to all of them at once, in rounds of one batch each, in rank order and
     from the front: batch k of N workers with B samples is what batch k of one process with N B samples is. So who
     gets what depends on the roster and on the seed, never on who asked first: an epoch begins when all that have not
     broken off have asked for it. Elsewhere whoever asks is served.

    Ask --> Course of the data set --deal--> Portion        push: check, claim --> settle --> done, or free again

How a push says what it covers: the number of samples that its worker has begun, ever, of each data set. A repeat covers
nothing new, so it needs no rule of its own. In the same way an ask says how many samples its worker has received, ever:
what was given beyond that was lost on its way, and is dealt to it still.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

from torch_ps.common.errors import ProtocolError, UnknownWorker
from torch_ps.ps.core.dataset_progress import Course, DataSet, Reader
from torch_ps.ps.core.modes import Mode
from torch_ps.ps.core.policy import spoken
from torch_ps.ps.core.ranges import Range, count, take
from torch_ps.ps.core.roster import MAX_NAME, Life, Roster

#: Data sets of one job; a script that names a new seed every epoch makes one each.
MAX_SETS = 1024

#: What a push covers: (number of a data set, samples of it that this worker has begun so far).
Covers = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Ask:
    """A worker wants samples.

    Attributes:
        batch: samples of one of its batches, >= 1.
        epochs: it takes part until this many epochs are over, counted from the first of the job, >= 1.
        received: samples of the set that this session was told of and keeps, ever, >= 0.
    """

    worker: str
    session: int
    data: DataSet
    batch: int
    epochs: int
    received: int


@dataclass(frozen=True, slots=True)
class Portion:
    """Samples to train on, in this order, cut into batches from the front; all of one epoch."""

    number: int  # of the data set
    epoch: int
    ranges: tuple[Range, ...]


@dataclass(frozen=True, slots=True)
class Later:
    """Nothing now: ask again when something has changed. ``waiting_for`` names workers in rank order."""

    waiting_for: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class Idle:
    """Nothing now, and others may not go on without this worker: push weight 0, then ask again."""

    waiting_for: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class Over:
    """The epochs that were asked for are over."""

    reason: str


Answer = Portion | Later | Idle | Over


class Data:
    """The lead's machine: every data set of the job, and who has which samples of it.

    Args:
        mode: whether workers go in step, and whether one without samples holds up the others.
    """

    def __init__(self, mode: Mode) -> None:
        self._mode = mode
        self._courses: list[Course] = []
        #: By worker, session and step: what pushes that are not decided yet cover.
        self.claims: dict[tuple[str, int, int], Covers] = {}
        self._before = 0  # newest session to which a lead of before has given samples

    def ask(self, ask: Ask, roster: Roster, open_step: int) -> Answer:
        """Give samples to a member of ``roster``, or say what it waits for.

        Raises:
            UnknownWorker: it has samples of a lead of before.
            ProtocolError: a number out of its range, or too many data sets.
        """
        self._known(ask.worker, ask.session)
        number, course = self._course(ask)
        life = ask.worker, ask.session
        reader = course.readers.setdefault(life, Reader(ask.batch, ask.epochs))
        reader.batch, reader.epochs, reader.broke_off = ask.batch, ask.epochs, False
        reader.unfetch(max(ask.received, self._covered(life, number, reader)))
        what = course.data.called
        if not reader.dealt:
            if reader.epochs <= course.epoch + course.complete:
                return Over(f"{_epochs(ask.epochs)} of {what} are over")
            late = self._unready(course, roster, open_step)
            if late is not None:
                return late
            if course.complete:
                course.epoch, course.free = course.epoch + 1, [(0, course.data.size)]
            course.deal(roster, reader, stale=self._mode.stale)
        if reader.dealt:
            ranges, reader.dealt = tuple(reader.dealt), []
            reader.given += ranges
            reader.fetched += count(ranges)
            return Portion(number, course.epoch, ranges)
        with_them = [(m.name, course.readers.get(m.life)) for m in roster.members]
        names = tuple([name for name, r in with_them if r is not None and r.has])
        rest = sum(count(r.has) for _, r in with_them if r is not None)
        reason = f"the last {rest} samples of epoch {course.epoch} of {what} are with {spoken(names)}"
        return Idle(names, reason) if self._mode.holds_others_up else Later(names, reason)

    def give_back(self, worker: str, session: int, data: DataSet, received: int) -> None:
        """This worker stops reading and keeps ``received`` samples, as in ``Ask``; what more it has is for others."""
        life = worker, session
        for number, course in enumerate(self._courses):
            reader = course.readers.get(life)
            if course.data == data and reader is not None:
                reader.unfetch(max(received, self._covered(life, number, reader)))
                course.put_back(reader.dealt)
                reader.dealt, reader.broke_off = [], True

    # ------------------------------------------------------------ pushes

    def check(self, worker: str, session: int, covers: Covers) -> None:
        """Refuse a push that covers what its worker was not given.

        Raises:
            UnknownWorker: a lead of before has given them.
            ProtocolError: says what.
        """
        if covers:
            self._known(worker, session)
        for number, samples in covers:
            course = self._courses[number] if number < len(self._courses) else None
            reader = course.readers.get((worker, session)) if course is not None else None
            if reader is None or samples > reader.fetched:
                has = reader.fetched if reader is not None else 0
                raise ProtocolError(
                    f"a push of worker {worker!r} covers {samples} samples of data set {number}; it was given {has}"
                )

    def claim(self, worker: str, session: int, step: int, covers: Covers) -> None:
        """A push that covers these samples was taken; ``settle`` says what becomes of it."""
        if covers:
            self.claims.setdefault((worker, session, step), covers)

    def settle(self, worker: str, session: int, step: int, *, applied: bool) -> None:
        """A push was applied, or it never will be; one that covers nothing (any more) changes nothing."""
        for number, samples in self.claims.pop((worker, session, step), ()):
            course = self._courses[number]
            reader = course.readers.get((worker, session))
            if reader is None or samples <= reader.settled:
                continue
            ranges = take(reader.given, samples - reader.settled)
            reader.settled = samples
            if not applied:
                course.put_back(ranges)

    def keep(self, members: Container[Life]) -> None:
        """Take back what belongs to lives that are not among ``members``."""
        self.claims = {k: c for k, c in self.claims.items() if k[:2] in members}
        for course in self._courses:
            for life in [life for life in course.readers if life not in members]:
                course.put_back(course.readers.pop(life).has)

    # ------------------------------------------------------------ what a checkpoint keeps

    def export(self) -> dict[str, Any]:
        """Plain JSON data: per data set, the epoch and which positions of it are not done."""
        return {"sets": [course.export() for course in self._courses]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from ``export``: what was given and not done is free again. For a job without workers yet.

        Raises:
            KeyError, TypeError, ValueError: this is not what ``export`` gives; nothing has changed.
        """
        self._courses, self.claims = [Course.of(each) for each in state["sets"]], {}

    def hand_over(self) -> dict[str, Any]:
        """Plain JSON data: all but the claims, which come again with the pushes that are not decided."""
        return {"before": self._before, "sets": [course.hand_over() for course in self._courses]}

    def take_over(self, state: Mapping[str, Any]) -> None:
        """Be what ``hand_over`` described: a lead whose workers keep the samples that they were given.

        Raises:
            KeyError, TypeError, ValueError: this is not what ``hand_over`` gives.
        """
        self.restore(state)
        self._before = int(state["before"])
        for course, told in zip(self._courses, state["sets"], strict=True):
            course.take_over(told)

    def begin_after(self, epoch: int) -> None:
        """Sessions of up to this roster epoch may live on with samples of a lead of before: have them join again."""
        self._before = epoch

    # ------------------------------------------------------------ inside

    def _covered(self, life: Life, number: int, reader: Reader) -> int:
        """Samples of a data set that pushes of this life cover, whether they are settled or not."""
        claims = (covers for claim, covers in self.claims.items() if claim[:2] == life)
        return max(reader.settled, *(samples for covers in claims for n, samples in covers if n == number), 0)

    def _known(self, worker: str, session: int) -> None:
        if session <= self._before:
            raise UnknownWorker(
                f"session {session} of worker {worker!r} is older than this lead, which gave it no samples; join again"
            )

    def _course(self, ask: Ask) -> tuple[int, Course]:
        data = ask.data
        if not 1 <= data.size < 1 << 53 or not 0 <= data.seed < 1 << 63 or len(data.name) > MAX_NAME:
            raise ProtocolError(
                f"worker {ask.worker!r} names an impossible data set: {data.size} samples, seed {data.seed}"
            )
        if not 1 <= ask.batch < 1 << 31 or not 1 <= ask.epochs < 1 << 31:
            numbers = f"{ask.batch} and {ask.epochs}"
            raise ProtocolError(f"batch and epochs of worker {ask.worker!r} must be >= 1; got {numbers}")
        for number, course in enumerate(self._courses):
            if course.data == data:
                return number, course
        if len(self._courses) == MAX_SETS:
            raise ProtocolError(
                f"worker {ask.worker!r} brings data set number {MAX_SETS + 1} ; use epochs=N, not a seed per epoch"
            )
        self._courses.append(Course(data, 0, [(0, data.size)]))
        return len(self._courses) - 1, self._courses[-1]

    def _unready(self, course: Course, roster: Roster, open_step: int) -> Later | None:
        """In step, a deal is for everyone: whom it has to wait for."""
        if self._mode.stale:
            return None
        if not roster.open:
            here = spoken(tuple([m.name for m in roster.members]))
            return Later((), f"the data is dealt when the first workers are complete; {here} joined")
        epoch = course.epoch + course.complete
        there = [(m.name, course.readers.get(m.life)) for m in roster.members if m.first_step <= open_step]
        names = tuple([name for name, r in there if r is None or (r.epochs <= epoch and not r.broke_off)])
        if not names:
            return None
        what = f"epoch {epoch} of {course.data.called}"
        return Later(names, f"{what} is dealt to all at once, and {spoken(names)} has not asked for it")


def _epochs(count: int) -> str:
    return "1 epoch" if count == 1 else f"{count} epochs"
