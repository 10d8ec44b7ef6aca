"""Local steps where something is missing, not finite, scaled or compressed, and what a task tells about them."""

import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torch_ps
from tests.support.jobs import Servers, job
from tests.support.threads import at_once
from tests.support.training import backward, batch, mlp, same, seeded
from torch_ps.common.options.worker_config import WorkerConfig
from torch_ps.worker.training.loop import prepare, train

MEAN = {"outer_lr": 1.0, "outer_momentum": 0.0}
STEPS = 12


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)


def served(
    model: nn.Module, servers: Servers, inner: torch.optim.Optimizer | None = None, **options: Any
) -> torch_ps.ParameterServerOptimizer:
    options = {"local_steps": 4, **MEAN, **options}
    return torch_ps.ParameterServerOptimizer(inner or sgd(model), model, str(servers), **options)


@pytest.fixture
def servers() -> Iterator[Servers]:
    with job(bucket_size=0.001) as servers:
        yield servers


def close(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all((a - b).norm() <= 1e-6 * b.norm() for a, b in pairs)


# -------------------------------------------------------------- not finite


@pytest.mark.parametrize(("clip", "accumulate"), [(False, 1), (True, 1), (False, 2)])
def test_step_that_a_grad_scaler_skips_is_skipped_alone(servers: Servers, clip: bool, accumulate: int) -> None:
    def run(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, passes: int) -> None:
        """``passes``: of accumulate over the server; without it the loop scales the loss itself."""
        for step in range(STEPS * accumulate):
            loss = nn.functional.cross_entropy(model(batch(step)[0]), batch(step)[1])
            loss = loss * math.inf if step in (1, 9) else loss
            scaler.scale(loss if passes > 1 else loss / accumulate).backward()  # type: ignore[no-untyped-call]
            if (step + 1) % accumulate == 0:
                if clip and passes == 1:
                    scaler.unscale_(optimizer)
                    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
            elif passes > 1:
                optimizer.step()

    local, remote = seeded(mlp), seeded(mlp)
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0) for _ in range(2)]
    run(local, sgd(local), scalers[0], 1)
    with served(remote, servers, accumulate=accumulate) as optimizer:
        run(remote, optimizer, scalers[1], accumulate)
        assert (optimizer.left_out, optimizer.left_out_in_a_row) == (2, 0)
        assert (optimizer.version, optimizer.samples) == (3, (STEPS - 2) * accumulate)
        assert servers.status().nonfinite == 0
    assert scalers[0].get_scale() == scalers[1].get_scale() == 256.0
    assert close(remote, local)


def test_inner_step_that_is_not_finite_is_named_and_skipped(servers: Servers, caplog: pytest.LogCaptureFixture) -> None:
    local, remote = seeded(mlp), seeded(mlp)
    alone = sgd(local)
    with served(remote, servers, name="w0") as optimizer, caplog.at_level(logging.WARNING, "torch_ps.worker"):
        for step in range(4):
            backward(local, step)
            backward(remote, step)
            if step == 2:
                gradient = remote.get_parameter("2.weight").grad
                assert gradient is not None
                gradient[3, 4] = math.nan
            else:
                alone.step()
            optimizer.step()
            alone.zero_grad()
            optimizer.zero_grad()
        assert (optimizer.left_out, optimizer.samples, optimizer.version) == (1, 3, 1)
        assert "worker w0, inner step 3 of 4 is not finite in tensor '2.weight': not applied" in caplog.text
    assert close(remote, local)


def test_round_without_a_finite_step_is_pushed_with_weight_0_and_holds_up_nobody() -> None:
    models = [seeded(mlp) for _ in range(2)]
    with job(workers=2, bucket_size=0.001) as servers:

        def run(rank: int) -> None:
            model = models[rank]
            with served(model, servers, name=f"w{rank}") as optimizer:
                for step in range(8):
                    loss = nn.functional.cross_entropy(model(batch(step, rank)[0]), batch(step, rank)[1])
                    (loss * math.inf if rank and step < 4 else loss).backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
                    optimizer.zero_grad()
                    assert optimizer.samples == (0 if step < 3 else 4 if step < 7 else 12)
                assert optimizer.left_out == 4 * rank

        at_once(lambda: run(0), lambda: run(1))
        assert servers.status().nonfinite == 1
    assert same(*models)


def test_round_that_ends_not_finite_is_left_out_as_a_whole(servers: Servers, caplog: pytest.LogCaptureFixture) -> None:
    model, before = seeded(mlp), seeded(mlp)
    with served(model, servers, name="w0") as optimizer, caplog.at_level(logging.WARNING, "torch_ps.worker"):
        optimizer.param_groups[0]["lr"] = 1e38
        optimizer.param_groups[0]["weight_decay"] = 1e30
        for step in range(4):
            backward(model, step)
            optimizer.step()
            optimizer.zero_grad()
        assert (optimizer.version, optimizer.samples) == (1, 0)
        assert optimizer.left_out_in_a_row == optimizer.left_out > 0
        assert "local steps of worker w0, step 0 end not finite in tensor '0.weight': not applied" in caplog.text
    assert same(model, before)


# -------------------------------------------------------------- missing, compressed


class Branches(nn.Module):
    """Two layers, each in buckets of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)


def test_parameters_without_a_gradient_in_a_round_are_not_carried_on_by_the_outer_momentum() -> None:
    model = seeded(Branches)
    inner = torch.optim.SGD([{"params": layer.parameters()} for layer in model.children()], lr=0.1)
    with job() as servers, torch_ps.ParameterServerOptimizer(inner, model, str(servers), local_steps=2) as optimizer:
        first, second = (model.get_parameter(f"{name}.weight") for name in ("first", "second"))
        seen = []
        for gradients in ((1.0, 1.0), (1.0, None), (0.0, 0.0)):
            for _ in range(2):
                for parameter, value in zip((first, second), gradients, strict=True):
                    parameter.grad = None if value is None else torch.full_like(parameter, value)
                optimizer.step()
                optimizer.zero_grad()
            seen.append((first.detach().clone(), second.detach().clone()))
    assert not torch.equal(seen[1][0], seen[0][0])
    assert torch.equal(seen[1][1], seen[0][1])
    assert not torch.equal(seen[2][1], seen[1][1])  # a gradient of zero is one, and momentum carries it on


def test_sparse_gradients_are_stepped_as_such(servers: Servers) -> None:
    def table() -> nn.Module:
        return nn.Embedding(100, 8, sparse=True)

    def run(model: nn.Module, optimizer: torch.optim.Optimizer, passes: int) -> None:
        for step in range(8):
            for part in range(2):
                words = torch.tensor([step, 2 * step + part, 50])
                (model(words).square().sum() / (1 if passes > 1 else 2)).backward()
                if part or passes > 1:
                    optimizer.step()
                    optimizer.zero_grad()

    local, remote = seeded(table), seeded(table)
    run(local, torch.optim.SparseAdam(local.parameters(), lr=0.1), 1)
    with served(remote, servers, torch.optim.SparseAdam(remote.parameters(), lr=0.1), accumulate=2) as optimizer:
        run(remote, optimizer, 2)
        assert optimizer.version == 2
    assert close(remote, local)


def test_frozen_parameters_stay_out_of_it(servers: Servers) -> None:
    model = seeded(mlp)
    model[0].requires_grad_(False)  # type: ignore[index]
    before = model.get_parameter("0.weight").detach().clone()
    with served(model, servers) as optimizer:
        for step in range(8):
            backward(model, step)
            optimizer.step()
            optimizer.zero_grad()
        assert optimizer.pushed_bytes == 2 * 4 * (33 * 7 + 7)
    assert torch.equal(model.get_parameter("0.weight"), before)


class Slope(nn.Module):
    """A loss with the same gradient everywhere: every round makes the same pseudo-gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(1000))


@pytest.mark.parametrize("codec", ["topk:0.1", "sign", "int8", "fp16"])
def test_what_a_codec_leaves_out_of_a_pseudo_gradient_comes_with_later_ones(servers: Servers, codec: str) -> None:
    slope, rounds = torch.rand(1000, generator=torch.Generator().manual_seed(1)) + 0.5, 100
    model = Slope()
    inner = torch.optim.SGD(model.parameters(), lr=0.5)
    with served(model, servers, inner, local_steps=2, compress=codec, feedback="on") as optimizer:
        for _ in range(2 * rounds):
            (slope * model.x).sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
        assert optimizer.pushed_bytes < 0.6 * 4 * 1000 * rounds
    # One round changes x by -slope; what is kept back is worth a few tens of rounds at most.
    assert ((model.x + rounds * slope) / slope).abs().max() < (40 if codec == "topk:0.1" else 10)


# -------------------------------------------------------------- a ready-made task


def test_task_tells_of_pushes_where_they_are_and_is_measured_after_them_alone(tmp_path: Path) -> None:
    size, passes, samples = 20, 2 * 4, 12000
    with job() as servers:
        config = WorkerConfig(
            servers=str(servers),
            task="digits",
            device="cpu",
            samples=samples,
            batch_size=size,
            accumulate=2,
            local_steps=4,
            outer_lr=1.0,
            outer_momentum=0.0,
            lr=0.1,
            evaluations=7,
            events=str(tmp_path / "events"),
        )
        train(prepare(config))
    events = [json.loads(line) for line in (tmp_path / "events").read_text().splitlines()]
    (start,) = [event for event in events if event["event"] == "start"]
    assert {"local_steps": 4, "outer_lr": 1.0, "outer_momentum": 0.0}.items() <= start["settings"].items()
    steps = [event for event in events if event["event"] == "step"]
    assert len(steps) == samples // size
    for step in steps:
        rounds = step["step"] // passes
        assert step["staleness"] == (0 if step["step"] % passes == 0 else None)
        assert (step["version"], step["job_samples"]) == (rounds, rounds * passes * size)
    measured = [event for event in events if event["event"] == "evaluation"]
    assert [event["job_samples"] % (passes * size) for event in measured] == [0] * 7
    assert measured[-1]["job_samples"] == samples
    assert measured[-1]["metrics"]["accuracy"] > 0.9
