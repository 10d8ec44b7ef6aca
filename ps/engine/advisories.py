"""Warnings about the settings, shown once in the log, in ps-status and in /metrics."""

import logging
from collections.abc import Callable, Sequence

from torch_ps.common.optimizer_spec import number_of
from torch_ps.common.plan import Bucket
from torch_ps.common.schema import Model
from torch_ps.ps.core.modes import Mode
from torch_ps.ps.engine.divergence_monitor import DivergenceMonitor, create_monitor
from torch_ps.ps.engine.equal_gradients import EqualGradients
from torch_ps.ps.observability.shard_metrics import Metrics

log = logging.getLogger("torch_ps.ps")


class Advice:
    """Warnings of one shard.

    Args:
        mode: Mode of the job.
        metrics: Metrics of the shard.

    Attributes:
        sentences: Warnings so far, oldest first.
    """

    def __init__(self, mode: Mode, metrics: Metrics) -> None:
        self._mode, self._metrics = mode, metrics
        self._settings_told = False
        self.sentences: list[str] = []

    def check_settings(self, model: Model, num_workers: int) -> None:
        """Warn once of a combination of mode, momentum and number of workers that is known to diverge."""
        momentum = [number_of(group.hyper.get("momentum"), 0.0) for group in model.groups]
        found = self._mode.advice(max(momentum, default=0.0), num_workers)
        if found is not None and not self._settings_told:
            self._settings_told = True
            self.say(found)

    def monitor(
        self, model: Model, buckets: Sequence[Bucket], num_workers: Callable[[], int]
    ) -> DivergenceMonitor | None:
        """Monitor for the lead. Other shards need none: their buckets oscillate together with the lead's."""
        return create_monitor(
            self._mode, model, buckets, num_workers=num_workers, advise=self.say, report=self._metrics.stability
        )

    def equal_gradients(self) -> EqualGradients:
        """Comparison of the workers' gradients for the lead. Its buckets stand for those of the other shards."""
        return EqualGradients(self.say)

    def say(self, sentence: str) -> None:
        """Log a warning and keep it. May be called on any thread."""
        log.warning("%s", sentence)
        self.sentences.append(sentence)
