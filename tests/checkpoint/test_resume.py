"""A job that was stopped and goes on from a checkpoint has the bits of one that was never stopped."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torch_ps
from tests.support.jobs import until
from tests.support.restart import Shards, shards
from tests.support.threads import at_once
from tests.support.training import Experts, backward, conv, mlp, same, seeded
from torch_ps.ps.checkpoint.repository import Checkpoints


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def fused(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)


def fused_sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.01, fused=True)


CASES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "sgd with momentum": (mlp, sgd, {}),
    "adamw": (mlp, adamw, {}),
    "fused adamw": (mlp, fused, {}),
    "adamw, fp16 pushes": (mlp, adamw, {"compress": "fp16"}),
    "adamw, int8 pulls": (mlp, adamw, {"compress_pull": "int8"}),
    "sgd, sign pulls": (mlp, sgd, {"compress_pull": "sign"}),
    "adamw, buffers": (conv, adamw, {}),
    "adamw, experts without a gradient": (Experts, adamw, {}),
    "fused sgd, experts without a gradient": (Experts, fused_sgd, {}),
    "nadam, network": (mlp, lambda model: torch.optim.NAdam(model.parameters()), {"plane": "network"}),
    "asgd": (mlp, lambda model: torch.optim.ASGD(model.parameters(), t0=2), {}),
}


def train(servers: Shards, case: str, until_version: int, num_workers: int = 2) -> tuple[list[nn.Module], list[float]]:
    """Fresh workers train from the version that the job has; their models and the losses of the first one."""
    make, make_optimizer, options = CASES[case]
    models = [seeded(make) for _ in range(num_workers)]

    def worker(rank: int) -> list[float]:
        losses, model = [], models[rank]
        with torch_ps.ParameterServerOptimizer(
            make_optimizer(model), model, str(servers), name=f"w{rank}", **options
        ) as optimizer:
            while optimizer.version < until_version:
                for group in optimizer.param_groups:  # a schedule
                    group["lr"] = 0.01 / (1 + optimizer.version)
                losses.append(backward(model, optimizer.version, rank).item())
                optimizer.step()
                optimizer.zero_grad()
        return losses

    losses, *_ = at_once(*(lambda r=rank: worker(r) for rank in range(num_workers)))
    return models, losses


def versions(folder: Path) -> list[int]:
    return Checkpoints(str(folder)).versions()


@pytest.mark.parametrize(("case", "num_shards"), [(case, 2 - number % 2) for number, case in enumerate(CASES)])
def test_job_that_was_killed_goes_on_with_the_bits_and_losses_of_one_that_was_not(
    case: str, num_shards: int, tmp_path: Path
) -> None:
    with shards(num_shards, workers=2, bucket_size=0.002) as servers:
        undisturbed, losses = train(servers, case, 9)
    with shards(num_shards, workers=2, bucket_size=0.002, checkpoint=str(tmp_path), checkpoint_every=4) as servers:
        _, first = train(servers, case, 6)
        until(lambda: servers.status().checkpoint.version == 4, "the checkpoint of version 4 is good")
        servers.kill()
        servers.start(resume=True)
        assert [servers.status(shard).version for shard in range(num_shards)] == [4] * num_shards
        models, rest = train(servers, case, 9)
    assert first == losses[:6]
    assert rest == losses[4:]
    assert all(same(model, undisturbed[0]) for model in models)


@pytest.mark.parametrize("lead_last", [False, True])
def test_job_that_was_stopped_loses_no_step(lead_last: bool, tmp_path: Path) -> None:
    with shards(2, workers=2) as servers:
        undisturbed, losses = train(servers, "adamw", 9)
    with shards(2, workers=2, checkpoint=str(tmp_path)) as servers:
        _, first = train(servers, "adamw", 5)
        if lead_last:  # its part is there then, before the lead knows of the last checkpoint
            assert servers.processes[1].end() == 0
        servers.stop()
        assert versions(tmp_path) == [5]
        servers.start(resume=True)
        models, rest = train(servers, "adamw", 9)
    assert first + rest == losses
    assert same(models[0], undisturbed[0])


@pytest.mark.parametrize(("before", "after"), [(1, 3), (2, 1)])
@pytest.mark.parametrize("case", ["adamw, experts without a gradient", "fused sgd, experts without a gradient"])
def test_other_number_of_servers_goes_on_with_the_same_bits(case: str, before: int, after: int, tmp_path: Path) -> None:
    with shards(before, workers=2, bucket_size=0.002) as servers:
        undisturbed, losses = train(servers, case, 9)
    with shards(before, workers=2, bucket_size=0.002, checkpoint=str(tmp_path)) as servers:
        _, first = train(servers, case, 5)
        servers.stop()
    with shards(after, workers=2, bucket_size=0.001, checkpoint=str(tmp_path), resume=True) as servers:
        models, rest = train(servers, case, 9)
    assert first + rest == losses
    assert same(models[0], undisturbed[0])
