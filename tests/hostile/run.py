"""make hostile SECONDS=1800 SEED=7: hostile members and strangers against real servers, and what they cost them.

    first half   tests/fuzz/hostile.py: well-formed frames with hostile content, to a whole server
    second half  for each flood and server:  flood begins --pushes timed, /health asked, memory read--> join --> it ends

Prints a line per flood. Fails at the first frame that does harm, or at the end if a flood has cost more than it may.
"""

import contextlib
import math
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import click
import torch

import torch_ps
from tests.hostile.floods import FLOODS, Flood, attacking
from tests.support.certificates import Authority, options
from tests.support.etcd import BINARY, EtcdProcess
from tests.support.jobs import Servers, job
from torch_ps.common.rpc.credentials import access_of

#: Most resident memory of a server in MiB, seconds of one push, of an answer of /health, and until a new
#: worker has joined.
MOST_MIB, MOST_PUSH, MOST_HEALTH, MOST_JOIN = 500.0, 1.0, 1.0, 10.0
#: Seconds of one push where a flood comes from many addresses, and anybody has to wait to join.
MOST_PUSH_EVERYWHERE = 5.0
#: Files and threads that a server may have more than before.
MOST_FILES, MOST_THREADS = 1400, 32
SIZE, SPEC = 1 << 16, torch_ps.OptimizerSpec("SGD", lr=1.0)


@dataclass
class Cost:
    """What one flood did to the server: the largest of each figure, while it lasted.

    Attributes:
        mib: Resident memory in MiB, before and at most.
        push: Seconds of the slowest push.
        health: Seconds of the slowest answer of /health; infinite if one did not come.
        join: Seconds that a new worker needed to connect and join; infinite if it could not.
    """

    mib: tuple[float, float] = (0.0, 0.0)
    push: float = 0.0
    health: float = 0.0
    join: float = 0.0
    files: tuple[int, int] = (0, 0)
    threads: tuple[int, int] = (0, 0)
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Target:
    """A job of one server with a token, in which w0 trains.

    Attributes:
        access: What a client needs to join.
    """

    servers: Servers
    access: dict[str, Any]
    worker: torch_ps.Client
    tls: bool
    version: Iterator[int] = field(default_factory=lambda: count(1))

    @property
    def pid(self) -> int:
        return self.servers.processes[0].pid

    def address(self, port: str) -> str:
        """Where a flood of this ``Flood.port`` goes."""
        if port == "data":
            return f"127.0.0.1:{self.servers.described().data_port.port}"
        return (self.servers.metrics if port == "http" else self.servers.addresses)[0]

    def push(self) -> float:
        """Push once and check the result; seconds that it took."""
        begin = time.monotonic()
        result = self.worker.push({"x": torch.ones(SIZE)})
        seconds, version = time.monotonic() - begin, next(self.version)
        assert result.version == version
        assert torch.equal(result.params["x"], torch.full((SIZE,), -float(version)))
        return seconds

    def join(self) -> float:
        """Let another worker come and go; seconds that it needed to join, infinite if it could not."""
        begin = time.monotonic()
        try:
            with torch_ps.Client(str(self.servers), name="w1", timeout=60, **self.access) as other:
                other.init({"x": torch.zeros(SIZE)}, SPEC)
                return time.monotonic() - begin
        except torch_ps.PsError:
            return float("inf")


@contextmanager
def target(*, tls: bool, etcd: str = "", mode: str = "async") -> Iterator[Target]:
    """Serve a job with a token and, with ``tls``, a certificate.

    Args:
        etcd: URL of the etcd in which the server holds its seat; "": it needs none.
        mode: mode of the job.
    """
    with tempfile.TemporaryDirectory(prefix="torch-ps-hostile-") as name:
        folder = Path(name)
        token = folder / "token"
        token.write_text("a-secret-of-the-job-0123456789\n")
        access: dict[str, Any] = {"token_file": str(token), "plane": "network"}
        settings: dict[str, Any] = {"token_file": str(token), **({"etcd": etcd} if etcd else {})}
        authority = Authority(folder) if tls else None
        if authority is not None:
            access["tls"] = authority.ca
            settings |= options(authority.issue("server", mutual=False))
        with (
            job(mode=mode, metrics="127.0.0.1:0", **settings) as servers,
            torch_ps.Client(str(servers), name="w0", **access) as worker,
        ):
            worker.init({"x": torch.zeros(SIZE)}, SPEC)
            servers.access = access_of(authority.ca if authority is not None else "", "", "", str(token))
            yield Target(servers, access, worker, tls)


def withstand(job: Target, name: str, seconds: float) -> Cost:
    """Train through a flood of ``seconds`` and measure.

    Raises:
        AssertionError: The server ended, or a push went wrong.
    """
    cost, flood = Cost(), FLOODS[name]
    job.push()
    before = resident(job.pid), files(job.pid), threads(job.pid)
    Path(f"/proc/{job.pid}/clear_refs").write_text("5")  # VmHWM begins anew; see proc(5)
    where = job.address(flood.port)
    end = time.monotonic() + seconds
    with attacking(name, where, tls=job.tls), _probing(job.servers.metrics[0], cost):
        while time.monotonic() < end:
            cost.push = max(cost.push, job.push())
            cost.files = before[1], max(cost.files[1], files(job.pid))
            cost.threads = before[2], max(cost.threads[1], threads(job.pid))
        cost.join = job.join()
    cost.mib = before[0], peak(job.pid)
    job.push()
    cost.problems = _problems(cost, flood)
    return cost


def _problems(cost: Cost, flood: Flood) -> list[str]:
    limits = (
        ("MiB", cost.mib[1], MOST_MIB),
        ("s a push", cost.push, MOST_PUSH_EVERYWHERE if flood.everywhere else MOST_PUSH),
        ("s for /health", cost.health, MOST_HEALTH),
        ("s to join", 0.0 if flood.everywhere else cost.join, MOST_JOIN),
        ("files more", cost.files[1] - cost.files[0], MOST_FILES),
        ("threads more", cost.threads[1] - cost.threads[0], MOST_THREADS),
    )
    return [f"{value:.1f} {what}; {most:g} are the limit" for what, value, most in limits if value > most]


@contextmanager
def _probing(where: str, cost: Cost) -> Iterator[None]:
    """Ask /health again and again, as an orchestrator does."""
    over = threading.Event()

    def probe() -> None:
        while not over.wait(0.2):
            begin = time.monotonic()
            try:
                with urllib.request.urlopen(f"http://{where}/health", timeout=5) as page:
                    page.read()
            except OSError:
                cost.health = float("inf")
            cost.health = max(cost.health, time.monotonic() - begin)

    thread = threading.Thread(target=probe)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _status(pid: int, name: str) -> int:
    return int(re.findall(rf"{name}:\s+(\d+)", Path(f"/proc/{pid}/status").read_text(encoding="ascii"))[0])


def resident(pid: int) -> float:
    return _status(pid, "VmRSS") / 1024


def peak(pid: int) -> float:
    return _status(pid, "VmHWM") / 1024


def threads(pid: int) -> int:
    return _status(pid, "Threads")


def files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


HEAD = f"{'flood':<30}{'server':>6}{'MiB':>16}{'push':>9}{'/health':>10}{'join':>8}{'files':>14}{'threads':>12}"


def line(name: str, kind: str, cost: Cost) -> str:
    return (
        f"{name:<30}{kind:>6}{cost.mib[0]:>8.0f} -> {cost.mib[1]:<4.0f}{cost.push:>7.2f} s"
        f"{cost.health:>8.2f} s{cost.join:>6.1f} s{cost.files[0]:>6} -> {cost.files[1]:<4}"
        f"{cost.threads[0]:>5} -> {cost.threads[1]:<3}  {'; '.join(cost.problems)}"
    )


@contextmanager
def targets(mode: str) -> Iterator[dict[str, Target]]:
    """A job in the clear, one with TLS, and, where there is an etcd, one whose server holds its seat there."""
    with contextlib.ExitStack() as stack:
        found = {
            "plain": stack.enter_context(target(tls=False, mode=mode)),
            "TLS": stack.enter_context(target(tls=True, mode=mode)),
        }
        if BINARY:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="torch-ps-etcd-")))
            etcd = stack.enter_context(EtcdProcess(folder))
            found["etcd"] = stack.enter_context(target(tls=False, etcd=etcd.url, mode=mode))
        yield found


def floods(seconds: float, seed: int, names: list[str], each: float, mode: str) -> int:
    """Run every flood against every server, and begin again while there is time; the number that cost too much."""
    dice, failed = random.Random(seed), 0
    click.echo(HEAD)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        order = sorted(dice.sample(names, len(names)), key=lambda name: FLOODS[name].everywhere)  # these leave the most
        with targets(mode) as jobs:
            for name in order:
                for kind, job in jobs.items():
                    if kind != "plain" and FLOODS[name].port == "http":
                        continue  # it is the same there
                    cost = withstand(job, name, each)
                    failed += bool(cost.problems)
                    click.echo(line(name, kind, cost))
                if time.monotonic() > end:
                    break
    return failed


@click.command(context_settings={"show_default": True})
@click.option("--seconds", default=1800.0, type=click.FloatRange(min=0, min_open=True), help="Time to run.")
@click.option("--seed", default=0, help="Of the frames, and of the order of the floods.")
@click.option("--only", default="", help=f"This flood only, one of {', '.join(FLOODS)}.")
@click.option("--each", default=16.0, type=click.FloatRange(min=0, min_open=True), help="Seconds of one flood.")
@click.option("--mode", default="async", type=click.Choice(["sync", "async", "ssp"]), help="Mode of the flooded jobs.")
def main(seconds: float, seed: int, only: str, each: float, mode: str) -> None:
    """Send servers what hostile members and strangers would; fails when it costs more than it may."""
    if only not in ("", *FLOODS):
        raise click.BadParameter(f"there is no flood {only!r}", param_hint="--only")
    if not only:
        seconds /= 2
        fuzz = [sys.executable, "-m", "tests.fuzz.hostile", "--seconds", str(math.ceil(seconds))]
        subprocess.run([*fuzz, "--seed", str(seed + 1)], check=True)
    failed = floods(seconds, seed, [only] if only else list(FLOODS), each, mode)
    if failed:
        raise click.ClickException(f"{failed} floods cost more than they may")


if __name__ == "__main__":
    main()
