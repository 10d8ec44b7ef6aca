"""Validation curve without pauses in training: parameters are copied during training and evaluated after it.

    samples of the job   0 ------- 1/3 ------- 2/3 ------- all
                         copy      copy        copy        copy       training ends; evaluate each copy

So the time of a run does not include its validation, and runs can be compared.
"""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from torch_ps.worker.tasks import Task

log = logging.getLogger("torch_ps.worker")

#: Bytes that all copies together may take.
MOST_MEMORY = 2 << 30


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Parameters and buffers on the CPU, as they were at ``time`` (unix seconds)."""

    time: float
    samples: int
    state: dict[str, torch.Tensor]


class Snapshots:
    """Copies of a model at ``count`` equidistant points of the job, the first at its start and the last at its end.

    Args:
        model: model to copy.
        total: samples that the job trains on.
        count: number of copies; reduced if they would take more than 2 GiB. One copy is taken at the end.
    """

    def __init__(self, model: nn.Module, total: int, count: int) -> None:
        self._model = model
        size = sum(each.numel() * each.element_size() for each in model.state_dict().values())
        affordable = max(1, MOST_MEMORY // max(1, size))
        if count > affordable:
            log.warning(
                "the model takes %.2f GiB: it is evaluated at %d points instead of %d, so that all copies fit in 2 GiB",
                size / 2**30,
                affordable,
                count,
            )
            count = affordable
        self._due = [total * k / (count - 1) for k in range(count)] if count > 1 else [float(total)] * count
        self._taken: list[Snapshot] = []

    def copy_if_due(self, samples: int) -> None:
        """Copy the model if the job has reached the next point; ``samples`` counts those the job has absorbed."""
        if not self._due or samples < self._due[0]:
            return
        while self._due and samples >= self._due[0]:
            self._due.pop(0)
        state = {name: each.detach().to("cpu", copy=True) for name, each in self._model.state_dict().items()}
        self._taken.append(Snapshot(time.time(), samples, state))

    def evaluate(self, task: Task) -> Iterator[tuple[Snapshot, dict[str, float]]]:
        """Evaluate the copies in order. Afterwards the model holds the last one, in evaluation mode."""
        self._model.eval()
        for snapshot in self._taken:
            self._model.load_state_dict(snapshot.state)
            with torch.inference_mode():
                yield snapshot, {name: float(value) for name, value in task.evaluate(self._model).items()}
