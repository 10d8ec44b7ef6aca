"""The optimizers of one worker that one data set feeds: generator and discriminator, actor and critic.

    samples come --> each gets the weight of the batch
    none are left, others have some --> in each job in which others wait for this worker: push weight 0

Rules of this file
  1. The first optimizer's job gives out the samples, and its pushes cover them. The others' jobs know of no samples, so
     nothing there says that this worker has none: it has to ask who waits for it.
  2. A worker takes part only where others wait for it. So loops may step one optimizer more often than another.
  3. Every synchronous step waits for all of its workers, so no worker can be a step ahead of one that waits: taking
     part in one job after the other never keeps two workers waiting for each other.
"""

import time
from collections.abc import Sequence

from torch_ps.common.errors import ConfigError
from torch_ps.worker.optim.optimizer import ParameterServerOptimizer
from torch_ps.worker.runtime.jobs_here import companions_of

#: Seconds between two questions who waits for this worker: at first, and at most.
FIRST_PAUSE, LAST_PAUSE = 0.002, 0.05


class Companions:
    """The optimizers of this worker that take part when the first one's job has no samples for it.

    Args:
        first: optimizer whose job gives out the samples.
        others: the others; if there are none, those of this worker that are in other jobs.

    Raises:
        ConfigError: two optimizers are one, or are in one job.
    """

    def __init__(self, first: ParameterServerOptimizer, others: Sequence[ParameterServerOptimizer]) -> None:
        found = others or [each for each in companions_of(first) if isinstance(each, ParameterServerOptimizer)]
        self.all = (first, *found)
        if len({id(each) for each in self.all}) < len(self.all):
            raise ConfigError("torch_ps.shard got one optimizer twice; give each model's optimizer once")

    def __len__(self) -> int:
        return len(self.all)

    def weigh(self, samples: float) -> None:
        """Set the weight of the next gradient of each."""
        for each in self.all:
            each.weight = samples

    def find_awaited(self) -> ParameterServerOptimizer | None:
        """The first in whose job others wait for this worker; None if nobody does.

        Ask for samples once more before it takes part: another worker may wait for a batch that was dealt meanwhile.
        """
        return next((each for each in self.all if each.session.awaited), None)


class Pause:
    """Pauses between questions: short at first, then longer."""

    def __init__(self) -> None:
        self._seconds = FIRST_PAUSE

    def sleep(self) -> None:
        time.sleep(self._seconds)
        self._seconds = min(2 * self._seconds, LAST_PAUSE)
