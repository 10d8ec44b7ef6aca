"""A whole job of ps-run that speaks TLS and asks for the token, looked at by ps-status while it runs."""

import re
import subprocess
from pathlib import Path

from tests.support import commands
from tests.support.certificates import Authority, options
from tests.worker.commands.test_run import PS_RUN, ROOT, ps_run
from torch_ps.common.options.compare_config import CompareConfig
from torch_ps.compare.run_process import PlannedRun, arguments
from torch_ps.compare.runs import Run

TOKEN = "a-secret-of-the-job-0123456789"


def flags(tmp_path: Path) -> list[str]:
    tls = Authority(tmp_path).issue("job")
    token = tmp_path / "token"
    token.write_text(TOKEN)
    return [
        *(f"--{name.replace('_', '-')}={value}" for name, value in options(tls).items()),
        f"--token-file={token}",
    ]


def test_job_with_certificates_and_token_trains(tmp_path: Path) -> None:
    found = ps_run("-n", "2", "--shards", "2", *flags(tmp_path), "--task", "digits", "--samples", "256")
    assert found.returncode == 0, found.stderr
    assert len(re.findall("mutual TLS, with token", found.stderr)) == 2
    assert "validation: " in found.stdout + found.stderr
    assert TOKEN not in found.stdout + found.stderr


def test_status_of_a_job_with_certificates_and_token(tmp_path: Path) -> None:
    given = flags(tmp_path)
    script = tmp_path / "wait.py"
    script.write_text(
        "import os, sys, torch, torch_ps\n"
        "client = torch_ps.Client()\n"
        "client.init({'x': torch.zeros(1)}, torch_ps.OptimizerSpec('SGD', lr=1.0))\n"
        "print(os.environ['PS_SERVERS'], flush=True)\n"
        "import signal; signal.pause()\n"
    )
    with subprocess.Popen(
        [*PS_RUN, "-n", "1", *given, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
    ) as process:
        try:
            assert process.stdout is not None
            servers = process.stdout.readline().split()[-1]
            seen = commands.run("ps-status", "--servers", servers, *given)
            assert seen.exit_code == 0, seen.stderr
            assert "mode sync, initialised" in seen.stdout
            plain = commands.run("ps-status", "--servers", servers)
            assert plain.exit_code == 1
            assert "speaks TLS only and this process speaks in the clear" in plain.stderr
            refused = commands.run("ps-status", "--servers", servers, *given[:-1])
            assert refused.exit_code == 1
            assert "this server wants a token and none was shown" in refused.stderr
        finally:
            process.terminate()
            process.wait(60)


def test_comparison_hands_the_files_to_its_runs(tmp_path: Path) -> None:
    config = CompareConfig(tls_ca="ca", tls_cert="cert", tls_key="key", token_file="token")
    given = arguments(PlannedRun(Run("sync", {}), 0.0, tmp_path), config)
    assert {"--tls-ca=ca", "--tls-cert=cert", "--tls-key=key", "--token-file=token"} <= set(given)
