"""Real workers die, stop, come back, drain and join during a run: every sample counts once and nobody hangs.

A worker writes a line for each step, so what it is doing is known; see ``tests.support.workers.train``.
"""

import contextlib
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.jobs import SECONDS, Servers, job, until
from tests.support.processes import Child

SIZE = 1200
BATCH_SIZE = 2
LEASE = 1.0


class Worker:
    """One process that trains on leased samples."""

    def __init__(self, servers: Servers, name: str, folder: Path, epochs: int = 1, **options: object) -> None:
        self.name, self._steps = name, folder / f"{name}.steps"
        arguments = (str(servers), name, SIZE, {"batch_size": BATCH_SIZE, "epochs": epochs} | options, str(self._steps))
        self.child = Child("tests.support.workers:train", arguments, folder / f"{name}.log")

    @property
    def steps(self) -> int:
        """Lines so far."""
        return len(self._lines())

    def runs(self, more: int = 3) -> None:
        """Wait until it has made some more steps."""
        wanted = self.steps + more
        until(lambda: self.child.wait(0.01) is None and self.steps >= wanted, f"{self.name} goes on")

    def ends(self) -> tuple[float, int]:
        """Wait for its end: samples that the job has absorbed, and how many samples it has seen some effect of."""
        code = self.child.wait(SECONDS)
        assert code == 0, f"{self.name} ended with {code}: {self.child.output}"
        _, absorbed, touched = self._lines()[-1].split()
        return float(absorbed), int(touched)

    def _lines(self) -> list[str]:
        return self._steps.read_text(encoding="utf-8").splitlines() if self._steps.exists() else []


@contextlib.contextmanager
def workers(
    mode: str, names: list[str], folder: Path, epochs: int = 1, shards: int = 1
) -> Iterator[tuple[Servers, list[Worker]]]:
    with job(mode=mode, workers=len(names), lease=LEASE, shards=shards) as servers:
        found = [Worker(servers, name, folder, epochs) for name in names]
        try:
            yield servers, found
        finally:
            for worker in found:
                worker.child.kill()


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("shards", [1, 2])
def test_samples_of_a_killed_worker_go_to_the_others(mode: str, shards: int, tmp_path: Path) -> None:
    with workers(mode, ["w0", "w1", "w2"], tmp_path, shards=shards) as (servers, (w0, w1, w2)):
        w1.runs()
        w1.child.end(signal.SIGKILL)
        ends = [w0.ends(), w2.ends()]
        assert "worker w1 is dropped: no sign of life" in servers.log
    assert max(absorbed for absorbed, _ in ends) == SIZE
    # It may have died between its two shards: then the lead has counted a batch whose effect is on the one only.
    effects = range(SIZE - BATCH_SIZE, SIZE + 1) if shards > 1 else [SIZE]
    assert ends[0][1] in effects or mode == "async"


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_worker_that_was_stopped_comes_back_by_itself(mode: str, tmp_path: Path) -> None:
    with workers(mode, ["w0", "w1"], tmp_path, epochs=40) as (servers, (w0, w1)):
        w1.runs()
        w1.child.send(signal.SIGSTOP)
        until(lambda: [w.worker for w in servers.status().worker] == ["w0"], "w1 is dropped")
        w0.runs()  # the bound in time is proved where time is given: tests/core/test_membership.py
        silent = re.search(r"worker w1 is dropped: no sign of life from w1 for (\d+\.\d) s", servers.log)
        assert silent
        assert float(silent[1]) >= LEASE
        w1.child.send(signal.SIGCONT)
        w1.runs()
        assert {w.worker for w in servers.status().worker} == {"w0", "w1"}
        assert w1.child.output.count("worker w1 takes part again") == 1
        for worker in (w0, w1):
            assert worker.child.end(signal.SIGTERM) == 0


def test_epochs_with_a_stopped_worker_are_exact(tmp_path: Path) -> None:
    with workers("sync", ["w0", "w1"], tmp_path, epochs=3) as (servers, (w0, w1)):
        w1.runs()
        w1.child.send(signal.SIGSTOP)
        until(lambda: [w.worker for w in servers.status().worker] == ["w0"], "w1 is dropped")
        w1.child.send(signal.SIGCONT)
        assert {w0.ends(), w1.ends()} == {(3.0 * SIZE, SIZE)}


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_sigterm_ends_a_worker_after_its_step_and_its_samples_go_to_the_others(mode: str, tmp_path: Path) -> None:
    with workers(mode, ["w0", "w1"], tmp_path) as (servers, (w0, w1)):
        w1.runs()
        assert w1.child.end(signal.SIGTERM) == 0
        assert "w1" not in {w.worker for w in servers.status().worker}  # it did not wait for its lease
        absorbed, touched = w0.ends()
        assert "worker w1 leaves" in servers.log
    assert (absorbed, touched) == (SIZE, SIZE)


def test_worker_that_joins_during_a_run_takes_its_part(tmp_path: Path) -> None:
    with workers("sync", ["w0"], tmp_path, epochs=2) as (servers, (w0,)):
        w0.runs()
        w1 = Worker(servers, "w1", tmp_path, epochs=2)
        try:
            w1.runs()
            assert {w0.ends(), w1.ends()} == {(2.0 * SIZE, SIZE)}
        finally:
            w1.child.kill()
