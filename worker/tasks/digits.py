"""Handwritten digits: 1797 images of 8 x 8 pixels, shipped with the package; a small network and a residual one.

    mlp    64 - 64 - 10, ReLU; 4,810 parameters
    cnn    3x3 convolutions with BatchNorm: 16, then two residual blocks of 16 and 32, mean, 10; 21,000 parameters

Split: images are permuted with seed 0; the first 297 are validation, the other 1500 training.
The optimizer is plain SGD, because an adaptive one would hide what a mode does to the optimization.

Source: E. Alpaydin and C. Kaynak, UCI optdigits, CC BY 4.0; see digits.txt. He et al., arXiv:1512.03385, for the block.
"""

import gzip
from collections.abc import Iterator
from functools import cache
from importlib import resources

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from torch_ps.common.errors import ConfigError
from torch_ps.worker.tasks import sampler
from torch_ps.worker.tasks.base import Task

VALIDATION = 297
CLASSES = 10

Batch = tuple[torch.Tensor, torch.Tensor]


@cache
def read() -> tuple[TensorDataset, TensorDataset]:
    """Training and validation set.

    Returns:
        Two sets of (image, label). image: shape (64,), float32, 0 (background) to 1, row by row.
        label: shape (), int64, 0 to 9.
    """
    with resources.files(__package__).joinpath("digits.csv.gz").open("rb") as packed, gzip.open(packed, "rt") as lines:
        table = torch.from_numpy(np.loadtxt(lines, delimiter=",", dtype=np.float32))
    order = torch.randperm(len(table), generator=torch.Generator().manual_seed(0))
    images, labels = table[order, :64] / 16, table[order, 64].long()
    validation = TensorDataset(images[:VALIDATION], labels[:VALIDATION])
    return TensorDataset(images[VALIDATION:], labels[VALIDATION:]), validation


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, CLASSES))


class Residual(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        stride = 1 if channels_in == channels else 2
        self.path = nn.Sequential(
            nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, 1, 1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride == 2:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.path(x) + self.shortcut(x))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, 1, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        Residual(16, 16),
        Residual(16, 32),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, CLASSES),
    )


class DigitsTask(Task):
    """Which digit an image shows; ``kind`` is "mlp" or "cnn"."""

    default_lr = 0.1
    default_batch_size = 32

    def __init__(self, kind: str = "mlp", data: str = "") -> None:
        if data:
            raise ConfigError(f"task digits has its own images and reads no data; got data={data!r}; leave --data out")
        self.name = "digits" if kind == "mlp" else f"digits:{kind}"
        self._make = {"mlp": mlp, "cnn": cnn}[kind]

    def model(self) -> nn.Module:
        return self._make()

    def optimizer(self, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=lr)

    def batches(self, rank: int, world: int, batch_size: int, seed: int) -> Iterator[Batch]:
        images, labels = read()[0].tensors
        for index in sampler.shuffled(len(labels), rank, world, batch_size, seed):
            yield images[index], labels[index]

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        images, labels = batch
        return F.cross_entropy(model(images), labels)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        device = next(model.parameters()).device
        images, labels = (tensor.to(device) for tensor in read()[1].tensors)
        logits = model(images)
        accuracy = (logits.argmax(1) == labels).float().mean().item()
        return {"loss": F.cross_entropy(logits, labels).item(), "accuracy": accuracy}
