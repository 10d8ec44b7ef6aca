"""What TCP over loopback can do: the traffic of a round between plain sockets and no arithmetic.

Every worker sends its gradient; when the server has those of all (sync) or of this one (async) it sends the parameters.
They never change, so the check of the answer is that they arrived.
"""

import socket
import threading

import torch

from bench.rounds import Job, flat, measure

PIECE = 1 << 20


def server(job: Job) -> None:
    start = flat(job.work.size)[0]
    parameters, all_here = _bytes(start), threading.Barrier(job.work.workers)

    def serve(link: socket.socket) -> None:
        gradient = _bytes(torch.zeros_like(start))
        while _receive(link, gradient):
            if job.work.mode == "sync":
                all_here.wait()
            link.sendall(parameters)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        job.publish("port", str(listener.getsockname()[1]))
        threads = [threading.Thread(target=serve, args=(_accept(listener),)) for _ in range(job.work.workers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def worker(job: Job, rank: int) -> None:
    start, gradient = flat(job.work.size)
    pulled = torch.zeros_like(start)
    out, into = _bytes(gradient), _bytes(pulled)
    with socket.create_connection(("127.0.0.1", int(job.published("port")))) as link:
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def one_round() -> None:
            link.sendall(out)
            _receive(link, into)

        measure(job, rank, one_round, lambda: pulled, error=lambda: float((pulled != start).sum()))


def _bytes(values: torch.Tensor) -> memoryview:
    return memoryview(values.numpy()).cast("B")  # type: ignore[arg-type]  # numpy's stubs say no buffer before 3.12


def _accept(listener: socket.socket) -> socket.socket:
    link, _ = listener.accept()
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return link


def _receive(link: socket.socket, into: memoryview) -> bool:
    """Receive until ``into`` is full. Returns False at the end of the connection."""
    at = 0
    while at < len(into):
        read = link.recv_into(into[at : at + PIECE])
        if not read:
            return False
        at += read
    return True
