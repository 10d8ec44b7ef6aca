"""A worker of the job that chaos breaks: trains on leased samples to their end, a line per acknowledged step."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

import torch_ps
from tests.chaos.ledger import now
from tests.support.sample_counts import samples

#: Elements of ``x``, of which the first ``size`` are samples': some buckets, so that a checkpoint is no small file.
NUM_ELEMENTS = 200_000
#: What a step computes for, as a real one would.
COMPUTE_SECONDS = 0.02
#: Of one wait. Whatever happens, the harness finds a hang earlier.
TIMEOUT = 60.0


class Ledgered(nn.Module):
    """See ``tests.chaos.ledger`` for what its parameters tell."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(NUM_ELEMENTS))
        self.late = nn.Parameter(torch.zeros(1))

    def forward(self, indices: torch.Tensor, *, mean: bool) -> torch.Tensor:
        loss = self.x[indices].mean() + self.late.sum()
        return loss if mean else loss * len(indices)


def train(servers: str, name: str, size: int, data_sets: int, batch_size: int, plane: str, acks: str) -> None:
    """Train on samples 0 to ``size`` - 1, the first ``size / data_sets`` of which are the first data set, and so on."""
    model = Ledgered()
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    with (
        torch_ps.ParameterServerOptimizer(sgd, model, servers, name=name, plane=plane, timeout=TIMEOUT) as optimizer,
        Path(acks).open("a", buffering=1, encoding="utf-8") as file,
    ):
        mean = optimizer.mode == "sync"
        for indices in _batches(optimizer, size, data_sets, batch_size):
            model(indices, mean=mean).backward()
            time.sleep(COMPUTE_SECONDS)
            began = now()
            optimizer.step()
            if optimizer._last.applied:
                file.write(
                    json.dumps(
                        [began, optimizer.session.version_of(optimizer.session.plan.buckets[0]), indices.tolist()]
                    )
                    + "\n"
                )
            optimizer.zero_grad()


def _batches(
    optimizer: torch_ps.ParameterServerOptimizer, size: int, data_sets: int, batch_size: int
) -> Iterator[torch.Tensor]:
    each = size // data_sets
    for number in range(data_sets):
        for (indices,) in torch_ps.shard(samples(each), optimizer, batch_size=batch_size, name=f"epoch {number}"):
            yield indices + number * each
