"""What TCP can do between n workers and k servers: the traffic of a synchronous round, in pieces, and no arithmetic.

    worker: pieces of its share to every server, all at once -->
                                                              <-- a piece when the server has it of all workers

Every worker has one connection to each server, with a thread for either direction at both ends, so nothing but TCP and
the links decides how fast a round is. The parameters never change, so the check is that they arrived.
"""

import socket
import threading
from collections import Counter
from collections.abc import Callable

import torch

from bench.rounds import DEADLINE, Job, flat, measure

PIECE = 4 << 20


def serve(listener: socket.socket, workers: int, size: int) -> None:
    """Answer every round of ``workers`` workers with ``size`` bytes, until they close."""
    came, changed = Counter[int](), threading.Condition()
    answer = bytes(PIECE)

    def read(link: socket.socket) -> None:
        number, into = 0, memoryview(bytearray(PIECE))
        while all(_fill(link, into[:length]) and _count(number + at) for at, length in pieces(size)):
            number += len(pieces(size))
        _count(-1)

    def _count(number: int) -> bool:
        with changed:
            came[number] += 1
            changed.notify_all()
        return True

    def write(link: socket.socket) -> None:
        number = 0
        while True:
            for _, length in pieces(size):
                with changed:
                    changed.wait_for(lambda: came[number] == workers or came[-1], DEADLINE)  # noqa: B023
                    if came[number] < workers:
                        return
                link.sendall(answer[:length])
                number += 1

    links = [listener.accept()[0] for _ in range(workers)]
    _together([lambda link=link, work=work: work(link) for link in links for work in (read, write)])  # type: ignore[misc]


def worker(job: Job, rank: int, servers: list[tuple[str, int]]) -> None:
    """Run the rounds of one worker; ``servers`` are the addresses of all servers."""
    start, gradient = flat(job.work.size)
    size = 4 * len(gradient) // len(servers)
    payload = memoryview(gradient.numpy()).cast("B")  # type: ignore[arg-type]  # numpy's stubs say no buffer before 3.12
    into = memoryview(bytearray(size))
    links = [socket.create_connection(server, DEADLINE) for server in servers]

    def send(link: socket.socket, part: int) -> None:
        link.sendall(payload[part * size : (part + 1) * size])

    def one_round() -> None:
        work: list[Callable[[], object]] = [lambda link=link: _fill(link, into) for link in links]  # type: ignore[misc]
        work += [lambda link=link, part=part: send(link, part) for part, link in enumerate(links)]  # type: ignore[misc]
        _together(work)

    measure(job, rank, one_round, lambda: start, error=lambda: float(torch.frombuffer(into, dtype=torch.uint8).sum()))
    for link in links:
        link.close()


def pieces(size: int) -> list[tuple[int, int]]:
    """Number and length of each piece of ``size`` bytes."""
    return [(number, min(PIECE, size - at)) for number, at in enumerate(range(0, size, PIECE))]


def _together(work: list[Callable[[], object]]) -> None:
    threads = [threading.Thread(target=each) for each in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _fill(link: socket.socket, into: memoryview) -> bool:
    """Receive until the buffer is full. Returns False at the end of the connection."""
    at = 0
    while at < len(into):
        read = link.recv_into(into[at : at + (1 << 20)])
        if not read:
            return False
        at += read
    return True
