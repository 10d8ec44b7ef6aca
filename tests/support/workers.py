"""Workers as processes of their own; named as ``module:function`` for ``tests.support.processes.Child``."""

import torch

import torch_ps
from torch_ps.ps import cli, servicer


def push_for_ever(servers: str, name: str, size: int) -> None:
    """Pushes ones until it is killed."""
    with torch_ps.Client(servers, name=name) as client:
        client.init({"x": torch.zeros(size)}, torch_ps.OptimizerSpec("SGD", lr=1.0))
        client.pull()
        while True:
            client.push({"x": torch.ones(size)})


def serve_impatiently(arguments: list[str], hello_seconds: float) -> None:
    """``ps-serve`` that waits less long for the first frame of a stream."""
    servicer.HELLO_DEADLINE = hello_seconds
    cli.main(arguments)
