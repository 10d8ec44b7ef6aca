"""What shared memory with copies can do: a worker copies its gradient in, the server averages and steps, it copies out.

One byte over a Unix socket says "pushed", another "stepped". Nothing is pipelined, so a system that overlaps them or
saves a copy can be faster. The memory has no name, so nothing is left in /dev/shm however a run ends.
"""

import json
import mmap
import os
import select
import socket
from pathlib import Path

import torch

from bench.peers.common import chunked_sgd, cut
from bench.rounds import Job, flat, measure, scale


def server(job: Job) -> None:
    start = flat(job.work.size)[0]
    files = [os.memfd_create("bench") for _ in range(job.work.workers + 1)]
    for file in files:
        os.ftruncate(file, 4 * start.numel())
    parameters, *gradients = [_mapped(file) for file in files]
    parameters.copy_(start)
    del start  # the server keeps no copy
    for gradient in gradients:
        gradient.zero_()  # maps its pages
    step = chunked_sgd(parameters)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(Path(job.folder, "socket")))
        listener.listen()
        job.publish("files", json.dumps([f"/proc/{os.getpid()}/fd/{file}" for file in files]))
        accepted = [listener.accept()[0] for _ in gradients]
    of = {link.recv(1)[0]: link for link in accepted}
    links = [of[rank] for rank in range(len(gradients))]
    rank_of = {link: rank for rank, link in of.items()}
    while job.work.mode == "sync" and all([link.recv(1) for link in links]):
        step(gradients)
        for link in links:
            link.send(b"!")
    while job.work.mode == "async" and links:
        for link in select.select(links, [], [])[0]:
            if link.recv(1):
                step([gradients[rank_of[link]]])
                link.send(b"!")
            else:
                links.remove(link)


def worker(job: Job, rank: int) -> None:
    _, gradient = flat(job.work.size)
    mine = cut(gradient.mul_(scale(job.work, rank)), job.work.size)
    pulled = torch.zeros_like(gradient)
    into = cut(pulled, job.work.size)
    names = json.loads(job.published("files"))
    shared = [_mapped(os.open(names[number], os.O_RDWR)) for number in (0, rank + 1)]
    parameters, place = (cut(each, job.work.size) for each in shared)
    with socket.socket(socket.AF_UNIX) as link:
        link.connect(str(Path(job.folder, "socket")))
        link.send(bytes([rank]))

        def one_round() -> None:
            for there, here in zip(place, mine, strict=True):
                there.copy_(here)
            link.send(b"!")
            link.recv(1)
            for here, there in zip(into, parameters, strict=True):
                here.copy_(there)

        measure(job, rank, one_round, lambda: pulled)


def _mapped(file: int) -> torch.Tensor:
    return torch.frombuffer(mmap.mmap(file, 0), dtype=torch.float32)
