"""Every benchmark runs to its end on tiny sizes; the figures of so few rounds mean nothing and are not looked at."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURE = ROOT / "ARCHITECTURE.md"


def start(program: str, *options: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(ROOT / "bench" / program), *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment, check=False)


def bench(program: str, *options: str) -> str:
    done = start(program, "--quick", *options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def record(path: Path, row: str) -> dict[str, Any]:
    return next(each for each in json.loads(path.read_text())["rows"] if each["row"] == row)


def test_each_system_has_a_row_and_the_right_answer(tmp_path: Path) -> None:
    systems = ("network-fp16", "memory", "gloo", "rpc-tcp", "tcp")
    only = ",".join(f"{system} sync small" for system in systems)
    printed = bench("versus.py", "--only", only, "--json", str(tmp_path / "found"))
    for system in systems:
        row = record(tmp_path / "found", f"{system} sync small")
        assert row["row"] in printed
        assert row["error"] < (2e-2 if system == "network-fp16" else 1e-3)
        assert row["seconds_per_round"] > 0
        assert row["ratio_to_gloo"] > 0
    assert record(tmp_path / "found", "gloo sync small")["ratio_to_gloo"] == 1
    assert record(tmp_path / "found", "memory sync small")["server_mib_in_rounds"] > 10


def test_a_trace_agrees_with_the_loop_and_its_cost_is_shown() -> None:
    printed = bench("trace.py")
    assert printed.count("ms by the trace") == 1
    assert printed.count("times as long as one that is not") == 1


def test_async_counts_the_pushes_of_all_workers_and_a_system_that_cannot_run_is_named(tmp_path: Path) -> None:
    options = ("--only", "shm async small,rpc async small", "--json", str(tmp_path / "found"))
    done = start("versus.py", "--quick", "--repeat", "1", "--with", "mxnet", *options)
    assert done.returncode == 0, done.stderr
    assert "mxnet does not run: its last release needs numpy < 1.24" in done.stderr
    for system in ("shm", "rpc"):
        row = record(tmp_path / "found", f"{system} async small")
        assert row["error"] < 1e-3
        assert row["seconds_per_round"] == pytest.approx(1 / row["rounds_per_second"])


@pytest.mark.parametrize(
    ("program", "options", "message"),
    [
        ("versus.py", ("--with", "magic"), "--with knows ray, tensorflow, mxnet; got 'magic'"),
        ("versus.py", ("--only", "gloo async"), "no row is called 'gloo async'; these exist: network-fp32 sync big"),
        ("links.py", ("--rates", "fast"), "argument --rates: invalid positive value: 'fast'"),
    ],
)
def test_a_wrong_option_is_refused(program: str, options: tuple[str, ...], message: str) -> None:
    done = start(program, *options)
    assert done.returncode != 0
    assert message in done.stderr


def test_pushpull() -> None:
    assert "async fp32 small" in bench("pushpull.py", "--repeat", "1", "--only", "async fp32 small")


def test_overlap_has_the_bits_of_training_alone(tmp_path: Path) -> None:
    row, rates = ("loopback forward", "0") if reason_for_no_links() else ("1000 Mb/s forward", "0,1000")
    printed = bench("overlap.py", "--rates", rates, "--only", f"loopback off,{row}", "--json", str(tmp_path / "found"))
    for name in ("compute", "loopback off", row):
        assert name in printed
        assert record(tmp_path / "found", name)["runs"][0]["error"] == 0


def test_memory() -> None:
    assert "quick" in bench("memory.py", "--workers", "1")


def test_allocations() -> None:
    assert "sync fp32 small memory" in bench("allocations.py", "--only", "sync fp32 memory")


def test_codec(tmp_path: Path) -> None:
    assert "fp16" in bench("codec.py", "--only", "fp16", "--json", str(tmp_path / "found"))
    assert json.loads((tmp_path / "found").read_text())[0]["codec"] == "fp16"


def test_imports() -> None:
    assert "+ torch_ps" in bench("imports.py")


def test_way_of_a_push_crosses_no_more_files_than_the_documentation_says() -> None:
    printed = bench("call_path.py", "--only", "network")
    numbers = dict(re.findall(r"^network (ps|worker): (\d+) files", printed, re.MULTILINE))
    said = re.search(r"(\d+) on the server, in this order, and (\d+) on the worker", ARCHITECTURE.read_text())
    assert said is not None
    assert int(numbers["ps"]) <= int(said[1])
    assert int(numbers["worker"]) <= int(said[2])
    server = re.findall(r"^    ((?:ps|common)/.*)$", printed.partition("network worker")[0], re.MULTILINE)
    assert [path for path in server if f"`{path}`" not in ARCHITECTURE.read_text()] == []


def test_buckets_measure_both_ends() -> None:
    rows = bench("buckets.py", "--only", "2 workers,64 data sets").splitlines()
    assert [row.rsplit(maxsplit=2)[0].strip() for row in rows[1:]] == ["2 workers", "64 data sets"]
    assert all(float(figure) > 0 for row in rows[1:] for figure in row.rsplit(maxsplit=2)[1:])


def test_divergence() -> None:
    assert "10,000 parameters" in bench("divergence.py")


def test_tls_sends_and_receives_the_same_bytes_in_every_row() -> None:
    assert [row.split()[0] for row in bench("tls.py").splitlines()[2:]] == ["plain", "ssl", "ssl", "torch-ps"]


def reason_for_no_links(round_trip: float = 0.0) -> str:
    """Empty where links can be emulated, with a round trip in seconds."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if not (shutil.which("ip") and shutil.which("tc")):
        return "iproute2 is not installed"
    program = f"from bench.network import network\nwith network(1, 100, {round_trip}): pass"
    probe = [sys.executable, "-c", program]
    done = subprocess.run(probe, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    return done.stderr.strip().rpartition("\n")[2]


def namespaces() -> set[str]:
    return {path.name for path in Path("/run/netns").glob("torch-ps-*")}


def test_links_measure_and_leave_no_namespace(tmp_path: Path) -> None:
    if reason := reason_for_no_links():
        pytest.skip(reason)
    before = namespaces()
    options = ("--size", "small", "--workers", "1", "--shards", "2", "--rates", "100", "--only", "tcp")
    printed = bench("links.py", *options, "--json", str(tmp_path / "found"))
    found = json.loads((tmp_path / "found").read_text())
    assert [row["row"] for row in found] == ["100 Mb/s k=2 tcp"]
    assert all(row["row"] in printed and row["runs"][0]["error"] < 1e-3 for row in found)
    assert namespaces() <= before


def test_links_with_long_round_trips_measure_several_connections(tmp_path: Path) -> None:
    if reason := reason_for_no_links(0.01):
        pytest.skip(reason)
    before = namespaces()
    options = ("--size", "small", "--workers", "1", "--shards", "1", "--rates", "100", "--round-trip", "10")
    bench("links.py", *options, "--connections", "2", "--only", "fp32", "--json", str(tmp_path / "found"))
    (row,) = json.loads((tmp_path / "found").read_text())
    assert row["row"] == "100 Mb/s k=1 fp32 N=2"
    assert row["runs"][0]["error"] < 1e-3
    assert row["runs"][0]["seconds_per_round"] > 0.01
    assert namespaces() <= before


def test_links_say_what_is_missing() -> None:
    empty = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": ""}
    command = [sys.executable, str(ROOT / "bench" / "links.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=empty, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("links cannot be emulated here: ")
    assert done.stderr.count("\n") == 1


def test_what_checkpoints_cost_is_measured() -> None:
    header, without, with_them = bench("checkpoint.py").splitlines()
    assert "ms to copy a bucket" in header
    assert without.split()[-2] == "0"
    assert int(with_them.split()[-2]) > 0


def test_training_through_a_server_ends_with_the_bits_of_plain_training(tmp_path: Path) -> None:
    if len(os.sched_getaffinity(0)) < 2 or not shutil.which("taskset"):
        pytest.skip("two cores and taskset are needed")
    printed = bench("training.py", "--task", "digits", "--json", str(tmp_path / "found"))
    assert "same bits" in printed
    assert len(json.loads((tmp_path / "found").read_text())["runs"]) == 1


def test_what_a_gpu_runs_works_with_the_cpu_in_its_place(tmp_path: Path) -> None:
    options = ("--quick", "--only", "1 worker network gpu", "--json", str(tmp_path / "found"))
    environment = {**os.environ, "PYTHON": sys.executable}
    command = [str(ROOT / "scripts/gpu"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 worker network gpu    the bits of plain training" in done.stdout
    found = json.loads((tmp_path / "found").read_text())
    if not found["gpu"]:
        assert "torch finds no GPU here" in done.stdout
        assert "no GPU: the CPU stands in for it, and no figure is of a GPU; " in done.stdout
    (row,) = found["rows"]
    assert row["seconds_per_round"] > 0
    assert row["workers"][0]["compute"] > 0


def test_idle_job_is_measured_on_both_sides() -> None:
    rows = [line.split() for line in bench("idle.py").splitlines()]
    assert [row[0] for row in rows] == ["server", "two"]


def test_standby_prints_what_it_costs_and_how_soon_it_goes_on() -> None:
    printed = bench("standby.py", "--kills", "1")
    assert "without a standby" in printed
    assert "from kill -9 of the primary to the end of that step (lease 15 s): median" in printed
