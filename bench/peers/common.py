"""Runs a peer: another system that does the same work as torch-ps.

A peer is a module of this folder with ``worker(job, rank)`` and, where it has one, ``server(job)``. Each role is a
process of its own with one compute thread; they find each other through the run's folder. What they do and how they are
timed is in ``bench/rounds.py``.
"""

import importlib
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

from bench import rounds
from bench.rounds import Job, Work

if TYPE_CHECKING:
    import torch

#: Values that the plain servers average and step at a time, so that they stay in the cache.
CHUNK = 64 * 1024


def run(peer: str, work: Work, variant: str = "") -> dict[str, float]:
    """The figures of one run of ``bench.peers.<peer>``.

    Raises:
        SystemExit: it failed; the message of the process that did is on stderr.
    """
    module = importlib.import_module(f"bench.peers.{peer}")
    # A system with processes of its own, such as Ray, needs one driver instead of one process per worker.
    with rounds.jobs(work, getattr(module, "PROCESSES", None)) as job:
        server = None
        if hasattr(module, "server"):
            server = rounds.context.Process(target=_role, args=(job, 0, peer, "server", variant), daemon=True)
            server.start()
        try:
            return rounds.gather(job, peer, _role, peer, "worker", variant, server=server.pid if server else None)
        finally:
            if server is not None:
                server.kill()
                server.join()


def _role(job: Job, rank: int, peer: str, role: str, variant: str) -> None:
    # Of the peer's own parts only: torch says that torch.distributed.rpc is no longer developed.
    warnings.filterwarnings("ignore")
    import torch

    torch.set_num_threads(1)
    module = importlib.import_module(f"bench.peers.{peer}")
    arguments = (job,) if role == "server" else (job, rank)
    getattr(module, role)(*arguments, *([variant] if variant else []))


def chunked_sgd(parameters: "torch.Tensor") -> "Callable[[list[torch.Tensor]], None]":
    """The plainest server: a function that applies the mean of gradients, each shape (n,), to ``parameters``."""
    import torch

    momentum, mean = torch.zeros_like(parameters), torch.empty(CHUNK)

    def step(gradients: list[torch.Tensor]) -> None:
        for begin in range(0, parameters.numel(), CHUNK):
            part = slice(begin, begin + CHUNK)
            values = gradients[0][part]
            if len(gradients) > 1:
                values = torch.add(values, gradients[1][part], out=mean[: values.numel()])
                for gradient in gradients[2:]:
                    values.add_(gradient[part])
                values.mul_(1 / len(gradients))
            torch._fused_sgd_(
                [parameters[part]],
                [values],
                [momentum[part]],
                weight_decay=0.0,
                momentum=rounds.MOMENTUM,
                lr=rounds.LR,
                dampening=0.0,
                nesterov=False,
                maximize=False,
                is_first_step=False,
            )

    return step


def cut(values: "torch.Tensor", size: str) -> "list[torch.Tensor]":
    """Views of ``values``, shape (n,), in the shapes of the model."""
    from bench.model import shapes

    found, at = [], 0
    for shape in shapes(size):
        numel = 1
        for side in shape:
            numel *= side
        found.append(values[at : at + numel].view(shape))
        at += numel
    return found
