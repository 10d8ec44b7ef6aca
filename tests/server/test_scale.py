"""Many workers, and a model larger than any message may be."""

import contextlib
from pathlib import Path

import pytest
import torch

import torch_ps
from tests.support.jobs import job
from tests.support.threads import at_once

LARGE = 540_000_000  # 2.16 GB of fp32


@pytest.mark.tier("all")
@pytest.mark.parametrize("plane", ["network", "memory"])
@pytest.mark.parametrize(("num_workers", "num_shards", "steps"), [(32, 1, 100), (64, 4, 20)])
def test_many_workers_at_once_train_synchronously(num_workers: int, num_shards: int, steps: int, plane: str) -> None:
    numel = 10 if num_shards == 1 else 1000  # a bucket for each shard
    with job(workers=num_workers, shards=num_shards) as servers, contextlib.ExitStack() as stack:
        clients = [
            stack.enter_context(torch_ps.Client(str(servers), name=f"w{i}", plane=plane)) for i in range(num_workers)
        ]

        def train(client: torch_ps.Client) -> torch_ps.PushResult:
            client.init({"x": torch.zeros(numel)}, torch_ps.OptimizerSpec("SGD", lr=2.0**-10))
            for _ in range(steps):
                result = client.push({"x": torch.ones(numel)})
            return result

        results = at_once(*(lambda c=client: train(c) for client in clients))
    for result in results:
        assert len(result.contributors) == num_workers
        assert (result.version, result.samples) == (steps, steps * num_workers)
        assert (result.params["x"] * -1024 == steps).all()


def free_bytes() -> int:
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) << 10
    return 0


@pytest.mark.tier("all")
@pytest.mark.skipif(free_bytes() < 12 << 30, reason="needs 12 GiB of free memory")
@pytest.mark.parametrize("plane", ["network", "memory"])
def test_model_of_more_than_two_gigabytes_goes_through_in_messages_of_one_bucket(plane: str) -> None:
    # Both ends refuse a message above one bucket and its header, so that it goes through shows that none was larger.
    module = torch.nn.ParameterList([torch.zeros(LARGE - 1000), torch.full((1000,), 2.0)])
    with (
        job(threads=2) as servers,
        torch_ps.ParameterServerOptimizer(
            torch.optim.SGD(module.parameters(), lr=0.5), module, str(servers), overlap="off", plane=plane
        ) as optimizer,
    ):
        for parameter in module:
            parameter.grad = torch.ones(()).expand(parameter.shape)
        optimizer.step()
        assert optimizer.version == 1
        assert optimizer.pushed_bytes == 4 * LARGE
        assert optimizer.pulled_bytes == 2 * 4 * LARGE
    assert torch.equal(module[0][:: 1 << 20], torch.full((len(module[0][:: 1 << 20]),), -0.5))
    assert module[0][-1] == -0.5
    assert (module[1] == 1.5).all()
