"""A server in a container with little memory refuses what does not fit, where the kernel would kill it."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import torch_ps
from tests.support.restart import shards
from torch_ps.common.errors import Refused

SPEC = torch_ps.OptimizerSpec("AdamW", lr=0.1)
MIB = 1 << 20


@contextlib.contextmanager
def control_group(limit: int) -> Iterator[Path]:
    """A control group with this limit of memory, in bytes; skips where none can be made."""
    for top, name in (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")):
        folder = Path(top, f"torch-ps-test-{os.getpid()}")
        try:
            folder.mkdir()
        except OSError:
            continue
        try:
            (folder / name).write_text(str(limit))
        except OSError:
            folder.rmdir()
            continue
        yield folder
        folder.rmdir()
        return
    pytest.skip("no control group with a limit of memory can be made here")


def test_model_that_does_not_fit_into_the_container_is_refused_with_the_sizes_and_a_smaller_one_trains() -> None:
    with control_group(1024 * MIB) as group, shards() as servers:
        (group / "cgroup.procs").write_text(str(servers.processes[0].pid))
        with torch_ps.Client(str(servers), name="w0") as client:
            with pytest.raises(Refused) as refused:
                client.init({"x": torch.zeros(1).expand(64 * MIB).contiguous()}, SPEC)
            assert "AdamW state and a gradient would take up to 1.25 GiB on each of 1 shards" in str(refused.value)
            assert f"are free of the 1.00 GiB of the control group {group}" in str(refused.value)
        with torch_ps.Client(str(servers), name="w1") as client:
            client.init({"x": torch.zeros(8 * MIB)}, SPEC)
            client.push({"x": torch.ones(8 * MIB)})
        servers.stop()
        servers.processes.clear()
