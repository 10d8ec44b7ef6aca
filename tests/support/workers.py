"""Workers as processes of their own; named as ``module:function`` for ``tests.support.processes.Child``."""

from typing import Any

import torch

import torch_ps
from tests.support.sample_counts import Trainer
from torch_ps.ps.server import cli, servicer


def push_for_ever(servers: str, name: str, size: int) -> None:
    """Pushes ones until it is killed."""
    with torch_ps.Client(servers, name=name) as client:
        client.init({"x": torch.zeros(size)}, torch_ps.OptimizerSpec("SGD", lr=1.0))
        client.pull()
        while True:
            client.push({"x": torch.ones(size)})


def serve_impatiently(arguments: list[str], seconds: float) -> None:
    """``ps-serve`` that waits less long for the first message of a call."""
    servicer.HELLO_DEADLINE = servicer.REQUEST_DEADLINE = seconds
    cli.main(arguments)


def train(servers: str, name: str, size: int, options: dict[str, Any], log: str) -> None:
    """Trains on leased samples; writes a line per step to ``log``, and how it ended."""
    trainer = Trainer(servers, name, size)
    with trainer.optimizer, open(log, "a", buffering=1, encoding="utf-8") as file:
        for indices in trainer.epochs(**options):
            file.write(f"{trainer.optimizer.version} {len(indices)}\n")
        file.write(f"end {trainer.optimizer.samples:g} {int((trainer.model.x != 0).sum())}\n")
