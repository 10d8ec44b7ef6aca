"""Jobs that speak TLS and ask for the token: ps-run starts one, ps-status looks at one."""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import torch_ps
from tests.support import commands
from tests.support.certificates import Authority, options
from tests.support.jobs import job
from tests.worker.commands.test_run import ps_run
from torch_ps.common.options.compare_config import CompareConfig
from torch_ps.common.security.tls import Tls
from torch_ps.compare.run_process import PlannedRun, arguments
from torch_ps.compare.runs import Run

TOKEN = "a-secret-of-the-job-0123456789"


@dataclass(frozen=True)
class Keys:
    """What a process of the job has to show, as options of a server, of a client, and as flags."""

    tls: Tls
    token_file: str

    @property
    def flags(self) -> list[str]:
        files = {**options(self.tls), "token_file": self.token_file}
        return [f"--{name.replace('_', '-')}={value}" for name, value in files.items()]


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    (tmp_path / "token").write_text(TOKEN)
    return Keys(Authority(tmp_path).issue("job"), str(tmp_path / "token"))


def test_job_with_certificates_and_token_trains(keys: Keys) -> None:
    found = ps_run("-n", "2", "--shards", "2", *keys.flags, "--task", "digits", "--samples", "256")
    assert found.returncode == 0, found.stderr
    assert len(re.findall("mutual TLS, with token", found.stderr)) == 2
    assert "validation: " in found.stdout + found.stderr
    assert TOKEN not in found.stdout + found.stderr


def test_status_of_a_job_with_certificates_and_token(keys: Keys) -> None:
    with (
        job(token_file=keys.token_file, **options(keys.tls)) as servers,
        torch_ps.Client(str(servers), name="w0", tls=keys.tls, token_file=keys.token_file) as client,
    ):
        client.init({"x": torch.zeros(1)}, torch_ps.OptimizerSpec("SGD", lr=1.0))
        seen = commands.run("ps-status", "--servers", str(servers), *keys.flags)
        assert seen.exit_code == 0, seen.stderr
        assert "mode sync, initialised" in seen.stdout
        plain = commands.run("ps-status", "--servers", str(servers))
        assert plain.exit_code == 1
        assert "speaks TLS only and this process speaks in the clear" in plain.stderr
        refused = commands.run("ps-status", "--servers", str(servers), *keys.flags[:-1])
        assert refused.exit_code == 1
        assert "this server wants a token and none was shown" in refused.stderr


def test_comparison_hands_the_files_to_its_runs(tmp_path: Path) -> None:
    config = CompareConfig(tls_ca="ca", tls_cert="cert", tls_key="key", token_file="token")
    given = arguments(PlannedRun(Run("sync", {}), 0.0, tmp_path), config)
    assert {"--tls-ca=ca", "--tls-cert=cert", "--tls-key=key", "--token-file=token"} <= set(given)
