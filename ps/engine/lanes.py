"""Lanes: the jobs of one bucket in order, one run at a time; those of different buckets side by side.

    add(bucket, job) --> its lane --start()--> executor: work(bucket, jobs) --> finished --> loop: on_done(bucket, ...)

Rules of this file
  1. ``work`` sees one run of a bucket at a time, with all jobs that could go by then, oldest first.
  2. To wake the loop costs about as much as a small answer, so a few runs that are under way at once share it. What is
     large is worth a wake of its own. Nothing waits for what is not under way.
  3. A bucket so small that the hand-over costs more than the work is worked on by the loop itself; on a GPU none is,
     for there the work waits for the GPU.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from torch_ps.common.plan import Bucket

#: Runs whose results reach the loop together at most.
TOGETHER = 4
#: Values of a bucket that the loop works on itself: some 10 us of an optimizer step, against 100 us of hand-over.
SMALL = 16384


class Result(Protocol):
    """What a run has made."""

    @property
    def large(self) -> bool:
        """Whether to hand it over at once."""


Job = TypeVar("Job")
Done = TypeVar("Done", bound=Result)


@dataclass(slots=True)
class _Lane(Generic[Job]):
    bucket: Bucket
    todo: deque[Job] = field(default_factory=deque)
    busy: bool = False


class Lanes(Generic[Job, Done]):
    """The lanes of one shard; everything but ``work`` runs on the event loop.

    Args:
        work: does the jobs of one bucket, on a thread of the executor or, of a small one, on the event loop.
        small: of a bucket that is small, values at most.
        waits: whether a job, and all behind it in its lane, cannot go yet.
        on_done: takes the result of one run.
        on_failure: takes what ``work`` raised; the lane stays closed then.
    """

    def __init__(
        self,
        buckets: Iterable[Bucket],
        executor: Executor,
        work: Callable[[Bucket, list[Job]], Done],
        *,
        small: int,
        waits: Callable[[Job], bool],
        on_done: Callable[[Done], None],
        on_failure: Callable[[BaseException], None],
    ) -> None:
        self._lanes: dict[int, _Lane[Job]] = {bucket.index: _Lane(bucket) for bucket in buckets}
        self._executor, self._work, self._small, self._waits = executor, work, small, waits
        self._on_done, self._on_failure = on_done, on_failure
        self._loop = asyncio.get_running_loop()
        self._finished: deque[tuple[_Lane[Job], Done | BaseException]] = deque()
        self._under_way, self._woken = 0, False

    @property
    def queued(self) -> int:
        """Lanes that have work."""
        return sum(bool(lane.busy or lane.todo) for lane in self._lanes.values())

    def add(self, bucket: int, job: Job) -> None:
        """Append a job; ``start`` sets it going."""
        self._lanes[bucket].todo.append(job)

    def start(self, bucket: int) -> None:
        """Set going what can go of one bucket."""
        lane = self._lanes[bucket]
        jobs = self._next(lane)
        if not jobs:
            return
        self._under_way += 1
        if lane.bucket.numel > self._small:
            self._executor.submit(self._run, lane, jobs)
            return
        self._finished.append((lane, self._result(lane, jobs)))
        self._collect()

    def _next(self, lane: _Lane[Job]) -> list[Job]:
        """What can go now; the lane is busy with it."""
        jobs: list[Job] = []
        while not lane.busy and lane.todo and not self._waits(lane.todo[0]):
            jobs.append(lane.todo.popleft())
        lane.busy = lane.busy or bool(jobs)
        return jobs

    def _result(self, lane: _Lane[Job], jobs: list[Job]) -> Done | BaseException:
        try:
            return self._work(lane.bucket, jobs)
        except BaseException as error:  # noqa: BLE001 - it belongs to the loop
            return error

    def _run(self, lane: _Lane[Job], jobs: list[Job]) -> None:
        """On the executor."""
        done = self._result(lane, jobs)
        self._finished.append((lane, done))
        at_once = isinstance(done, BaseException) or done.large
        if not self._woken and (at_once or len(self._finished) >= min(TOGETHER, self._under_way)):
            self._woken = True
            self._loop.call_soon_threadsafe(self._collect)

    def _collect(self) -> None:
        self._woken = False  # before the look, so that what comes after it wakes the loop again
        while self._finished:
            lane, done = self._finished.popleft()
            self._under_way -= 1
            if isinstance(done, BaseException):
                self._on_failure(done)
                continue
            self._on_done(done)
            lane.busy = False
            self.start(lane.bucket.index)
