"""Tells a worker, once, that nothing of what it pushes counts, and why: otherwise it would train on without effect.

push --pushed()--> answer --answered()--> the MOST-th push in a row that does not count: one warning

A push does not count if its weight is 0 (nothing to say, or a gradient that is not finite), if it comes after its step
has closed, or if it is too stale. Now and then each of these is usual; many in a row are not.
"""

import logging
from collections import Counter

log = logging.getLogger("torch_ps.worker")

#: Pushes in a row after which the warning comes.
MOST = 20

_NOT_FINITE = (
    "their gradients are not finite: lower the learning rate, clip gradients, or look for what is wrong in data"
)
_NO_WEIGHT = "their weight is 0: set optimizer.weight (Client.push(weight=...)) to the number of samples of the batch"
_LATE = (
    "they come after their steps have closed: start the servers with fewer --backup-workers, or give this worker less "
    "work for each step"
)
_STALE = (
    "they are too stale: start the servers with a larger --max-staleness, or give this worker less work for each step"
)


class DroppedPushes:
    """Counts pushes in a row that do not count.

    Args:
        worker: name of the worker.
        averages: whether a step applies the mean of all workers' gradients, as in sync mode, where a push can be late;
            elsewhere it can be too stale.
    """

    def __init__(self, worker: str, *, averages: bool) -> None:
        self._worker, self._averages = worker, averages
        self._reasons = Counter[str]()
        self._why: str | None = None  # the push that is not answered yet cannot count; None: there is no such push
        self._told = False

    def pushed(self, weight: float, *, nonfinite: bool, idle: bool) -> None:
        """Note one bucket of a push.

        Args:
            weight: weight of the push.
            nonfinite: whether the weight is 0 because a gradient is not finite.
            idle: whether a weight of 0 is as it should be: the worker has no samples left, and others have.
        """
        self._why = _NOT_FINITE if nonfinite else _NO_WEIGHT if not weight and not idle else ""

    def answered(self, *, applied: bool) -> None:
        """Note that the push is answered, and warn if it is the ``MOST``-th that does not count.

        Args:
            applied: whether the servers have applied it.
        """
        why, self._why = self._why, None
        if why is None or self._told:
            return
        if not why and applied:
            self._reasons.clear()
            return
        self._reasons[why or (_LATE if self._averages else _STALE)] += 1
        if self._reasons.total() >= MOST:
            self._told = True
            (reason, _), *_ = self._reasons.most_common(1)
            log.warning("none of the last %d pushes of worker %s counts, as %s", MOST, self._worker, reason)
