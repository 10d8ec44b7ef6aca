"""Workers that train on leased samples of a fixed data set, and say what they trained on."""

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

import torch_ps
from tests.support.threads import at_once
from tests.support.training import MakeOptimizer, mlp, seeded

SIZE, BATCH, EPOCHS = 45, 4, 2


@dataclass
class Told:
    """Report of one worker: samples and loss of each step, and the model in the end."""

    samples: list[list[int]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    model: nn.Module = field(default_factory=lambda: seeded(mlp))


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    return TensorDataset(
        torch.arange(SIZE),
        torch.randn(SIZE, 12, generator=generator),
        torch.randint(7, (SIZE,), generator=generator),
    )


def train_leased(
    servers: str, make: MakeOptimizer, stop: int, num_workers: int = 2, *, pause: float = 0.0, **options: Any
) -> list[Told]:
    """Fresh workers train from the version that the job has to version ``stop``, or to the end of the epochs.

    Args:
        pause: seconds that a step takes longer, so that something else can happen meanwhile.
    """
    told = [Told() for _ in range(num_workers)]

    def worker(rank: int) -> None:
        me = told[rank]
        with torch_ps.ParameterServerOptimizer(
            make(me.model), me.model, servers, name=f"w{rank}", **options
        ) as optimizer:
            for indices, inputs, labels in torch_ps.shard(data(), optimizer, batch_size=BATCH, seed=3, epochs=EPOCHS):
                loss: torch.Tensor = nn.functional.cross_entropy(me.model(inputs), labels)
                loss.backward()  # type: ignore[no-untyped-call]
                time.sleep(pause)
                optimizer.step()
                optimizer.zero_grad()
                me.samples.append(indices.tolist())
                me.losses.append(loss.item())
                if optimizer.version == stop:
                    break

    at_once(*(lambda r=rank: worker(r) for rank in range(num_workers)))
    return told
