"""ps-serve and ps-status as processes: ports in use, signals, orphans, and the table of a live job."""

import contextlib
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import torch_ps
from tests.support import commands
from tests.support.jobs import PROGRAM, Addresses, ready, start_server
from tests.support.nohup import ignores_hangup, nohup
from tests.support.pair import SPEC, Pair, model, pair
from tests.support.processes import Child, children_of, watched
from torch_ps.common.options.server_config import ServerConfig

SECONDS = 30.0


@pytest.fixture(scope="module")
def running() -> Iterator[Pair]:
    with pair(shards=2) as workers:
        yield workers


def test_listening_for_other_machines_needs_a_flag(tmp_path: Path) -> None:
    config = ServerConfig(listen="0.0.0.0:0", workers=4, insecure=True, ready_file=str(tmp_path / "ready"))
    child = start_server(config, tmp_path / "log")
    while not (tmp_path / "ready").exists():
        assert child.wait(0.01) is None, child.output
    assert child.end() == 0


@pytest.mark.parametrize("option", ["listen", "metrics"])
def test_port_in_use_is_a_usage_error(option: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        arguments = ["--listen", "127.0.0.1:0", f"--{option}", f"127.0.0.1:{port}"]
        child = Child("torch_ps.ps.server.cli:main", (arguments,), tmp_path / "log")
        assert child.wait(SECONDS) == 2
    assert f"127.0.0.1:{port}: Address already in use" in child.output
    assert "add_port" not in child.output  # a line of gRPC's own
    assert f"choose another with --{option}" in " ".join(child.output.split())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_a_server_with_exit_code_0(number: signal.Signals, tmp_path: Path) -> None:
    child = start_server(ServerConfig(listen="127.0.0.1:0", ready_file=str(tmp_path / "ready")), tmp_path / "log")
    while not (tmp_path / "ready").exists():
        assert child.wait(0.01) is None, child.output
    assert child.end(number) == 0
    assert child.output.splitlines()[-1].endswith("server: shard 0 stops")


@pytest.mark.parametrize("shards", ["1", "2"])
def test_signals_that_come_again_until_the_end_do_not_change_the_exit_code(shards: str, tmp_path: Path) -> None:
    # Not a child of the fork server, which would end without an interpreter's last second.
    arguments = ["--listen", "127.0.0.1:0", "--shards", shards, "--ready-file", str(tmp_path / "ready")]
    command = [sys.executable, "-m", "torch_ps.ps.server.cli", *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=commands.environment()) as server:
        try:
            while not (tmp_path / "ready").exists():
                with pytest.raises(subprocess.TimeoutExpired):
                    server.wait(0.01)
            while server.poll() is None:
                server.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    server.wait(0.001)
        finally:
            server.kill()
    assert server.returncode == 0


def test_ctrl_c_at_a_server_that_starts_ends_it_without_a_word(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    ready.write_text("of former servers")
    with socket.create_server(("127.0.0.1", 0)) as mute:  # a lead that does not answer
        lead = f"127.0.0.1:{mute.getsockname()[1]}"
        arguments = ["--listen", "127.0.0.1:0", "--shard", "1/2", "--lead", lead, "--ready-file", str(ready)]
        command = [sys.executable, "-m", "torch_ps.ps.server.cli", *arguments]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=commands.environment()) as server:
            try:
                mute.settimeout(100)
                connection, _ = mute.accept()
                server.send_signal(signal.SIGINT)
                _, said = server.communicate(timeout=20)
            finally:
                server.kill()
            connection.close()
    assert server.returncode == -signal.SIGINT
    assert said == ""
    assert not ready.exists()


def test_command_serves_until_it_is_interrupted() -> None:
    with commands.serving("--listen", "127.0.0.1:0") as (process, ready):
        (server,) = json.loads(ready.read_text())["servers"]
        with torch_ps.Client(server, name="w0") as client:
            client.init(model(), SPEC)
            assert client.push({"x": torch.ones(8)}).version == 1
        assert process.end(signal.SIGINT) == 0


@pytest.mark.parametrize("shards", [1, 2])
def test_terminal_that_closes_ends_a_server_in_order_but_not_under_nohup(shards: int, tmp_path: Path) -> None:
    for program in (PROGRAM, f"{nohup.__module__}:{nohup.__name__}"):
        config = ServerConfig(listen="127.0.0.1:0", shards=shards, ready_file=str(tmp_path / program))
        child = start_server(config, tmp_path / f"{program}.log", program)
        told = ready(child, tmp_path / program)
        child.send(signal.SIGHUP)
        if program == PROGRAM:
            assert child.wait(SECONDS) == 0
            assert "shard 0 stops" in child.output
        else:
            assert len([address for address in told["servers"] if Addresses([address]).status().version == 0]) == shards
            assert ignores_hangup(child.pid)
            assert child.end() == 0


@pytest.mark.tier("all")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])  # SIGTERM: as every ps-run ends its servers
def test_end_of_several_shards_leaves_no_orphan(number: signal.Signals) -> None:
    with commands.serving("--listen", "127.0.0.1:0", "--shards", "2") as (process, ready):
        servers = json.loads(ready.read_text())["servers"]
        assert len(set(servers)) == 2
        children = children_of(process.pid)
        assert len(children) == 2
        with watched(children) as left:
            assert process.end(number) == (-number if number == signal.SIGKILL else 0)
            assert left(SECONDS) == []


def test_status_shows_workers_and_shards(running: Pair) -> None:
    found = commands.run("ps-status", "--servers", str(running.servers))
    assert found.exit_code == 0, found.stderr
    assert "mode sync, initialised" in found.stdout
    for text in ("w0", "w1", *running.servers.addresses, "0/2", "1/2", "memory"):
        assert text in found.stdout


def test_status_without_a_server_says_so(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        server = f"127.0.0.1:{gone.getsockname()[1]}"
    child = Child("torch_ps.worker.commands.status:main", (["--servers", server],), tmp_path / "log")
    assert child.wait(SECONDS) == 1
    assert f"Error: server {server} does not answer" in child.output
    assert "Traceback" not in child.output
