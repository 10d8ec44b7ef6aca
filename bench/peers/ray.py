"""Ray after its parameter-server example: one actor that is the server, one per worker, on one node.

Gradients and parameters travel as objects of Ray's shared-memory store. One process, the driver, asks them all.
"""

import importlib
import os
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from bench.peers.common import cut
from bench.rounds import LR, MOMENTUM, RUN, Job, Told, Work, flat, off_by, scale

#: Only the driver is started here; Ray starts the others.
PROCESSES = 1


class Server:
    def __init__(self, size: str) -> None:
        torch.set_num_threads(1)
        self.parameters = [torch.nn.Parameter(tensor) for tensor in cut(flat(size)[0], size)]
        self.mean = [torch.empty_like(parameter) for parameter in self.parameters]
        self.optimizer = torch.optim.SGD(self.parameters, lr=LR, momentum=MOMENTUM, fused=True)

    def pid(self) -> int:
        return os.getpid()

    def pull(self) -> list[Any]:
        return [parameter.detach().numpy() for parameter in self.parameters]

    def push(self, *gradients: list[Any]) -> list[Any]:
        pushed = [[torch.from_numpy(array) for array in each] for each in gradients]
        for number, parameter in enumerate(self.parameters):
            parameter.grad = pushed[0][number]
            if len(pushed) > 1:
                parameter.grad = torch.add(pushed[0][number], pushed[1][number], out=self.mean[number])
                for each in pushed[2:]:
                    parameter.grad.add_(each[number])
                parameter.grad.mul_(1 / len(pushed))
        self.optimizer.step()
        self.optimizer.zero_grad()  # lets go of the objects
        return self.pull()


class Worker:
    def __init__(self, work: Work, rank: int) -> None:
        torch.set_num_threads(1)
        _, gradient = flat(work.size)
        self.gradients = [each.numpy() for each in cut(gradient.mul_(scale(work, rank)), work.size)]
        self.pulled = torch.empty_like(gradient)
        self.mine = cut(self.pulled, work.size)
        self.ends: list[float] = []

    def take(self, parameters: list[Any]) -> list[Any]:
        """Return the parameters: ends one round and starts the next."""
        for tensor, array in zip(self.mine, parameters, strict=True):
            tensor.copy_(torch.from_numpy(array))
        self.ends.append(time.perf_counter())
        return self.gradients

    def told(self, rounds: int) -> Told:
        ends = self.ends[-rounds - 1 :]
        return Told([b - a for a, b in pairwise(ends)], ends[-1] - ends[0], 0)

    def off_by(self, work: Work, steps: int) -> float:
        return off_by(work, steps, self.pulled)


def worker(job: Job, rank: int) -> None:
    ray = importlib.import_module("ray")
    root = str(Path(__file__).resolve().parents[2])
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_enable_metrics_collection="0", RAY_AUTH_MODE="disabled")
    os.environ[RUN] = job.folder
    work = job.work
    ray.init(
        num_cpus=work.workers + 2,
        object_store_memory=4 << 30,
        include_dashboard=False,
        logging_level="warning",
        log_to_driver=False,
        _node_ip_address="127.0.0.1",
        _temp_dir=job.folder,
    )
    try:
        server = ray.remote(Server).options(num_cpus=1).remote(work.size)
        workers = [ray.remote(Worker).options(num_cpus=1).remote(work, each) for each in range(work.workers)]
        job.publish("server", str(ray.get(server.pid.remote())))
        job.gate.wait()
        _rounds(ray, work, server, workers, work.warm)
        job.gate.wait()
        _rounds(ray, work, server, workers, work.rounds)
        for told in ray.get([each.told.remote(work.rounds) for each in workers]):
            job.answers.put(told)
        job.gate.wait()
        steps = (work.warm + work.rounds) * (1 if work.mode == "sync" else work.workers)
        ray.wait([workers[0].take.remote(server.pull.remote())], fetch_local=False)
        job.answers.put(ray.get(workers[0].off_by.remote(work, steps)))
        job.gate.wait()
    finally:
        ray.shutdown()


def _rounds(ray: Any, work: Work, server: Any, workers: list[Any], rounds: int) -> None:
    """Run the rounds of all workers; each takes parameters once more than it pushes."""
    fresh = server.pull.remote()
    if work.mode == "sync":
        gradients = [each.take.remote(fresh) for each in workers]
        for _ in range(rounds):
            last, fresh = fresh, server.push.remote(*gradients)
            gradients = [each.take.remote(fresh) for each in workers]
            ray.wait([last], fetch_local=False)  # no more than one round ahead
        ray.wait(gradients, num_returns=len(gradients), fetch_local=False)
        return
    running, left = {each.take.remote(fresh): each for each in workers}, dict.fromkeys(workers, rounds)
    while running:
        (gradient,), _ = ray.wait(list(running), num_returns=1, fetch_local=False)
        each = running.pop(gradient)
        if left[each]:
            left[each] -= 1
            running[each.take.remote(server.push.remote(gradient))] = each
