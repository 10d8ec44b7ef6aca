"""torchrun runs the same script, and a worker that is killed comes back; servers that live as long as a command."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deploy.launched import ROOT, accuracies, environment, free_port, process_with, started
from tests.docs.commands import shown
from tests.support import commands
from tests.support.jobs import SECONDS, Addresses, until
from torch_ps.common.rpc.credentials import access_of

PS_SERVE = [sys.executable, "-m", "torch_ps.ps.server.cli"]


@pytest.mark.timeout(600)
def test_worker_killed_under_torchrun_comes_back_under_its_name_and_the_job_learns(tmp_path: Path) -> None:
    server, meeting = (f"127.0.0.1:{free_port()}" for _ in range(2))
    first, second = (
        line.replace("host0:50051", server)
        .replace("host0:29400", meeting)
        .replace("--workers 8", "--workers 2")
        .replace("--nproc-per-node 4", "--nproc-per-node 1")
        .replace(" train.py", f" {ROOT}/examples/train.py")
        for line in shown("docs/machines/torchrun.md", "ps-serve --workers 8", "torchrun --nnodes")
    )
    token, ready = tmp_path / "token", tmp_path / "ready"
    token.write_text("a-token-of-this-test\n")
    with started(tmp_path, host0=(first, {"PS_READY_FILE": str(ready)}), host1=(second, {})) as (host0, host1):
        until(lambda: ready.exists() or host0.ends_within(0.2), "the servers accept work", 3 * SECONDS)
        servers = Addresses([server], access=access_of("", "", "", str(token), insecure=False))
        until(lambda: host0.ends_within(0.2) or servers.status().version >= 50, "training runs", 3 * SECONDS)
        os.kill(process_with(below=host1.pid, LOCAL_RANK="0"), signal.SIGKILL)
        assert [host1.wait(), host0.wait()] == [0, 0]
        assert host0.said.count("worker w0 joins") == 2
        assert host0.said.count("worker w1 joins") == 2
        assert accuracies(host0.said + host1.said) == pytest.approx([97.3] * 2, abs=1.5)


def test_servers_live_as_long_as_the_command_behind_the_options(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("a-token-of-this-test\n")
    script = 'trap "exit 7" TERM; echo "$PS_SERVERS $PS_TOKEN_FILE"; while :; do sleep 0.1; done'
    with subprocess.Popen(
        [*PS_SERVE, "--listen", "127.0.0.1:0", "--token-file", str(token), "--", "sh", "-c", script],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        servers, told = process.stdout.readline().split()
        process.terminate()  # the command first, then its servers
        _, err = process.communicate(timeout=SECONDS)
    assert (process.returncode, told, servers.startswith("127.0.0.1:")) == (7, str(token), True), err
    assert f"listens on {servers}" in err
    assert err.splitlines()[-1].endswith("shard 0 stops")


def test_command_that_does_not_exist_is_a_usage_error() -> None:
    done = commands.run("ps-serve", "--", "no-such-command")
    assert (done.exit_code, done.stderr.splitlines()[-1]) == (2, "Error: there is no command 'no-such-command'")
