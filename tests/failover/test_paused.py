"""Machines that stand still for longer than the lease and go on: what they had running notices it all at once."""

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.jobs import SECONDS, until
from tests.support.processes import Child
from tests.support.replicated import Replicated, replicated

LEASE, SIZE = 2.0, 500


class Paused:
    """Two workers on a server with a standby, all of them processes."""

    def __init__(self, servers: Replicated, folder: Path) -> None:
        self.servers = servers
        self.primary, self.standby = servers.primaries[0], servers.standbys[0]
        self._logs = [folder / f"steps{n}" for n in range(2)]
        options = {"batch_size": 2}
        arguments = [(str(servers), f"w{n}", SIZE, options, str(log)) for n, log in enumerate(self._logs)]
        self.workers = [
            Child("tests.support.workers:train", each, folder / f"w{n}") for n, each in enumerate(arguments)
        ]

    def begin(self) -> None:
        self.servers.wait()
        until(lambda: self.servers.status(self.primary).version > 5, "training is under way")

    def end(self) -> None:
        """Every sample was trained on once."""
        assert [worker.wait(SECONDS) for worker in self.workers] == [0, 0], [worker.output for worker in self.workers]
        ends = [log.read_text(encoding="utf-8").splitlines()[-1] for log in self._logs]
        assert f"end {SIZE} {SIZE}" in ends, ends


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Paused]:
    with replicated(workers=2, lease=LEASE) as servers:
        found = Paused(servers, tmp_path)
        yield found
        for worker in found.workers:
            worker.kill()


def test_primary_that_stood_still_with_its_workers_drops_neither_them_nor_its_standby(job: Paused) -> None:
    job.begin()
    still = [*job.workers, job.primary.process]
    for process in still:
        process.send(signal.SIGSTOP)
    begin = time.monotonic()
    until(lambda: bool(job.servers.role(job.standby)) and time.monotonic() - begin > 1.5 * LEASE, "a lease is over")
    for process in reversed(still):
        process.send(signal.SIGCONT)
    job.end()
    said = job.primary.process.output
    assert "stood still for" in said
    assert "is dropped" not in said
    assert "is lost" not in said


def test_workers_and_standby_that_stood_still_let_the_primary_go_on_and_join_again(job: Paused) -> None:
    job.begin()
    still = [*job.workers, job.standby.process]
    for process in still:
        process.send(signal.SIGSTOP)
    until(lambda: job.servers.role(job.primary) == "asking", "the primary has lost its standby")
    until(lambda: job.primary.process.output.count("is dropped") == 2, "it has dropped its workers")
    status = job.servers.status(job.primary)  # the roster is as it was for everybody else
    assert [worker.worker for worker in status.worker] == ["w0", "w1"]
    for process in still:
        process.send(signal.SIGCONT)
    job.end()
