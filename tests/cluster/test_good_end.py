"""The end of a job of several shards by SIGTERM is quiet, as nothing is lost. Its log grows with its workers."""

import re
from pathlib import Path

import torch

import torch_ps
from tests.support.jobs import job
from tests.support.restart import shards

SPEC = torch_ps.OptimizerSpec("SGD", lr=1.0)


def test_shards_that_end_after_a_checkpoint_of_their_last_step_warn_of_nothing(tmp_path: Path) -> None:
    params = {"x": torch.zeros(512), "y": torch.zeros(512)}
    with shards(2, checkpoint=str(tmp_path / "kept"), checkpoint_every=2, bucket_size=0.001) as servers:
        with torch_ps.Client(str(servers), name="w0") as client:
            client.init(params, SPEC)
            for _ in range(4):
                client.push({name: torch.ones(512) for name in params})
        servers.stop()
        assert "checkpoint of version 4 is good" in servers.log
        for said in ("lost the lead", "has not taken the report", "is not kept"):
            assert said not in servers.log


def test_log_of_a_worker_that_joins_names_that_worker_alone() -> None:
    with job(workers=1) as servers:
        for number in range(4):
            with torch_ps.Client(str(servers), name=f"worker{number}") as client:
                client.init({"x": torch.zeros(8)}, SPEC)
        lines = [line for line in servers.log.splitlines() if " joins " in line or " leaves" in line]
    assert len(lines) >= 7  # the last one may leave later
    assert all(len(set(re.findall(r"worker\d", line))) == 1 for line in lines)
