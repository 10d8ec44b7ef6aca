"""Whole comparisons with a made-up ps-run: what is written, what a failure costs, what Ctrl-C leaves."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from tests.compare import golden, synthetic
from torch_ps.common.errors import ConfigError, PsError
from torch_ps.common.options.compare_config import CompareConfig
from torch_ps.compare import cli, defaults
from torch_ps.compare.run_process import PlannedRun, arguments, child_environment
from torch_ps.compare.runs import parse_runs

PROGRAM = (sys.executable, synthetic.__file__)


def compare(out: Path, **options: Any) -> tuple[int, str, dict[str, Any]]:
    """Exit code, terminal output and results.json of a comparison of synthetic jobs."""
    given: dict[str, Any] = {"task": "ok", "lr": 0.1, "samples": 256, "runs": "sync,async", "out": str(out)}
    with (out.parent / "terminal.txt").open("w+") as file:
        code = cli.compare_runs(CompareConfig(**(given | options)), Console(file=file, width=100), PROGRAM)
        file.seek(0)
        return code, file.read(), json.loads((out / "results.json").read_text())


def test_the_golden_figures_have_not_changed() -> None:
    assert golden.compute() == golden.golden()


def test_a_comparison_leaves_table_report_results_and_logs(tmp_path: Path) -> None:
    code, terminal, results = compare(tmp_path / "out", runs="sync,sync:compress=fp16,async")
    assert code == 0
    assert [run["name"] for run in results["runs"]] == ["sync fp32", "sync fp16", "async fp32"]
    assert [run["lr"] for run in results["runs"]] == [0.2, 0.2, 0.1]
    assert all(run["seconds_to_target"] > 0 for run in results["runs"])
    assert "sync fp16: done, 256/256 samples" in terminal
    assert "report.html" in terminal
    assert (tmp_path / "out" / "report.html").stat().st_size > 1e6
    assert "synthetic job" in (tmp_path / "out" / "sync-fp16" / "log.txt").read_text()
    command = "ps-compare --runs=sync,sync:compress=fp16,async --task=ok --samples=256 --lr=0.1"
    assert results["settings"]["command"] == command


def test_every_run_is_told_to_write_a_trace_of_its_own(tmp_path: Path) -> None:
    plan, config = PlannedRun(parse_runs("sync")[0], 0.1, tmp_path / "sync-fp32"), CompareConfig(trace_steps="3:5")
    told = arguments(plan, config)
    assert f"--trace={tmp_path}/sync-fp32/trace.json" in told
    assert "--trace-steps=3:5" in told
    assert not any("trace" in flag for flag in arguments(plan, config, events=False))
    with pytest.raises(ConfigError, match="trace is the same for all runs or set by the launcher"):
        parse_runs("sync:trace=t.json")


def test_an_automatic_batch_size_is_found_once_and_is_the_smallest_of_the_workers(tmp_path: Path) -> None:
    code, terminal, results = compare(tmp_path / "out", batch_size="auto")
    assert code == 0
    assert "batch size auto: 16 for all runs, as w1 found: what suits w1" in terminal
    assert [run["batch_size"] for run in results["runs"]] == [16, 16]
    assert results["settings"]["batch_size"] == 16
    assert "--batch-size=16" in results["settings"]["command"]
    assert all("--batch-size=16" in run["command"] for run in results["runs"])
    assert (tmp_path / "out" / "batch-size" / "log.txt").exists()


def test_a_search_for_the_batch_size_that_cannot_start_ends_the_comparison(tmp_path: Path) -> None:
    config = CompareConfig(task="refuse", lr=0.1, batch_size="auto", out=str(tmp_path / "out"))
    with pytest.raises(ConfigError, match=r"^there is no task 'refuse'$"):
        cli.compare_runs(config, Console(quiet=True), PROGRAM)
    assert not (tmp_path / "out").exists()
    config = CompareConfig(task="silent", lr=0.1, batch_size="auto", out=str(tmp_path / "out"))
    with pytest.raises(PsError, match="no batch size was found: ps-run ended with exit code 0"):
        cli.compare_runs(config, Console(quiet=True), PROGRAM)


def test_a_slow_worker_makes_only_the_sync_run_wait(tmp_path: Path) -> None:
    _, _, results = compare(tmp_path / "out", slow=("w1:3x",))
    sync, asynchronous = results["runs"]
    assert sync["workers_detail"][0]["wait_seconds"] > 0.5 * sync["seconds"]
    assert asynchronous["workers_detail"][0]["wait_seconds"] < 0.25 * asynchronous["seconds"]
    assert asynchronous["workers_detail"][0]["steps"] > 2 * asynchronous["workers_detail"][1]["steps"]


def test_a_run_that_fails_is_reported_and_the_next_one_runs(tmp_path: Path) -> None:
    code, terminal, results = compare(tmp_path / "out", task="crash")
    assert code == 1
    assert [run["name"] for run in results["runs"]] == ["async fp32"]
    (failure,) = results["failures"]
    assert failure["name"] == "sync fp32"
    assert failure["reason"].startswith("ps-run ended with exit code 3\n")
    assert "the moon is in the wrong place" in failure["reason"]
    assert failure["log"].endswith("sync-fp32/log.txt")
    assert "sync fp32 did not finish: ps-run ended with exit code 3" in terminal
    assert failure["log"] in terminal


def test_a_run_that_ends_well_without_events_has_failed(tmp_path: Path) -> None:
    code, terminal, results = compare(tmp_path / "out", task="silent", runs="sync")
    assert code == 1
    assert results["runs"] == []
    assert "only 0 of 2 workers wrote their last event" in terminal


def test_an_option_that_the_first_run_refuses_ends_the_comparison_and_leaves_nothing(tmp_path: Path) -> None:
    config = CompareConfig(task="refuse", lr=0.1, out=str(tmp_path / "out"))
    with pytest.raises(ConfigError, match=r"^there is no task 'refuse'$"):
        cli.compare_runs(config, Console(quiet=True), PROGRAM)
    assert not (tmp_path / "out").exists()


def test_a_program_that_is_not_there_is_a_failed_run(tmp_path: Path) -> None:
    config = CompareConfig(task="ok", lr=0.1, runs="sync", out=str(tmp_path / "out"))
    with (tmp_path / "terminal.txt").open("w") as file:
        assert cli.compare_runs(config, Console(file=file), ["/nonexistent/ps-run"]) == 1
    assert "cannot start" in (tmp_path / "terminal.txt").read_text()


@pytest.mark.parametrize("signalled", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_reports_what_has_finished_and_leaves_no_process(tmp_path: Path, signalled: signal.Signals) -> None:
    code = (
        "import sys, signal; from rich.console import Console; from torch_ps.compare import cli;"
        "from torch_ps.common.options.compare_config import CompareConfig;"
        "signal.signal(signal.SIGTERM, cli._as_interrupt);"
        f"config = CompareConfig(task='hang', lr=0.1, samples=256, runs='sync,async', out={str(tmp_path / 'out')!r});"
        f"sys.exit(cli.compare_runs(config, Console(width=100), {PROGRAM!r}))"
    )
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    environment = os.environ | {"SYNTHETIC_PIPE": str(pipe), "PYTHONUNBUFFERED": "1"}
    root = Path(__file__).parents[2]
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment, cwd=root) as process:
        assert process.stdout is not None
        with pipe.open("rb") as alive:
            for line in process.stdout:
                if line.startswith(b"async fp32: training"):
                    break
            process.send_signal(signalled)
            terminal = process.stdout.read().decode()
            assert process.wait() == 1
            assert alive.read() == b""  # returns when the last process that could write is gone
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [run["name"] for run in results["runs"]] == ["sync fp32"]
    assert [(each["name"], each["reason"]) for each in results["failures"]] == [("async fp32", "stopped by Ctrl-C")]
    assert (tmp_path / "out" / "report.html").exists()
    assert "sync fp32 reached loss" in terminal


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    compare(tmp_path / "out", runs="sync")
    with pytest.raises(ConfigError, match="not an empty folder"):
        compare(tmp_path / "out", runs="sync")


def test_a_rate_that_is_not_known_cannot_be_scaled(tmp_path: Path) -> None:
    config = CompareConfig(task="my:task", runs="sync,async", out=str(tmp_path / "out"))
    with pytest.raises(ConfigError, match="give lr, or scale-lr off"):
        cli.compare_runs(config, Console(quiet=True), PROGRAM)
    assert not (tmp_path / "out").exists()


def test_all_that_defines_a_run_is_on_its_command_line(tmp_path: Path) -> None:
    (run,) = parse_runs("sync:compress=fp16:shards=2")
    config = CompareConfig(task="digits", data="a b", samples=64, slow=("w1:3x",), workers=3, seed=7)
    given = arguments(PlannedRun(run, 0.3, tmp_path), config)
    assert given[:2] == ["-n", "3"]
    for flag in ("--mode=sync", "--compress=fp16", "--shards=2", "--lr=0.3", "--data=a b", "--seed=7", "--slow=w1:3x"):
        assert given.count(flag) == 1
    assert not any(flag.startswith("--batch-size") for flag in given)
    assert child_environment({"PS_COMPRESS": "bf16", "PATH": "/bin"}) == {"PATH": "/bin"}


def test_a_refused_option_is_a_usage_error(tmp_path: Path) -> None:
    for arguments_, words in (
        (["--runs", "sync:colour=red"], "unknown option 'colour'"),
        (["--workers", "0"], "workers must be >= 1"),
        (["--slow", "w9:2x"], "workers of this job are w0 to w1"),
    ):
        result = CliRunner().invoke(cli.main, [*arguments_, "--out", str(tmp_path / "out")])
        assert result.exit_code == 2
        assert words in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()


def test_help_fits_a_screen() -> None:
    text = CliRunner().invoke(cli.main, ["--help"], terminal_width=100).output
    assert len(text.splitlines()) <= 40
    assert "--scale-lr" in text


def test_a_report_is_written_again_from_results(tmp_path: Path) -> None:
    source = tmp_path / "results.json"
    source.write_text(golden.FILE.read_text())
    result = CliRunner().invoke(cli.main, ["--report", str(source)])
    assert result.exit_code == 0
    assert (tmp_path / "report.html").exists()
    assert json.loads(source.read_text()) == json.loads(golden.FILE.read_text())
    assert CliRunner().invoke(cli.main, ["--report", str(tmp_path / "none.json")]).exit_code == 2


def test_rates_and_batch_sizes_are_those_of_the_tasks() -> None:
    load = pytest.importorskip("torch_ps.worker.tasks.registry").load
    for name, known in defaults.TASKS.items():
        task = load(name)
        assert (known.lr, known.batch_size) == (task.default_lr, task.default_batch_size)
