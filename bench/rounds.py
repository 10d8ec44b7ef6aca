"""Benchmark harness: the work of every system that is compared, its timing, and the check of its result.

    launcher                      worker 0 .. N-1                                  gate
    start them                    get ready                                        all are up
                                  warm rounds                                      the window begins
    CPU seconds so far            rounds, each timed; Told                         the window has ended
    CPU seconds, peak memory      worker 0 compares its parameters                 all may go

Rules of this file
  1. A round: push a full gradient, one step of SGD (lr .01, momentum .9), pull everything into tensors of one's own. In
     sync the step takes the mean of all workers' gradients, which differ by a factor, so a sum or one of them is found.
  2. CPU seconds are user and system time of every process that this program started, daemons included.
  3. The same gradient every round, so the parameters after K steps have a closed form; the error is the largest
     deviation from it as a share of the largest movement.
"""

import ctypes
import multiprocessing
import os
import signal
import statistics
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing.connection import wait
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")

LR, MOMENTUM = 0.01, 0.9
#: Seconds for the slowest thing here, some rounds of 100 MB over 100 Mb/s. A process that ends is noticed at once.
DEADLINE = 400.0
WARM = {"big": 3, "small": 100}
ROUNDS = {"big": 20, "small": 1000}
#: Warm and timed rounds of ``--quick``, which is for tests: enough to see that it works.
QUICK = (1, 3)

#: In the environment of each process that this program starts, which is how its CPU seconds are found.
_MARK = "TORCH_PS_BENCH"
#: The same for the daemons that a system starts on its own: the folder of its run, with which they end.
RUN = "TORCH_PS_BENCH_RUN"

context: Any = multiprocessing.get_context("forkserver")
# A worker forked from a process that has these starts in milliseconds instead of seconds.
context.set_forkserver_preload(["torch", "torch.distributed", "numpy", "grpc"])


@dataclass(frozen=True)
class Work:
    mode: str
    size: str
    workers: int
    warm: int
    rounds: int


def work(mode: str, size: str, workers: int = 2, *, quick: bool = False) -> Work:
    warm, rounds = QUICK if quick else (WARM[size], ROUNDS[size])
    return Work(mode, size, workers, warm, rounds)


@dataclass(frozen=True)
class Told:
    """Measurements of one worker."""

    rounds: list[float]
    seconds: float
    payload: int
    faults: int = 0


@dataclass(frozen=True)
class Job:
    """What a role of a system is started with. ``folder`` is the run's own and goes with it."""

    work: Work
    folder: str
    gate: Barrier
    answers: "Queue[Any]"

    def publish(self, name: str, text: str) -> None:
        """Publish a value that the other roles read with ``published``."""
        path = Path(self.folder, name)
        path.with_suffix(".part").write_text(text, encoding="utf-8")
        path.with_suffix(".part").rename(path)

    def published(self, name: str) -> str:
        path, deadline = Path(self.folder, name), time.monotonic() + DEADLINE
        while not path.exists():
            if time.monotonic() > deadline:
                raise SystemExit(f"nobody told {name!r} in {DEADLINE:g} s")
            time.sleep(0.01)
        return path.read_text(encoding="utf-8")


def flat(size: str) -> "tuple[torch.Tensor, torch.Tensor]":
    """Parameters at the start and the gradient, each shape (n,), fp32."""
    import torch

    from bench.model import Model

    tensors = list(Model(size).tensors)
    gradients = [tensor.grad.reshape(-1) for tensor in tensors if tensor.grad is not None]
    found = torch.cat([tensor.detach().reshape(-1) for tensor in tensors]), torch.cat(gradients)
    del tensors, gradients
    with suppress(AttributeError, OSError):  # else glibc keeps the model, which would count as the system's memory
        ctypes.CDLL(None).malloc_trim(0)
    return found


def scale(work: Work, rank: int) -> float:
    """Factor of the gradient of one worker."""
    return 1.0 + rank if work.mode == "sync" else 1.0


def off_by(work: Work, steps: int, pulled: "torch.Tensor") -> float:
    """Largest deviation of ``pulled``, shape (n,), from ``steps`` exact steps, as a share of the largest movement."""
    start, gradient = (each.double() for each in flat(work.size))
    mean = (work.workers + 1) / 2 if work.mode == "sync" else 1.0
    factor = LR * sum((1 - MOMENTUM**i) / (1 - MOMENTUM) for i in range(1, steps + 1))
    moved = gradient.mul_(mean * factor)
    off = start.sub_(pulled.double()).sub_(moved).abs_().max() / moved.abs_().max()
    return float(off)


def measure(
    job: Job,
    rank: int,
    one_round: Callable[[], None],
    pulled: "Callable[[], torch.Tensor]",
    payload: Callable[[], int] = lambda: 0,
    error: Callable[[], float] | None = None,
) -> None:
    """Run and time the rounds of one worker.

    Args:
        one_round: function that returns when the pulled parameters are in this worker's tensors.
        pulled: parameters of this worker as one tensor, shape (n,).
        payload: function that returns the bytes pushed and pulled so far.
        error: function that returns the deviation; None compares with the closed form.
    """
    work = job.work
    job.gate.wait(DEADLINE)
    for _ in range(work.warm):
        one_round()
    before, faults = payload(), _faults(os.getpid())
    job.gate.wait(DEADLINE)
    ends = [time.perf_counter()]
    for _ in range(work.rounds):
        one_round()
        ends.append(time.perf_counter())
    faults = _faults(os.getpid()) - faults
    job.answers.put(Told([b - a for a, b in pairwise(ends)], ends[-1] - ends[0], payload() - before, faults))
    job.gate.wait(DEADLINE)
    if rank == 0:
        steps = work.warm + work.rounds
        if work.mode == "async":  # another worker may have been the last to push
            one_round()
            steps = work.workers * steps + 1
        job.answers.put(error() if error else off_by(work, steps, pulled()))
    job.gate.wait(DEADLINE)


@contextmanager
def jobs(work: Work, processes: int | None = None) -> Iterator[Job]:
    """A job whose gate waits for ``processes`` and the launcher."""
    os.environ.setdefault(_MARK, uuid.uuid4().hex)
    with tempfile.TemporaryDirectory(prefix="ps-bench-") as folder:
        try:
            yield Job(work, folder, context.Barrier((processes or work.workers) + 1), context.Queue())
        finally:
            for pid in _marked(f"{RUN}={folder}"):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def gather(job: Job, name: str, target: Callable[..., None], *arguments: Any, server: int | None) -> dict[str, float]:
    """Run ``target(job, rank, *arguments)`` in one process per worker; the figures of a table row.

    Args:
        server: process whose memory is reported; None means the one that is published as "server", if any.

    Raises:
        SystemExit: a worker ended before its work did; its own message is on stderr.
    """
    work = job.work
    resident = mib_of(server, "VmRSS") if server else 0.0
    children = [
        context.Process(target=target, args=(job, rank, *arguments), daemon=True)
        for rank in range(job.gate.parties - 1)
    ]
    for child in children:
        child.start()
    threading.Thread(target=_watch, args=(children, job.gate), daemon=True).start()
    try:
        job.gate.wait(DEADLINE)
        if server is None and Path(job.folder, "server").exists():
            server = int(job.published("server"))
        job.gate.wait(DEADLINE)
        setup = _forget_peak(server) if server else 0.0
        before, faults = _cpu_seconds(), _faults(server)
        told: list[Told] = [_answer(job) for _ in range(work.workers)]
        cpu, faults = _cpu_seconds() - before, _faults(server) - faults
        peak = mib_of(server, "VmHWM") if server else 0.0
        job.gate.wait(DEADLINE)
        off = _answer(job)
        job.gate.wait(DEADLINE)
        for child in children:
            child.join(DEADLINE)
    except threading.BrokenBarrierError:
        raise SystemExit(f"{name}: a worker ended or did not answer in {DEADLINE:g} s; its message is above") from None
    finally:
        for child in children:
            if child.is_alive():
                child.kill()
            child.join()
    rounds = sum(len(each.rounds) for each in told) / (1 if work.mode == "async" else work.workers)
    payload = sum(each.payload for each in told)
    return {
        "seconds_per_round": max(statistics.median(each.rounds) for each in told),
        "rounds_per_second": rounds / max(each.seconds for each in told),
        "cpu_seconds_per_round": cpu / rounds,
        "cpu_seconds_per_gb": cpu / payload * 1e9 if payload else 0.0,
        "cores_used": cpu / max(each.seconds for each in told),
        "server_mib_at_start": resident,
        "server_mib_at_peak": max(setup, peak),
        "server_mib_in_rounds": peak,
        "server_faults_per_round": faults / rounds,
        "worker_faults_per_push": sum(each.faults for each in told) / sum(len(each.rounds) for each in told),
        "error": off,
    }


def _answer(job: Job) -> Any:
    """Wait for the next measurement; fail if a worker has ended."""
    deadline = time.monotonic() + DEADLINE
    while job.answers.empty():
        if job.gate.broken or time.monotonic() > deadline:
            raise threading.BrokenBarrierError
        time.sleep(0.02)
    return job.answers.get()


def _watch(children: list[Any], gate: Barrier) -> None:
    """Break the gate if a worker ends early, so the others do not wait for it."""
    left = {child.sentinel: child for child in children}
    while left:
        for sentinel in wait(list(left)):
            child = left.pop(sentinel)
            child.join()
            if child.exitcode:
                gate.abort()


def _cpu_seconds() -> float:
    """CPU seconds of all running processes that carry this program's mark."""
    found = 0.0
    for pid in _marked(f"{_MARK}={os.environ[_MARK]}"):
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        found += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return found


def _faults(pid: int | None) -> int:
    """Minor page faults of a process so far; 0 if there is no process."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[7]) if pid else 0


def _marked(variable: str) -> list[int]:
    """Processes whose environment holds this program's mark."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and variable.encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:  # it has ended, or is another user's
            continue
    return found


def seconds(runs: Sequence[Mapping[str, float]]) -> float:
    """Seconds per round: the median of several runs."""
    return statistics.median(each["seconds_per_round"] for each in runs)


def numbers(words: str, least: int) -> list[int]:
    """Comma-separated whole numbers on a command line.

    Raises:
        ValueError: an item is not a whole number, or is below ``least``.
    """
    found = [int(word) for word in words.split(",")]
    if min(found) < least:
        raise ValueError
    return found


def _forget_peak(pid: int) -> float:
    """The largest resident memory so far, in MiB; from now on it is counted anew. Source: proc(5), clear_refs."""
    so_far = mib_of(pid, "VmHWM")
    with suppress(OSError):  # then what it needed to start stays in the figure
        Path(f"/proc/{pid}/clear_refs").write_text("5")
    return so_far


def mib_of(pid: int, key: str) -> float:
    """Resident memory of a process, now ("VmRSS") or at most so far ("VmHWM")."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024
