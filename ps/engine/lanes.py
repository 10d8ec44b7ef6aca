"""Lanes: each bucket's jobs run in order, one run at a time; lanes of different buckets run in parallel.

    add(bucket, job) --> lane --start()--> apply thread: work(bucket, jobs) --> finished --> event loop: on_done(done)

Rules of this file
  1. ``work`` gets one run of a bucket at a time: all jobs that can go by then, oldest first.
  2. Waking the event loop costs about as much as a small response, so up to ``TOGETHER`` concurrent runs share one
     wake. A large result wakes the loop by itself. No result waits for a run that has not started.
  3. The event loop itself runs the jobs of a small bucket, for which the hand-over would cost more than the work. On a
     GPU no bucket is small: a run waits for the device.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from torch_ps.common.plan import Bucket

#: Largest number of runs whose results share one wake of the event loop.
TOGETHER = 4
#: Largest number of values of a small bucket: about 10 us of an optimizer step, against 100 us of hand-over.
SMALL = 16384


class Result(Protocol):
    """Result of one run."""

    @property
    def large(self) -> bool:
        """Whether it wakes the event loop by itself."""


LaneJob = TypeVar("LaneJob")
Done = TypeVar("Done", bound=Result)


@dataclass(slots=True)
class _Lane(Generic[LaneJob]):
    bucket: Bucket
    todo: deque[LaneJob] = field(default_factory=deque)
    busy: bool = False


class Lanes(Generic[LaneJob, Done]):
    """The lanes of one shard. Everything but ``work`` runs on the event loop.

    Args:
        buckets: Buckets of the shard; each gets a lane.
        executor: Apply threads.
        work: Executes jobs of one bucket, on an apply thread or, for a small bucket, on the event loop.
        small: Buckets with at most this many values run on the event loop.
        must_wait: Returns whether a job, and all jobs behind it in its lane, cannot run yet.
        on_done: Called with the result of each run.
        on_failure: Called with an exception of ``work`` or ``on_done``, which contain what they can; the lane runs
            nothing more after it.
    """

    def __init__(
        self,
        buckets: Iterable[Bucket],
        executor: Executor,
        work: Callable[[Bucket, list[LaneJob]], Done],
        *,
        small: int,
        must_wait: Callable[[LaneJob], bool],
        on_done: Callable[[Done], None],
        on_failure: Callable[[BaseException], None],
    ) -> None:
        self._lanes: dict[int, _Lane[LaneJob]] = {bucket.index: _Lane(bucket) for bucket in buckets}
        self._executor, self._work, self._small, self._must_wait = executor, work, small, must_wait
        self._on_done, self._on_failure = on_done, on_failure
        self._loop = asyncio.get_running_loop()
        self._finished: deque[tuple[_Lane[LaneJob], Done | BaseException]] = deque()
        self._num_running, self._woken = 0, False

    @property
    def queued(self) -> int:
        """Number of lanes that have work."""
        return sum(bool(lane.busy or lane.todo) for lane in self._lanes.values())

    def add(self, bucket: int, job: LaneJob) -> None:
        """Append a job; ``start`` runs it."""
        self._lanes[bucket].todo.append(job)

    def start(self, bucket: int) -> None:
        """Run all jobs of one bucket that can go, unless a run of it is in progress."""
        lane = self._lanes[bucket]
        jobs = self._next(lane)
        if not jobs:
            return
        self._num_running += 1
        if lane.bucket.numel > self._small:
            self._executor.submit(self._run, lane, jobs)
            return
        self._finished.append((lane, self._result(lane, jobs)))
        self._collect()

    def _next(self, lane: _Lane[LaneJob]) -> list[LaneJob]:
        """Take the jobs that can go now and mark the lane busy."""
        jobs: list[LaneJob] = []
        while not lane.busy and lane.todo and not self._must_wait(lane.todo[0]):
            jobs.append(lane.todo.popleft())
        lane.busy = lane.busy or bool(jobs)
        return jobs

    def _result(self, lane: _Lane[LaneJob], jobs: list[LaneJob]) -> Done | BaseException:
        try:
            return self._work(lane.bucket, jobs)
        except BaseException as error:  # noqa: BLE001 - the event loop handles it
            return error

    def _run(self, lane: _Lane[LaneJob], jobs: list[LaneJob]) -> None:
        """Execute one run on an apply thread."""
        done = self._result(lane, jobs)
        self._finished.append((lane, done))
        at_once = isinstance(done, BaseException) or done.large
        if not self._woken and (at_once or len(self._finished) >= min(TOGETHER, self._num_running)):
            self._woken = True
            self._loop.call_soon_threadsafe(self._collect)

    def _collect(self) -> None:
        self._woken = False  # first, so that a result that arrives during the loop below wakes it again
        while self._finished:
            lane, done = self._finished.popleft()
            self._num_running -= 1
            if isinstance(done, BaseException):
                self._on_failure(done)
                continue
            try:
                self._on_done(done)
            except Exception as error:  # noqa: BLE001 - what was not sent would be waited for forever
                self._on_failure(error)
                continue
            lane.busy = False
            self.start(lane.bucket.index)
