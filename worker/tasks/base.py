"""The base class of all tasks: a model, its data, and how to measure it.

A task knows torch and nothing of servers, of ranks on other machines, of clocks or of event logs. This file imports
torch for the types of its signatures only, so that the launcher can look up names without loading it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn


class Task:
    """The protocol of all tasks, with defaults for what few of them need.

    Attributes:
        name: name in logs and reports.
        default_lr: learning rate where none is given, that of an asynchronous job (see ``optimizer``).
        default_batch_size: samples of one step of one worker where no number is given.
    """

    name: str = ""
    default_lr: float = 0.1
    default_batch_size: int = 32

    def model(self) -> nn.Module:
        """A fresh model on the CPU. The caller has seeded torch, so equal seeds give equal parameters."""
        raise NotImplementedError

    def optimizer(self, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        """The optimizer that the servers run on the parameters of ``model``."""
        raise NotImplementedError

    def batches(self, rank: int, world: int, batch_size: int, seed: int) -> Iterator[Any]:
        """This worker's batches, on the CPU, without end.

        A batch is a tensor or a tuple, list or dict of tensors whose first dimension counts samples. In the ready-made
        tasks the workers' batches number k together are batch number k of one worker with ``world`` times the size.

        Args:
            rank: place of this worker, 0 <= rank < world.
            world: number of workers that share the data.
            batch_size: samples in a batch.
            seed: seed of the order of the data, the same on all workers.
        """
        raise NotImplementedError

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        """Mean loss over the samples of ``batch``, a scalar. The batch is on the model's device."""
        raise NotImplementedError

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Figures on validation data: "loss" and perhaps "accuracy". Deterministic.

        The caller has put the model into evaluation mode and switched gradients off.
        """
        raise NotImplementedError

    def schedule(self, progress: float) -> float:
        """Factor of the learning rate when ``progress`` (0 to 1) of the job's samples are done."""
        return 1.0

    def sample(self, model: nn.Module) -> str | None:
        """Text that the trained model writes, for people to look at; None where a model writes none."""
        return None
