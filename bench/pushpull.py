"""Seconds per round over a real server and real workers on this machine: push a full gradient, step, pull everything.

    python bench/pushpull.py                 # the table of docs/performance.md
    python bench/pushpull.py --only "sync fp32 big" --repeat 5

A round is one ``optimizer.step()`` with SGD and momentum. Sync rows give the median round of the slowest worker; async
rows the rounds of all workers together per second. CPU seconds are those of all processes, per GB of payload moved in
either direction. Each case runs ``--repeat`` times, interleaved; the best median is shown with the range, since other
load on the machine only ever adds time.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

DEADLINE = 120.0


@dataclass(frozen=True)
class Case:
    mode: str
    codec: str
    size: str
    shards: int = 1
    plane: str = "network"
    server: tuple[str, ...] = ()  # further options of ps-serve

    @property
    def name(self) -> str:
        codec = "fp32" if self.codec == "none" else self.codec
        words = [self.mode, codec, self.size]
        if self.shards > 1:
            words.append(f"{self.shards} shards")
        if self.plane != "network":
            words.append(self.plane)
        return " ".join(words)


CASES = (
    Case("sync", "none", "big"),
    Case("sync", "fp16", "big"),
    Case("sync", "bf16", "big"),
    Case("sync", "none", "big", shards=2),
    Case("async", "none", "big"),
    Case("async", "fp16", "big"),
    Case("sync", "none", "big", plane="memory"),
    Case("async", "none", "big", plane="memory"),
    Case("sync", "none", "small"),
    Case("sync", "none", "small", plane="memory"),
    Case("async", "none", "small"),
)
WARM = {"big": 3, "small": 100}
ROUNDS = {"big": 20, "small": 1000}


@dataclass(frozen=True)
class Told:
    """What one worker measured."""

    rounds: list[float]
    seconds: float
    cpu: float
    payload: int


def worker(servers: str, rank: int, case: Case, start: Barrier, answers: "Queue[Told]") -> None:
    import torch

    import torch_ps
    from bench.model import Model

    torch.set_num_threads(1)
    model = Model(case.size)
    with torch_ps.ParameterServerOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9),
        model,
        servers,
        name=f"w{rank}",
        compress=case.codec,
        compress_pull=case.codec,
        overlap="off",
        plane=case.plane,
    ) as optimizer:
        start.wait(DEADLINE)
        for _ in range(WARM[case.size]):
            optimizer.step()
        start.wait(DEADLINE)
        payload, cpu, begin = optimizer.pushed_bytes + optimizer.pulled_bytes, time.process_time(), time.perf_counter()
        ends = [begin]
        for _ in range(ROUNDS[case.size]):
            optimizer.step()
            ends.append(time.perf_counter())
        answers.put(
            Told(
                [after - before for before, after in pairwise(ends)],
                ends[-1] - begin,
                time.process_time() - cpu,
                optimizer.pushed_bytes + optimizer.pulled_bytes - payload,
            )
        )
        start.wait(DEADLINE)


def run(case: Case, workers: int) -> dict[str, float]:
    """One run of one case; the figures of its table row."""
    context: Any = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        ready = Path(folder, "ready")
        options: dict[str, Any] = {"mode": case.mode, "workers": workers, "shards": case.shards, "log-level": "warning"}
        command = [sys.executable, "-m", "torch_ps.ps.cli", "--listen", "127.0.0.1:0", "--ready-file", str(ready)]
        server = subprocess.Popen(
            [*command, *(text for key, value in options.items() for text in (f"--{key}", f"{value}")), *case.server]
        )
        try:
            deadline = time.monotonic() + DEADLINE
            while not ready.exists():
                if server.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit("ps-serve did not start; its own message is above")
                time.sleep(0.05)
            resident = _mib_of(server.pid, "VmRSS")
            servers = ",".join(json.loads(ready.read_text())["servers"])
            start, answers = context.Barrier(workers + 1), context.Queue()
            children = [
                context.Process(target=worker, args=(servers, rank, case, start, answers), daemon=True)
                for rank in range(workers)
            ]
            for child in children:
                child.start()
            start.wait(DEADLINE)
            start.wait(DEADLINE)
            before = _cpu_of(server.pid)
            told: list[Told] = [answers.get(timeout=DEADLINE) for _ in children]
            served = _cpu_of(server.pid) - before
            peak = _mib_of(server.pid, "VmHWM")
            start.wait(DEADLINE)
            for child in children:
                child.join(DEADLINE)
        finally:
            server.terminate()
            server.wait()
    rounds = sum(len(each.rounds) for each in told) / (1 if case.mode == "async" else workers)
    payload = sum(each.payload for each in told)
    return {
        "seconds_per_round": max(statistics.median(each.rounds) for each in told),
        "rounds_per_second": rounds / max(each.seconds for each in told),
        "cpu_seconds_per_round": (sum(each.cpu for each in told) + served) / rounds,
        "cpu_seconds_per_gb": (sum(each.cpu for each in told) + served) / payload * 1e9,
        "server_mib_at_start": resident,
        "server_mib_at_peak": peak,
    }


def _cpu_of(pid: int) -> float:
    """User and system seconds of a process and of its running children."""
    found = 0.0
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    for each in (str(pid), *children):
        fields = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
        found += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return found


def _mib_of(pid: int, key: str) -> float:
    """Resident memory of a process, now ("VmRSS") or at most so far ("VmHWM")."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--only", default="", help="names of the cases to run, comma-separated, or how they begin")
    parser.add_argument("--json", default="", help="file for all figures")
    arguments = parser.parse_args()
    cases = [case for case in CASES if any(case.name.startswith(name.strip()) for name in arguments.only.split(","))]
    if not cases:
        raise SystemExit(f"no case is called {arguments.only!r}; these exist: {', '.join(case.name for case in CASES)}")
    found: dict[Case, list[dict[str, float]]] = {case: [] for case in cases}
    for _ in range(arguments.repeat):
        for case in cases:
            found[case].append(run(case, arguments.workers))
            sys.stderr.write(f"{case.name}: {found[case][-1]['seconds_per_round']:.4f} s/round\n")
    out = sys.stdout.write
    out(f"{'case':<22}{'s/round':>9}{'(range)':>18}{'rounds/s':>10}{'CPU s/round':>13}{'CPU s/GB':>10}\n")
    for case, runs in found.items():
        seconds = sorted(each["seconds_per_round"] for each in runs)
        best = min(runs, key=lambda each: each["seconds_per_round"])
        out(
            f"{case.name:<22}{seconds[0]:>9.4f}{f'({seconds[0]:.4f}-{seconds[-1]:.4f})':>18}"
            f"{max(each['rounds_per_second'] for each in runs):>10.1f}"
            f"{best['cpu_seconds_per_round']:>13.4f}{best['cpu_seconds_per_gb']:>10.2f}\n"
        )
    if arguments.json:
        rows = [{**asdict(case), "name": case.name, "runs": runs} for case, runs in found.items()]
        Path(arguments.json).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    main()
