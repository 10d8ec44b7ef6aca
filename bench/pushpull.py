"""Seconds per round over a real server and real workers on this machine: push a full gradient, step, pull everything.

    python bench/pushpull.py                 # the table of docs/benchmark-log.md
    python bench/pushpull.py --only "sync fp32 big" --repeat 5

A round is one ``optimizer.step()`` with SGD and momentum. Sync rows give the median round of the slowest worker; async
rows the rounds of all workers together per second. CPU seconds are those of all processes, per GB of payload moved in
either direction. Each case runs ``--repeat`` times, interleaved; the best median is shown with the range, since other
load on the machine only ever adds time. What a round is and how it is checked: ``bench/rounds.py``.
"""

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import rounds
from bench.rounds import DEADLINE, LR, MOMENTUM, Job, Work

#: Largest error of a right answer: of rounding in fp32, and where gradients and parameters travel in 16 bits.
EXACT, ROUNDED = 1e-3, 2e-2


@dataclass(frozen=True)
class Case:
    mode: str
    codec: str
    size: str
    shards: int = 1
    plane: str = "network"
    server: tuple[str, ...] = ()  # further options of ps-serve
    fused: bool = False  # the optimizer's
    tls: bool = False  # with certificates that are made for the run
    connections: int = 1  # to each data port

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


def worker(job: Job, rank: int, case: Case, servers: str) -> None:
    import torch

    import torch_ps
    from bench.model import Model

    torch.set_num_threads(1)
    model = Model(case.size)
    for tensor in model.parameters():
        if tensor.grad is not None:
            tensor.grad.mul_(rounds.scale(job.work, rank))
    with torch_ps.ParameterServerOptimizer(
        torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM, fused=case.fused),
        model,
        servers,
        name=f"w{rank}",
        compress=case.codec,
        compress_pull=case.codec,
        overlap="off",
        plane=case.plane,
        connections=case.connections,
        tls=str(Path(job.folder, "authority.pem")) if case.tls else None,
    ) as optimizer:
        rounds.measure(
            job,
            rank,
            optimizer.step,
            lambda: torch.cat([tensor.detach().reshape(-1) for tensor in model.parameters()]),
            lambda: optimizer.pushed_bytes + optimizer.pulled_bytes,
        )


@contextmanager
def serving(commands: Sequence[Sequence[str]], folder: str) -> Iterator[tuple[list[int], str]]:
    """Run server commands; yields their process ids and all addresses, comma-separated."""
    with ExitStack() as stack:
        servers, files = [], [Path(folder, f"ready{number}") for number in range(len(commands))]
        for command, file in zip(commands, files, strict=True):
            server = subprocess.Popen([*command, "--ready-file", str(file)])
            stack.callback(server.wait)
            stack.callback(server.terminate)
            servers.append(server)
        deadline = time.monotonic() + DEADLINE
        while not all(file.exists() for file in files):
            if any(server.poll() is not None for server in servers) or time.monotonic() > deadline:
                raise SystemExit("ps-serve did not start; its own message is above")
            time.sleep(0.02)
        addresses = [address for file in files for address in json.loads(file.read_text())["servers"]]
        yield [server.pid for server in servers], ",".join(dict.fromkeys(addresses))


def serve_command(case: Case, workers: int, *options: str) -> list[str]:
    command = [sys.executable, "-m", "torch_ps.ps.server.cli", "--mode", case.mode, "--workers", str(workers)]
    return [*command, "--log-level", "warning", "--metrics", "off", *case.server, *options]


def certificates(job: Job) -> tuple[str, ...]:
    """Make certificates in the folder of a run; the options of its server."""
    from tests.support.certificates import Authority  # its package is for development only

    issued = Authority(Path(job.folder)).issue("server", mutual=False)
    return "--tls-cert", issued.cert, "--tls-key", issued.key


def run(case: Case, workers: int, work: Work | None = None) -> dict[str, float]:
    """One run of one case; the figures of its table row."""
    work = work or rounds.work(case.mode, case.size, workers)
    with rounds.jobs(work) as job:
        options = ("--listen", "127.0.0.1:0", "--shards", str(case.shards), *(certificates(job) if case.tls else ()))
        with serving([serve_command(case, workers, *options)], job.folder) as (pids, servers):
            found = rounds.gather(job, case.name, worker, case, servers, server=pids[0])
    check_error(case.name, found, case.codec)
    return found


def check_error(name: str, figures: dict[str, float], codec: str = "none") -> None:
    """Check the result of a run.

    Raises:
        SystemExit: the result is off by more than rounding explains.
    """
    if not figures["error"] < (EXACT if codec == "none" else ROUNDED):
        raise SystemExit(f"{name}: parameters are off by {figures['error']:.1e} of what they moved")


def pick(names: Sequence[str], only: str) -> list[str]:
    """Names that contain all words of one of the comma-separated items of ``only``.

    Raises:
        SystemExit: no name does.
    """
    items = [set(item.split()) for item in only.split(",")]
    found = [name for name in names if any(item <= set(name.split()) for item in items)]
    if not found:
        raise SystemExit(f"no row is called {only!r}; these exist: {', '.join(names)}")
    return found


def options(description: str | None, repeat: int = 3) -> argparse.ArgumentParser:
    """Options of every benchmark; SIGTERM ends the processes of a benchmark as Ctrl-C does."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=repeat, help=f"runs of each row, interleaved; default {repeat}")
    parser.add_argument("--only", default="", help="rows to run, comma-separated: words of their names")
    parser.add_argument("--quick", action="store_true", help="three rounds each, to see that it works")
    parser.add_argument("--json", default="", help="file for all figures")
    return parser


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    named = {case.name: case for case in CASES}
    cases = [named[name] for name in pick(list(named), arguments.only)]
    found: dict[Case, list[dict[str, float]]] = {case: [] for case in cases}
    for _ in range(arguments.repeat):
        for case in cases:
            work = rounds.work(case.mode, case.size, arguments.workers, quick=arguments.quick)
            found[case].append(run(case, arguments.workers, work))
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
        rows: list[dict[str, Any]] = [{**asdict(case), "name": case.name, "runs": runs} for case, runs in found.items()]
        Path(arguments.json).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
