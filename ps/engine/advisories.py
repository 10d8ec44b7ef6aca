"""Warnings about the settings, for people: said once, in the log, in ps-status and in /metrics."""

import logging
from collections.abc import Callable, Sequence

from torch_ps.common.plan import Bucket
from torch_ps.common.schema import Model
from torch_ps.ps.core.modes import Mode
from torch_ps.ps.engine.divergence_monitor import Doctor, doctor_of
from torch_ps.ps.observability.metrics import Metrics

log = logging.getLogger("torch_ps.ps")


class Advice:
    """``sentences`` are what has been said so far."""

    def __init__(self, mode: Mode, metrics: Metrics) -> None:
        self._mode, self._metrics = mode, metrics
        self.sentences: list[str] = []

    def check_settings(self, model: Model, num_workers: int) -> None:
        """Say once what is known to go wrong before anything has."""
        momentum = [m for g in model.groups if isinstance(m := g.hyper.get("momentum"), int | float)]
        found = self._mode.advice(max(momentum, default=0.0), num_workers)
        if found is not None and not self.sentences:
            self.say(found)

    def doctor(self, model: Model, buckets: Sequence[Bucket], num_workers: Callable[[], int]) -> Doctor | None:
        """The lead's alone: its buckets swing as the others' do, and one sentence is enough."""
        return doctor_of(
            self._mode, model, buckets, num_workers=num_workers, advise=self.say, report=self._metrics.stability
        )

    def say(self, sentence: str) -> None:
        """On any thread."""
        log.warning("%s", sentence)
        self.sentences.append(sentence)
