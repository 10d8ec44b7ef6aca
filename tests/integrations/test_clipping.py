"""Accelerate (and so Trainer), Lightning and Fabric clip the mean gradient of two workers, as one process does."""

import importlib.util
import subprocess
import sys

import pytest

from tests.support.commands import environment
from tests.support.jobs import job

#: Two workers, a thread each, clip in the way of one library after the other; prints their differences to one process.
SCRIPT = """
import warnings
warnings.simplefilter("ignore")
import torch, torch_ps
from accelerate import Accelerator
from lightning.fabric import Fabric
from lightning.pytorch.plugins.precision import Precision
from tests.support.threads import at_once
from tests.support.training import batch, mlp, seeded
from torch.nn.functional import cross_entropy

accelerator, fabric = Accelerator(cpu=True), Fabric(accelerator="cpu", devices=1)
ways = [
    lambda model, optimizer: accelerator.clip_grad_norm_(model.parameters(), 0.5),
    lambda model, optimizer: Precision().clip_gradients(optimizer, 0.5),
    lambda model, optimizer: fabric.clip_gradients(model, optimizer, max_norm=0.5),
]

def train(model, optimizer, batches):
    for step in range(9):
        inputs, labels = map(torch.cat, zip(*(batch(step, worker) for worker in batches)))
        optimizer.zero_grad()
        cross_entropy(model(inputs), labels).backward()
        ways[step // 3](model, optimizer)
        optimizer.step()
    return model

def sgd(model): return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

models = [seeded(mlp), seeded(mlp)]

def worker(rank):
    model = models[rank]
    with torch_ps.ParameterServerOptimizer(sgd(model), model, rank=rank) as optimizer:
        return train(model, optimizer, [rank])

alone = seeded(mlp)
train(alone, sgd(alone), [0, 1])
for model in at_once(lambda: worker(0), lambda: worker(1)):
    pairs = zip(model.parameters(), alone.parameters())
    print(max(float((a - b).norm() / b.norm()) for a, b in pairs))
"""


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("accelerate", "lightning"))), reason="accelerate or lightning is missing"
)
def test_libraries_clip_the_mean_of_two_workers() -> None:
    with job(workers=2) as servers:
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT],
            env={**environment(), "PS_SERVERS": str(servers), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=250,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    differences = [float(line) for line in done.stdout.split()[-2:]]
    assert max(differences) < 1e-6
