"""Measuring a model without stopping the clock: copies during training, evaluation after it.

    samples of the job   0 ------- 1/3 ------- 2/3 ------- all
                         copy      copy        copy        copy       the clock stops; evaluate, evaluate, ...

So runs that are compared differ by what they do, not by how long their validation takes.
"""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from torch_ps.worker.tasks import Task

log = logging.getLogger("torch_ps.worker")

#: Bytes that all copies of a model may take together.
MOST_MEMORY = 2 << 30


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Parameters and buffers on the CPU, as they were at ``time`` (unix seconds)."""

    time: float
    samples: int
    state: dict[str, torch.Tensor]


class Snapshots:
    """Copies of ``model`` at ``count`` equidistant points of the job, the first before it and the last at its end.

    Args:
        model: copied from.
        total: samples of the job.
        count: copies; fewer are made of a model so large that they would take more than 2 GiB.
    """

    def __init__(self, model: nn.Module, total: int, count: int) -> None:
        self._model = model
        size = sum(each.numel() * each.element_size() for each in model.state_dict().values())
        affordable = max(1, MOST_MEMORY // max(1, size))
        if count > affordable:
            log.warning(
                "the model takes %.2f GiB, so it is measured at %d points, not %d", size / 2**30, affordable, count
            )
            count = affordable
        # A single one is taken at the end.
        self._due = [total * k / (count - 1) for k in range(count)] if count > 1 else [float(total)] * count
        self._taken: list[Snapshot] = []

    def look(self, samples: int) -> None:
        """Copy the model if a point has been reached; called with the samples that the job has absorbed."""
        if not self._due or samples < self._due[0]:
            return
        while self._due and samples >= self._due[0]:
            self._due.pop(0)
        state = {name: each.detach().to("cpu", copy=True) for name, each in self._model.state_dict().items()}
        self._taken.append(Snapshot(time.time(), samples, state))

    def evaluate(self, task: Task) -> Iterator[tuple[Snapshot, dict[str, float]]]:
        """Measure the copies in order. Afterwards the model holds the last one, in evaluation mode."""
        self._model.eval()
        for snapshot in self._taken:
            self._model.load_state_dict(snapshot.state)
            with torch.inference_mode():
                yield snapshot, {name: float(value) for name, value in task.evaluate(self._model).items()}
