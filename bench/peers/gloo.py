"""torch.distributed over gloo: one all-reduce of the flat gradient, then each worker makes the step. No server."""

import os
from pathlib import Path

import torch
import torch.distributed as dist

from bench.peers.common import cut
from bench.rounds import LR, MOMENTUM, Job, flat, measure, scale


def worker(job: Job, rank: int) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = Path(job.folder, "store").as_uri()
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=job.work.workers)
    start, gradient = flat(job.work.size)
    gradient.mul_(scale(job.work, rank))
    mean = torch.empty_like(gradient)
    parameters = [torch.nn.Parameter(tensor) for tensor in cut(start, job.work.size)]
    for parameter, view in zip(parameters, cut(mean, job.work.size), strict=True):
        parameter.grad = view
    optimizer = torch.optim.SGD(parameters, lr=LR, momentum=MOMENTUM, fused=True)

    def one_round() -> None:
        torch.mul(gradient, 1 / job.work.workers, out=mean)
        dist.all_reduce(mean)
        optimizer.step()

    measure(job, rank, one_round, lambda: start)
    dist.destroy_process_group()
