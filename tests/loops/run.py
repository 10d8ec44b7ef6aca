"""What a loop gets: a model, an optimizer, and batches that depend on the worker and the step only."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

SIZE, INPUTS, CLASSES = 16, 12, 7


class Run:
    """One run of a loop, by plain torch or by a worker. A loop reads and writes what it likes.

    Args:
        model: model to train; maps (16, 12) floats to (16, 7) unless the loop knows better.
        optimizer: torch's own, or the one that wraps it.
        rank: place of the worker, 0 for one alone.
        world: number of workers.
        is_plain: whether plain torch runs the loop, for a loop that has to say itself what a worker is to make of it.

    Attributes:
        notes: what a loop wants to be compared, too, by name.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, world: int, *, is_plain: bool
    ) -> None:
        self.model: Any = model
        self.optimizer: Any = optimizer
        self.rank, self.world, self.is_plain = rank, world, is_plain
        self.notes: dict[str, Any] = {}

    def generator(self, number: int) -> torch.Generator:
        """Random numbers of this worker's own."""
        return torch.Generator().manual_seed(1000 * self.rank + number)

    def batch(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs, shape (16, 12), and labels, shape (16,), of this worker."""
        generator = self.generator(number)
        return torch.randn(SIZE, INPUTS, generator=generator), torch.randint(CLASSES, (SIZE,), generator=generator)

    def loss(self, number: int) -> Any:
        """Loss of the model on a batch."""
        inputs, labels = self.batch(number)
        return nn.functional.cross_entropy(self.model(inputs).float(), labels)

    def train(self, *numbers: int) -> None:
        """Train on these batches, as most loops do."""
        for number in numbers:
            self.loss(number).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()


Loop = Callable[[Run], None]
