"""ps-compare as a user starts it, with real servers and workers, on the digits that come with the package."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PARAMETERS = 4810  # of the digits MLP, 64-64-10
ROOT = Path(__file__).parents[2]


def ps_compare(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch_ps.compare.cli", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One comparison for all tests: sync with fp32 and async with fp16, w1 at half speed."""
    out = tmp_path_factory.mktemp("compare") / "out"
    done = ps_compare(
        "--task=digits", "--runs=sync,async:compress=fp16", "--samples=12800", "--slow=w1:4x", f"--out={out}"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (out / "terminal.txt").write_text(done.stdout)
    return out


@pytest.fixture
def results(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


def test_both_runs_learn_the_digits(results: dict[str, Any]) -> None:
    assert [run["name"] for run in results["runs"]] == ["sync fp32", "async fp16"]
    for run in results["runs"]:
        assert run["validation_accuracy"] > 0.8
        assert run["seconds_to_target"] <= run["seconds"]
        assert 12800 <= run["samples"] <= 12800 + 2 * 32
        assert len(run["curve"]) >= 10
    assert results["settings"]["parameters"] == PARAMETERS


def test_sync_has_twice_the_rate_and_no_staleness(results: dict[str, Any]) -> None:
    sync, asynchronous = results["runs"]
    assert (sync["lr"], asynchronous["lr"]) == (0.2, 0.1)
    assert sync["staleness"] == {"mean": 0.0, "max": 0, "histogram": {"0": 400}}
    # Conservation: one gradient in flight per worker makes the mean staleness N - 1 up to the edges. They are as long
    # as the machine holds up the worker whose last gradient comes after the end.
    assert asynchronous["staleness"]["mean"] == pytest.approx(1.0, abs=0.25)


def test_bytes_are_those_of_the_gradients(results: dict[str, Any]) -> None:
    for run, size in zip(results["runs"], (4, 2), strict=True):
        steps = sum(worker["steps"] for worker in run["workers_detail"]) / 2
        assert run["bytes"]["pushed_per_worker"] == pytest.approx(steps * PARAMETERS * size, rel=0.01)
        assert run["bytes"]["pulled_per_worker"] == pytest.approx(steps * PARAMETERS * 4, rel=0.01)


def test_sync_waits_for_the_slow_worker_and_async_does_not(results: dict[str, Any]) -> None:
    sync, asynchronous = (run["workers_detail"] for run in results["runs"])
    assert sync[0]["steps"] == sync[1]["steps"]
    assert asynchronous[0]["steps"] > 1.5 * asynchronous[1]["steps"]
    assert sync[0]["wait_seconds"] > sync[1]["wait_seconds"]


def test_table_report_and_paths_are_there(folder: Path) -> None:
    terminal = (folder / "terminal.txt").read_text()
    for words in ("sync fp32", "async fp16", "async at learning rate 0.1, sync at 2 x 0.1 = 0.2", "slowed: w1:4x"):
        assert words in " ".join(terminal.split())
    assert str(folder / "report.html") in terminal
    assert (folder / "report.html").stat().st_size > 1e6


def test_a_task_that_does_not_exist_is_refused_once(tmp_path: Path) -> None:
    done = ps_compare("--task=no_such_task", "--lr=0.1", f"--out={tmp_path / 'out'}")
    assert done.returncode == 2
    assert "there is no task 'no_such_task'; known are gpt, digits" in " ".join(done.stderr.split())
    assert not (tmp_path / "out").exists()
