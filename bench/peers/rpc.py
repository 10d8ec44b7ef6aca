"""A parameter server on torch.distributed.rpc, as PyTorch's tutorials write it.

Sync follows "Batch RPC processing using asynchronous executions", async is a plain ``rpc_sync``. Variant "tcp" allows
TensorPipe only loopback TCP, which is what another machine would get; else it takes shared memory by itself.
"""

import os
import threading
from pathlib import Path
from typing import Any

import torch
import torch.distributed.rpc as rpc

from bench.peers.common import cut
from bench.rounds import LR, MOMENTUM, Job, flat, measure, scale


class Shared:
    """The server's parameters and the round that is open."""

    def __init__(self, job: Job) -> None:
        self.workers = job.work.workers
        self.parameters = [torch.nn.Parameter(tensor) for tensor in cut(flat(job.work.size)[0], job.work.size)]
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer = torch.optim.SGD(self.parameters, lr=LR, momentum=MOMENTUM, fused=True)
        self.lock = threading.Lock()
        self.pushed = 0
        self.answer: torch.futures.Future[list[torch.Tensor]] = torch.futures.Future()

    def values(self) -> list[torch.Tensor]:
        return [parameter.detach() for parameter in self.parameters]


_shared: list[Shared] = []  # one, in the server's process


@rpc.functions.async_execution  # type: ignore[untyped-decorator]
def sync_round(gradients: list[torch.Tensor]) -> "torch.futures.Future[list[torch.Tensor]]":
    shared = _shared[0]
    with shared.lock:
        for parameter, gradient in zip(shared.parameters, gradients, strict=True):
            if parameter.grad is not None and shared.pushed:
                parameter.grad.add_(gradient)
            elif parameter.grad is not None:
                parameter.grad.copy_(gradient)
        shared.pushed += 1
        answer = shared.answer
        if shared.pushed == shared.workers:
            for parameter in shared.parameters:
                if parameter.grad is not None:
                    parameter.grad.div_(shared.workers)
            shared.optimizer.step()
            shared.pushed, shared.answer = 0, torch.futures.Future()
            answer.set_result(shared.values())
    return answer


def async_round(gradients: list[torch.Tensor]) -> list[torch.Tensor]:
    shared = _shared[0]
    with shared.lock:
        for parameter, gradient in zip(shared.parameters, gradients, strict=True):
            parameter.grad = gradient
        shared.optimizer.step()
    return shared.values()


def server(job: Job, variant: str = "") -> None:
    _shared.append(Shared(job))
    _join(job, 0, "server", variant)
    rpc.shutdown()


def worker(job: Job, rank: int, variant: str = "") -> None:
    _join(job, rank + 1, f"w{rank}", variant)
    _, gradient = flat(job.work.size)
    gradients = cut(gradient.mul_(scale(job.work, rank)), job.work.size)
    pulled = torch.empty_like(gradient)
    mine = cut(pulled, job.work.size)
    call = sync_round if job.work.mode == "sync" else async_round

    def one_round() -> None:
        for tensor, fresh in zip(mine, rpc.rpc_sync("server", call, args=(gradients,)), strict=True):
            tensor.copy_(fresh)

    measure(job, rank, one_round, lambda: pulled)
    rpc.shutdown()


def _join(job: Job, rank: int, name: str, variant: str) -> None:
    os.environ.setdefault("TP_SOCKET_IFNAME", "lo")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    tcp: dict[str, Any] = {"_transports": ["uv"], "_channels": ["basic"]} if variant == "tcp" else {}
    options = rpc.TensorPipeRpcBackendOptions(
        init_method=Path(job.folder, "store").as_uri(),
        num_worker_threads=max(4, job.work.workers + 1),
        rpc_timeout=120,
        **tcp,
    )
    init: Any = rpc.init_rpc  # torch does not type it
    init(name, rank=rank, world_size=job.work.workers + 1, rpc_backend_options=options)
