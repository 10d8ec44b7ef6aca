"""The optimizers of one worker that one data set feeds: generator and discriminator, actor and critic.

    samples come --> each gets the weight of the batch
    none are left, others have some --> in each job in which others wait for this worker: push weight 0

Rules of this file
  1. The first optimizer's job gives out the samples, and its pushes cover them. The others' jobs know of no samples, so
     nothing there says that this worker has none: it has to ask who waits for it.
  2. A worker takes part only where others wait for it. So loops may step one optimizer more often than another.
  3. Every synchronous step waits for all of its workers, so no worker can be a step ahead of one that waits: taking
     part in one job after the other never keeps two workers waiting for each other.
  4. A worker that joins the jobs one after the other may come to a later step of the second than of the first. Then it
     waits in one job for workers that wait for it in another one. It takes part there with weight 0, and is in step.
"""

import threading
import time
from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar, cast

from torch_ps.common.errors import ConfigError
from torch_ps.worker.runtime.jobs_here import companions_of
from torch_ps.worker.session.session import Session

#: Seconds between two questions who waits for this worker: at first, and at most.
FIRST_PAUSE, LAST_PAUSE = 0.002, 0.05


_now = threading.local()  # whether this thread takes part elsewhere already, in the middle of a step


class Companion(Protocol):
    """What this file uses of a ``ParameterServerOptimizer``, which uses this file."""

    weight: float

    @property
    def session(self) -> Session: ...
    def settle(self) -> None: ...
    def close(self) -> None: ...


def others_of(member: Companion) -> list[Companion]:
    """The optimizers of this worker in other jobs, oldest first."""
    return cast(list[Companion], companions_of(member))


def take_part_elsewhere(member: Companion) -> None:
    """Push weight 0 in a job whose workers wait for this one while this one waits for them in ``member``'s job.

    Args:
        member: optimizer that is in the middle of a step.
    """
    others = others_of(member)
    if not others or getattr(_now, "elsewhere", False):
        return
    name, theirs = member.session.name, member.session.waits()
    for other in others:
        waiting = {who for who, whom in other.session.waits().items() if other.session.name in whom}
        if waiting & set(theirs.get(name, ())):
            _now.elsewhere = True
            try:
                other.settle()
            finally:
                _now.elsewhere = False
            return


C = TypeVar("C", bound=Companion)


class Companions(Generic[C]):
    """The optimizers of this worker that take part when the first one's job has no samples for it.

    Args:
        first: optimizer whose job gives out the samples.
        others: the others; if there are none, those of this worker that are in other jobs.

    Raises:
        ConfigError: two optimizers are one, or are in one job.
    """

    def __init__(self, first: C, others: Sequence[C]) -> None:
        self.all: tuple[C, ...] = (first, *(others or cast(list[C], others_of(first))))
        if len({id(each) for each in self.all}) < len(self.all):
            raise ConfigError("torch_ps.shard got one optimizer twice; give each model's optimizer once")

    def __len__(self) -> int:
        return len(self.all)

    def weigh(self, samples: float) -> None:
        """Set the weight of the next gradient of each."""
        for each in self.all:
            each.weight = samples

    def find_awaited(self) -> C | None:
        """The first in whose job others wait for this worker; None if nobody does.

        Ask for samples once more before it takes part: another worker may wait for a batch that was dealt meanwhile.
        """
        for each in self.all:
            if any(each.session.name in whom for whom in each.session.waits().values()):
                return each
        return None


class Pause:
    """Pauses between questions: short at first, then longer."""

    def __init__(self) -> None:
        self._seconds = FIRST_PAUSE

    def sleep(self) -> None:
        time.sleep(self._seconds)
        self._seconds = min(2 * self._seconds, LAST_PAUSE)
