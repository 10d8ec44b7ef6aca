"""A worker of the job that is soaked: trains a tiny model on leased samples until it is killed."""

import time

import torch

import torch_ps
from tests.support.training import mlp

#: Of one wait; who waits for longer has found a hang.
TIMEOUT = 60.0
#: What a step computes for, as a real one would; eight workers share few processors.
COMPUTE_SECONDS = 0.05
SIZE = 2048


def train(servers: str, name: str, plane: str) -> None:
    generator = torch.Generator().manual_seed(1)
    inputs, labels = torch.randn(SIZE, 12, generator=generator), torch.randint(7, (SIZE,), generator=generator)
    data, model = torch.utils.data.TensorDataset(inputs, labels), mlp()
    adam = torch.optim.AdamW(model.parameters(), lr=1e-4)
    with torch_ps.ParameterServerOptimizer(adam, model, servers, name=name, plane=plane, timeout=TIMEOUT) as optimizer:
        for x, y in torch_ps.shard(data, optimizer, batch_size=8, epochs=1_000_000):
            torch.autograd.backward(torch.nn.functional.cross_entropy(model(x), y))
            time.sleep(COMPUTE_SECONDS)
            optimizer.step()
            optimizer.zero_grad()
