"""ps-status --watch and --json: rates that agree with the counters, and an end that is clean whatever ends it."""

import contextlib
import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import torch_ps
from tests.support import commands
from tests.support.jobs import Servers, job, until
from tests.support.pair import SIZE, Pair, pair
from tests.support.processes import Child
from tests.support.threads import spawn
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.worker.commands.job_view import Poll
from torch_ps.worker.commands.status_table import render

SECONDS = 30.0
PROGRAM = "torch_ps.worker.commands.status:main"


@pytest.fixture(scope="module")
def running() -> Iterator[Pair]:
    with pair(shards=2) as workers:
        workers.train(3)
        yield workers


def looks(child: Child) -> list[dict[str, Any]]:
    return [json.loads(line) for line in child.output.splitlines(keepends=True) if line.endswith("}\n")]


def test_json_says_what_was_pushed(running: Pair, tmp_path: Path) -> None:
    child = Child(PROGRAM, (["--servers", str(running.servers), "--json"],), tmp_path / "log")
    assert child.wait(SECONDS) == 0
    (found,) = looks(child)
    assert found["mode"] == "sync"
    assert found["samples"] == 2 * running.steps
    assert [(w["name"], w["clock"], w["staleness"], w["pushed_bytes"]) for w in found["workers"]] == [
        ("w0", running.steps, 0, 4 * SIZE * running.steps),
        ("w1", running.steps, 0, 4 * SIZE * running.steps),
    ]
    assert [s["address"] for s in found["shards"]] == running.servers.addresses
    assert [s["version"] for s in found["shards"]] == [running.steps, 0]
    assert all(s["memory_bytes"] > 1e7 and s["queued"] == 0 for s in found["shards"])
    assert found["samples_per_second"] is None  # nothing to compare with


def test_watch_shows_rates_that_agree_with_the_counters_and_ends_with_ctrl_c(running: Pair, tmp_path: Path) -> None:
    options = ["--servers", str(running.servers), "--watch", "--json", "--interval", "0.05"]
    child = Child(PROGRAM, (options,), tmp_path / "log")

    def one_step() -> bool:
        running.train(1)
        return len(looks(child)) > 4

    until(one_step, "five looks")
    assert child.end(signal.SIGINT) == 0
    assert "Traceback" not in child.output
    found = looks(child)
    for before, after in pairwise(found):
        seconds = after["uptime_seconds"] - before["uptime_seconds"]
        grown = after["samples"] - before["samples"]
        assert after["samples_per_second"] == pytest.approx(grown / seconds)
        for one, other in zip(before["workers"], after["workers"], strict=True):
            assert other["steps_per_second"] == pytest.approx((other["clock"] - one["clock"]) / seconds)
    assert any(look["samples_per_second"] for look in found[1:])
    assert any(look["shards"][0]["pushed_bytes_per_second"] for look in found[1:])
    assert all(0 <= look["shards"][0]["busy"] <= 1.5 for look in found[1:])


def test_watch_ends_by_itself_after_watch_seconds(running: Pair, tmp_path: Path) -> None:
    options = ["--servers", str(running.servers), "--watch", "--interval", "0.1", "--watch-seconds", "0.35"]
    child = Child(PROGRAM, (options,), tmp_path / "log")
    assert child.wait(SECONDS) == 0
    assert 1 <= child.output.count("shards") <= 4  # where it cannot be in its place, one table below the other
    for column in ("samples/s", "busy", "queue", "waits"):
        assert column in child.output


def test_watch_without_a_job_is_an_error(tmp_path: Path) -> None:
    child = Child(PROGRAM, (["--servers", "127.0.0.1:1", "--watch"],), tmp_path / "log")
    assert child.wait(SECONDS) == 1
    assert "Error: server 127.0.0.1:1 does not answer" in child.output
    assert "; check --servers, and that ps-serve runs there" in child.output


@contextlib.contextmanager
def on_terminal(servers: Servers) -> Iterator[tuple["subprocess.Popen[bytes]", int]]:
    """The command with a terminal of 160 columns."""
    ours, theirs = pty.openpty()
    command = [
        sys.executable,
        "-m",
        "torch_ps.worker.commands.status",
        "--servers",
        str(servers),
        "--watch",
        "--interval",
        "0.1",
    ]
    environment = commands.environment() | {"COLUMNS": "160", "LINES": "40", "TERM": "xterm"}
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    try:
        yield process, ours
    finally:
        process.kill()
        process.wait(SECONDS)
        os.close(ours)


def read(terminal: int, text: bytes) -> bytes:
    """What it shows until ``text`` has come."""
    shown = b""
    while text not in shown:
        assert select.select([terminal], [], [], SECONDS)[0], shown
        shown += os.read(terminal, 1 << 16)
    return shown


def test_the_live_table_names_who_is_waited_for_and_gives_the_terminal_back() -> None:
    with job(workers=2) as servers:
        clients = [torch_ps.Client(str(servers), name=name) for name in ("w0", "w1")]
        with clients[0] as fast, clients[1] as slow:
            for client in (fast, slow):
                client.init({"x": torch.zeros(4)}, torch_ps.OptimizerSpec("SGD", lr=1.0))
                client.pull()
            waiting = spawn(lambda: fast.push({"x": torch.ones(4)}))
            with on_terminal(servers) as (process, terminal):
                read(terminal, b"step 0 waits for w1")
                process.send_signal(signal.SIGINT)
                assert b"\x1b[?25h" in read(terminal, b"\x1b[?25h")  # the cursor is back
                assert process.wait(SECONDS) == 0
            slow.push({"x": torch.ones(4)})
            waiting.result(SECONDS)


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_tables_fit_the_terminal_and_never_lose_a_figure_to_it(width: int) -> None:
    reply = pb.StatusReply(uptime_seconds=10, num_shards=1, mode="sync", initialised=True, num_parameters=124_000_000)
    worker = reply.worker.add(worker="gpu-node-17", clock=123456, bytes_pushed=10**12, connected=True)
    worker.waiting_seconds, worker.reason = 4.2, "step 123456 waits for gpu-node-3 and gpu-node-5"
    before = pb.StatusReply.FromString(reply.SerializeToString())
    reply.uptime_seconds, reply.worker[0].bytes_pushed, reply.worker[0].clock = 11, 10**12 + 10**9, 123460
    view = Poll(["10.0.0.17:50051"], [reply], Poll(["10.0.0.17:50051"], [before])).view()
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    for live in (True, False):
        with console.capture() as capture:
            console.print(render(view, width, live=live))
        shown = capture.get()
        assert max(map(len, shown.splitlines())) <= width
        assert not set(shown) & {chr(0x2026)}  # an ellipsis
        for text in ("gpu-node-17", "10.0.0.17:50051", *(["1.0 GB/s", "queue", "busy"] if live else [])):
            assert text in shown


def test_a_rate_is_unknown_where_a_counter_has_begun_anew() -> None:
    def reply(uptime: float, samples: float) -> pb.StatusReply:
        return pb.StatusReply(uptime_seconds=uptime, samples=samples, num_shards=1)

    first = Poll(["a:1"], [reply(10, 100)])
    assert first.view().samples_per_second is None
    assert Poll(["a:1"], [reply(12, 150)], first).view().samples_per_second == 25
    assert Poll(["a:1"], [reply(12, 3)], first).view().samples_per_second is None
    assert Poll(["a:1"], [reply(1, 150)], first).view().samples_per_second is None
