"""make chaos SECONDS=300 SEED=7: break jobs at random for as long as you like, and count what was lost.

    for each job:  well --pause--> faults begin --seconds--> mended --patience--> every worker goes on: check --> ...
                   until its data is trained on: check_end

Prints one line per round and a table; ends with an error at the first thing that is not as it has to be, with the seed.
"""

import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import click

from tests.chaos import schedule
from tests.chaos.job import Job, left_in_shm, resident, running
from tests.chaos.ledger import now
from tests.chaos.schedule import LEASE, Drawn, Round

#: Samples of each job.
SIZE = 8000
#: Seconds after the end of a fault in which every worker has to have made a step.
PATIENCE = LEASE + 5.0
#: MiB that a server may grow by from its first check to its last, over all that happens in between.
MOST_GROWTH = 32.0


@dataclass
class Found:
    """Figures of a run. ``slowest``: seconds until all workers went on, by kind of fault."""

    num_jobs: int = 0
    seconds: float = 0.0
    faults: Counter[str] = field(default_factory=Counter)
    slowest: dict[str, float] = field(default_factory=dict)
    num_acks: int = 0
    num_samples: int = 0
    num_taken_back: int = 0
    num_checks: int = 0
    num_given_up: int = 0
    growth: float = 0.0


def chaos(
    seed: int,
    seconds: float,
    *,
    number: int = 0,
    num_shards: int = 0,
    data_sets: int = 1,
    size: int = SIZE,
    patience: float = PATIENCE,
    say: Callable[[str], None] = print,
) -> Found:
    """Run jobs until the time is over; the last one is finished.

    Args:
        num_shards: shards of each job; 0 draws one or two.
        data_sets: data sets into which the ``size`` samples of a job are cut.

    Raises:
        AssertionError: something was lost, doubled, left, or hangs; says what, and in which job.
    """
    found, begin = Found(), time.monotonic()
    until = begin + seconds
    while time.monotonic() < until:
        before = set(_shm())
        with tempfile.TemporaryDirectory(prefix="torch-ps-chaos-") as folder:
            try:
                drawn = schedule.draw(seed, number + found.num_jobs, num_shards=num_shards, data_sets=data_sets)
                _job(drawn, found, Path(folder), size, until, patience, say)
            except BaseException as error:
                job = number + found.num_jobs
                more = f"--shards {num_shards} --data-sets {data_sets} --seconds {seconds:g}"
                error.add_note(f"again: python -m tests.chaos.run --seed {seed} --job {job} {more}")
                raise
        left = left_in_shm(before)
        assert not left, f"left in /dev/shm after job {found.num_jobs}: {left}"
        found.num_jobs += 1
        found.seconds = time.monotonic() - begin
    return found


def _job(
    drawn: Drawn,
    found: Found,
    folder: Path,
    size: int,
    until: float,
    patience: float,
    say: Callable[[str], None],
) -> None:
    setting, rounds = drawn
    say(f"job {found.num_jobs}: {setting}")
    first: dict[int, float] = {}  # MiB of each server process
    with running(setting, folder, size) as job:
        for each in rounds:
            time.sleep(each.pause)
            if job.ends or time.monotonic() > until:
                break
            _inject(job, each)
            seconds = _well(job, patience)
            job.settle(patience)
            job.check()
            growth = _growth(job, first)
            found.growth = max(found.growth, growth)
            found.num_checks += 1
            for fault in each.faults:
                found.faults[fault.kind] += 1
                found.slowest[fault.kind] = max(seconds, found.slowest.get(fault.kind, 0.0))
            names = " + ".join(f"{fault.kind} (w{fault.victim}, {fault.seconds:g} s)" for fault in each.faults)
            say(f"  {names}: all go on after {seconds:.1f} s, {len(job.ledger.required)} samples acknowledged")
        _finish(job, patience)
        job.check_end()
        found.num_checks += 1
        found.num_acks += job.ledger.num_acks
        found.num_taken_back += job.ledger.num_taken_back
        found.num_samples += size
        found.num_given_up += len(job.given_up)


def _inject(job: Job, each: Round) -> None:
    """Begin all faults of a round, and mend each when its seconds are over."""
    begin = time.monotonic()
    mends = [(fault, job.begin(fault)) for fault in each.faults]
    # A disk stays full until a checkpoint has failed, for which the workers have to come on.
    for fault, mend in sorted(mends, key=lambda pair: (pair[0].kind == schedule.DISK_FULL, pair[0].seconds)):
        time.sleep(max(0.0, begin + fault.seconds - time.monotonic()))
        mend()


def _well(job: Job, patience: float) -> float:
    """Wait until every worker has made a step, or is at the end of the data; seconds that it took."""
    begin = now()
    job.ledger.read()
    waiting = dict(enumerate(job.acks))
    while waiting:
        news = job.ledger.read()
        waiting = {n: path for n, path in waiting.items() if path not in news and job.workers[n].wait(0.0) != 0}
        job.check_workers()
        if now() - begin > patience:
            raise AssertionError(f"w{min(waiting)} makes no step for {patience:g} s:\n{job.servers.status()}")
        time.sleep(0.01)
    return now() - begin


def _finish(job: Job, patience: float) -> None:
    """Wait for the end of the data: none may wait for long without a step of anybody, and all end together."""
    last = now()
    while any(worker.wait(0.05) is None for worker in job.workers):
        if job.ledger.read():
            last = now()
        job.check_workers()
        assert now() - last < patience, f"nobody makes a step for {patience:g} s:\n{job.servers.status()}"
    job.check_workers()


def _growth(job: Job, first: dict[int, float]) -> float:
    most = 0.0
    for process in job.servers.processes:
        mib = resident(process.pid)
        growth = mib - first.setdefault(process.pid, mib)
        assert growth <= MOST_GROWTH, f"a server has grown by {growth:.0f} MiB to {mib:.0f} MiB"
        most = max(most, growth)
    return most


def _shm() -> list[str]:
    return [path.name for path in Path("/dev/shm").iterdir()]


def table(found: Found) -> str:
    lines = [f"{'fault':<18}{'times':>6}  slowest worker goes on after"]
    lines += [f"{kind:<18}{found.faults[kind]:>6}  {found.slowest.get(kind, 0.0):.1f} s" for kind in schedule.KINDS]
    count = sum(found.faults.values())
    per_hour = 3600 * count / max(found.seconds, 1e-9)
    lines += [
        f"{count} faults in {found.num_jobs} jobs and {found.seconds:.0f} s: {per_hour:.0f} an hour",
        f"{found.num_samples} samples, {found.num_acks} steps, {found.num_checks} checks: 0 lost, 0 doubled; "
        f"{found.num_taken_back} acknowledged samples trained again after a restart from an older checkpoint",
        f"{found.num_given_up} workers gave up because their servers were away for more than half a lease",
        f"a server grew by {found.growth:.1f} MiB at most; no traceback in any log; nothing left in /dev/shm",
    ]
    return "\n".join(lines)


@click.command(context_settings={"show_default": True})
@click.option("--seconds", default=300.0, type=click.FloatRange(min=0, min_open=True), help="Time to run.")
@click.option("--seed", default=0, help="Of what goes wrong.")
@click.option("--job", "number", default=0, help="Of that seed, to begin with.")
@click.option("--shards", "num_shards", default=0, help="Shards of each job; 0 draws one or two.")
@click.option("--data-sets", default=1, help=f"Data sets of each job, one after the other; divides {SIZE}.")
def main(seconds: float, seed: int, number: int, num_shards: int, data_sets: int) -> None:
    """Random faults in real jobs; fails when one costs more than it may."""
    if data_sets < 1 or SIZE % data_sets:
        raise click.UsageError(f"--data-sets {data_sets} does not divide {SIZE}")
    found = chaos(seed, seconds, number=number, num_shards=num_shards, data_sets=data_sets, say=click.echo)
    click.echo(table(found))


if __name__ == "__main__":
    main()
