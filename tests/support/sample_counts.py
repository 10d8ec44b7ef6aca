"""A model whose parameters count how often each sample was trained on.

One parameter per sample, and the loss is the mean of the parameters of a batch: the gradient is not zero exactly where
samples were. The job counts the weights of all pushes that were applied, which are the sizes of the batches. So if no
parameter is zero and the job has counted as many samples as there are, each was trained on exactly once.
"""

from collections.abc import Generator
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

import torch_ps


class Counting(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(size))

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        return self.x[indices].mean()


def samples(size: int) -> TensorDataset:
    """Sample i is the number i."""
    return TensorDataset(torch.arange(size))


class Trainer:
    """One worker of such a job: ``for indices in trainer`` makes one step after each batch."""

    def __init__(self, servers: str, name: str, size: int, **options: Any) -> None:
        self.model = Counting(size)
        self.optimizer = torch_ps.ParameterServerOptimizer(
            torch.optim.SGD(self.model.parameters(), lr=1.0), self.model, servers, name=name, **options
        )
        self._size = size

    def epochs(self, **shard: Any) -> Generator[list[int], None, None]:
        """Train; yields the samples of each step when it is made."""
        for (indices,) in torch_ps.shard(samples(self._size), self.optimizer, **shard):
            self.model(indices).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            yield indices.tolist()

    def close(self) -> None:
        self.optimizer.close()
