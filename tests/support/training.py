"""Small models and a training loop that is the same with and without the parameter server."""

from collections.abc import Callable

import torch
from torch import nn

Make = Callable[[], nn.Module]
MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 33), nn.Tanh(), nn.Linear(33, 7))


def conv() -> nn.Module:
    """Convolutions with BatchNorm, so with buffers of floats and of integers."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 3, 4)),
        nn.Conv2d(1, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 5, 3, padding=1),
        nn.Flatten(),
        nn.Linear(60, 7),
    )


class Experts(nn.Module):
    """A mixture of experts: a batch goes through the shared layers and one of three experts; a fourth is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(12, 9), nn.Linear(9, 7)
        self.experts = nn.ModuleList(nn.Linear(9, 9) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen = int(1000 * x[0, 0]) % 3
        y: torch.Tensor = self.last(self.experts[chosen](self.first(x).tanh()).tanh())
        return y


def seeded(make: Make, seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return make()


def batch(step: int, worker: int = 0, size: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * worker + step)
    return torch.randn(size, 12, generator=generator), torch.randint(7, (size,), generator=generator)


def backward(model: nn.Module, step: int, worker: int = 0, size: int = 16) -> torch.Tensor:
    inputs, labels = batch(step, worker, size)
    loss: torch.Tensor = nn.functional.cross_entropy(model(inputs).float(), labels)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss


def same(one: nn.Module, other: nn.Module) -> bool:
    """Whether all parameters and buffers have the same bits."""
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)
