"""make soak MINUTES=30: a long job whose workers die and join, and what its servers hold on to.

    8 workers train --every few seconds--> one is killed, another joins --> all are there: a reading of every server
    warm-up | first window ............................................................. last window |
                          +-- resident memory, file descriptors, threads: compared --+

Prints a line now and then and a table; ends with an error when a server grows, or when somebody does not come in time.
"""

import os
import random
import re
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import click

from tests.support.jobs import Servers, job, until
from tests.support.processes import Child

NUM_WORKERS = 8
#: Seconds of silence after which a worker is dropped.
LEASE = 3.0
#: Readings whose median is compared, at the beginning and at the end.
WINDOW = 10
#: More than this a server may not grow by from the first window to the last, in percent of its memory.
MOST_GROWTH = 2.0
#: What a server may have open more than before: a checkpoint that is being written.
MOST_FILES = 2
#: Threads that pools make when they are first needed.
MOST_THREADS = 2


@dataclass(frozen=True, slots=True)
class Reading:
    """Resources of one server. ``mib`` is resident memory, ``own`` the part of it that is private and of no file.

    ``deaths``: number of workers that have died so far, each replaced by another one.
    """

    seconds: float
    deaths: int
    mib: float
    own: float
    files: int
    threads: int


@dataclass
class Found:
    """``readings``: of each server, after the warm-up. Compared are medians of the first ``window`` and of the last."""

    warm_up: float
    window: int = WINDOW
    readings: list[list[Reading]] = field(default_factory=list)
    num_deaths: int = 0
    num_names: int = NUM_WORKERS
    version: int = 0

    def change(self, server: int, what: str) -> tuple[float, float]:
        """Medians of the first and the last window."""
        values = [getattr(reading, what) for reading in self.readings[server]]
        return statistics.median(values[: self.window]), statistics.median(values[-self.window :])


def read(pid: int, seconds: float, deaths: int) -> Reading:
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    mib, own, threads = (int(re.findall(rf"{name}:\s+(\d+)", status)[0]) for name in ("VmRSS", "RssAnon", "Threads"))
    return Reading(seconds, deaths, mib / 1024, own / 1024, len(os.listdir(f"/proc/{pid}/fd")), threads)


def soak(
    seconds: float,
    warm_up: float,
    *,
    seed: int = 0,
    pause: float = 1.0,
    window: int = WINDOW,
    say: Callable[[str], None] = print,
) -> Found:
    """Run a job of two shards for ``warm_up`` and then ``seconds``.

    Args:
        pause: seconds from all being there to the next death.
        window: readings at the beginning and at the end that are compared.

    Raises:
        AssertionError: a worker or a server is not as it has to be.
    """
    found, dice, begin = Found(warm_up, window), random.Random(seed), time.monotonic()
    with (
        tempfile.TemporaryDirectory(prefix="torch-ps-soak-") as folder,
        job(workers=NUM_WORKERS, shards=2, lease=LEASE, checkpoint=f"{folder}/kept", checkpoint_every=100) as servers,
    ):
        found.readings = [[] for _ in servers.processes]
        try:
            for now in _deaths(servers, Path(folder), found, dice, pause):
                readings = [read(process.pid, now - begin, found.num_deaths) for process in servers.processes]
                if now - begin > warm_up:
                    for kept, reading in zip(found.readings, readings, strict=True):
                        kept.append(reading)
                if found.num_deaths % 25 == 0:
                    say(_line(found, readings))
                if now - begin > warm_up + seconds and len(found.readings[0]) >= 2 * window:
                    break
        finally:
            found.version = servers.status().version
    return found


def _deaths(servers: Servers, folder: Path, found: Found, dice: random.Random, pause: float) -> Iterator[float]:
    """Kill a worker and start one in its place, again and again; says when all are there."""
    names = [f"w{number}" for number in range(NUM_WORKERS)]
    planes = {name: ("auto", "network")[number % 2] for number, name in enumerate(names)}
    workers = {name: _start(servers, folder, name, plane) for name, plane in planes.items()}
    try:
        while True:
            until(lambda: _all_there(servers, workers, folder), f"{', '.join(workers)} are the roster", 180.0)
            yield time.monotonic()
            time.sleep(pause)
            name = dice.choice(sorted(workers))
            workers.pop(name).end(signal.SIGKILL)
            plane = planes.pop(name)  # stays as it was, for a server has more files open where it shares memory
            found.num_deaths += 1
            if dice.random() < 0.5:  # another one comes, and the lease of this one runs out
                name = f"w{found.num_names}"
                found.num_names += 1
            planes[name], workers[name] = plane, _start(servers, folder, name, plane)
    finally:
        for worker in workers.values():
            worker.kill()


def _start(servers: Servers, folder: Path, name: str, plane: str) -> Child:
    return Child("tests.soak.worker:train", (str(servers), name, plane), folder / f"{name}.log")


def _all_there(servers: Servers, workers: dict[str, Child], folder: Path) -> bool:
    for name, worker in workers.items():
        code = worker.wait(0.02)
        assert code is None, f"worker {name} ended with {code}:\n{worker.output[-3000:]}"
    return all({w.worker for w in servers.status(shard).worker} == set(workers) for shard in (0, 1))


def check(found: Found, most_growth: float = MOST_GROWTH, most_own: float = MOST_GROWTH) -> None:
    """Compare the last window with the first.

    Args:
        most_growth: percent by which resident memory may have grown.
        most_own: the same of what of it is the server's own.

    Raises:
        AssertionError: a server has grown by more than that, or has more files or threads than it had.
    """
    for server in range(len(found.readings)):
        for what, most in (("mib", most_growth), ("own", most_own)):
            before, after = found.change(server, what)
            grown = f"shard {server} grew from {before:.1f} to {after:.1f} MiB"
            assert after - before < most / 100 * before, grown
        before, after = found.change(server, "files")
        assert after <= before + MOST_FILES, f"shard {server} had {before:g} files open, and has {after:g}"
        before, after = found.change(server, "threads")
        assert after <= before + MOST_THREADS, f"shard {server} had {before:g} threads, and has {after:g}"


def _line(found: Found, readings: list[Reading]) -> str:
    each = "; ".join(f"{r.mib:.1f} MiB ({r.own:.1f} own), {r.files} files, {r.threads} threads" for r in readings)
    return f"{readings[0].seconds:6.0f} s, {found.num_deaths} deaths: {each}"


def table(found: Found) -> str:
    lines = [f"{'':<9}{'MiB':>16}{'growth':>9}{'own MiB':>16}{'files':>12}{'threads':>12}"]
    for server in range(len(found.readings)):
        mib, own, files, threads = (found.change(server, what) for what in ("mib", "own", "files", "threads"))
        lines.append(
            f"shard {server}  {mib[0]:6.1f} -> {mib[1]:6.1f}{100 * (mib[1] / mib[0] - 1):+8.2f}%"
            f"  {own[0]:6.1f} -> {own[1]:6.1f}{files[0]:5g} -> {files[1]:<4g}{threads[0]:5g} -> {threads[1]:<4g}"
        )
    last = found.readings[0][-1].seconds
    lines.append(
        f"{NUM_WORKERS} workers, {found.num_deaths} of them killed and followed by another, {found.num_names} names, "
        f"{found.version} steps; {last:.0f} s, the first {found.warm_up:.0f} s to warm up"
    )
    return "\n".join(lines)


@click.command(context_settings={"show_default": True})
@click.option("--minutes", default=30.0, type=click.FloatRange(min=0, min_open=True), help="Time after the warm-up.")
@click.option("--warm-up", default=3.0, type=click.FloatRange(min=0), help="Minutes before memory is looked at.")
@click.option("--seed", default=0, help="Of who dies, and of who comes.")
def main(minutes: float, warm_up: float, seed: int) -> None:
    """Train with workers that die and join; fails when a server grows."""
    found = soak(60 * minutes, 60 * warm_up, seed=seed, say=click.echo)
    click.echo(table(found))
    check(found)


if __name__ == "__main__":
    main()
