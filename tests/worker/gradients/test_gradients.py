"""Gradients that are scaled, missing, sparse or not finite: applied as torch would, or not at all."""

import logging
import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

import torch_ps
from tests.support.gpu import DEVICES
from tests.support.jobs import job
from tests.support.threads import at_once
from tests.support.training import backward, batch, mlp, same, seeded

Loop = Callable[[nn.Module, torch.optim.Optimizer, torch.amp.GradScaler], None]
STEPS = 12


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)


def served(model: nn.Module, servers: object, **options: object) -> torch_ps.ParameterServerOptimizer:
    return torch_ps.ParameterServerOptimizer(sgd(model), model, str(servers), **options)  # type: ignore[arg-type]


# -------------------------------------------------------------- GradScaler


def scaled_backward(step: int, model: nn.Module, scaler: torch.amp.GradScaler) -> None:
    """Two of the steps overflow."""
    inputs, labels = batch(step)
    device = next(model.parameters()).device
    loss = nn.functional.cross_entropy(model(inputs.to(device)), labels.to(device))
    loss = loss * math.inf if step in (0, 5) else loss
    scaler.scale(loss).backward()  # type: ignore[no-untyped-call]


def scaled(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
    """The loop of torch's documentation."""
    for step in range(STEPS):
        scaled_backward(step, model, scaler)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()


def clipped(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
    for step in range(STEPS):
        scaled_backward(step, model, scaler)
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()


@pytest.mark.parametrize("overlap", ["auto", "off"])
@pytest.mark.parametrize("loop", [scaled, clipped])
@pytest.mark.parametrize("device", DEVICES)
def test_grad_scaler_trains_to_the_bits_of_local_training(device: str, loop: Loop, overlap: str) -> None:
    local, remote = seeded(mlp).to(device), seeded(mlp).to(device)
    scalers = [torch.amp.GradScaler(device, init_scale=1024.0) for _ in range(2)]
    loop(local, sgd(local), scalers[0])
    with job(bucket_size=0.001) as servers, served(remote, servers, overlap=overlap) as optimizer:
        loop(remote, optimizer, scalers[1])
        assert optimizer.left_out == 2
        assert optimizer.samples == STEPS - 2
        assert servers.status().nonfinite == 2
    assert scalers[0].get_scale() == scalers[1].get_scale() == 256.0
    assert device == "cuda" or same(local, remote)
    for a, b in zip(local.parameters(), remote.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_skipped_step_of_one_worker_holds_up_nobody() -> None:
    with job(workers=2) as servers:

        def run(index: int) -> tuple[nn.Module, int]:
            model = seeded(mlp)
            scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
            with served(model, servers, name=f"w{index}") as optimizer:
                for step in range(4):
                    inputs, labels = batch(step, index)
                    loss = nn.functional.cross_entropy(model(inputs), labels)
                    scaler.scale(loss * math.inf if (index, step) == (1, 2) else loss).backward()  # type: ignore[no-untyped-call]
                    scaler.step(optimizer)
                    scaler.update()
                    optimizer.zero_grad()
                assert optimizer.samples == 7
                return model, optimizer.left_out

        (first, none), (second, one) = at_once(lambda: run(0), lambda: run(1))
    assert (none, one) == (0, 1)
    assert same(first, second)


def test_grad_scaler_breaks_the_promise_of_an_eager_loop_before_anything_is_applied() -> None:
    model, before, scaler = seeded(mlp), seeded(mlp), torch.amp.GradScaler("cpu")
    with (
        job() as servers,
        served(model, servers, overlap="eager") as optimizer,
        pytest.raises(torch_ps.PsError, match=r"a GradScaler scales the gradients.*nothing has been sent"),
    ):
        scaled(model, optimizer, scaler)
    assert same(model, before)


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("change", [False, True])
def test_accumulated_passes_have_each_its_own_scale(change: bool, unscale: bool) -> None:
    model, plain = seeded(mlp), seeded(mlp)
    scaler, inner = torch.amp.GradScaler("cpu"), sgd(plain)
    with job() as servers, served(model, servers, accumulate=2) as optimizer:
        for step in range(2):
            (backward_loss(plain, step) / 2).backward()  # type: ignore[no-untyped-call]
            scaler.scale(backward_loss(model, step)).backward()  # type: ignore[no-untyped-call]
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update(new_scale=8.0 if change else None)
            model.zero_grad()
        assert optimizer.left_out == 0
    inner.step()
    assert same(model, plain)


def test_overflow_in_an_earlier_pass_leaves_the_whole_push_out() -> None:
    model, before, scaler = seeded(mlp), seeded(mlp), torch.amp.GradScaler("cpu")
    with job() as servers, served(model, servers, accumulate=2) as optimizer:
        for step in range(2):
            scaler.scale(backward_loss(model, step) * (1 if step else math.inf)).backward()  # type: ignore[no-untyped-call]
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert optimizer.left_out == 1
    assert same(model, before)


def backward_loss(model: nn.Module, step: int = 0) -> torch.Tensor:
    inputs, labels = batch(step)
    return nn.functional.cross_entropy(model(inputs), labels)


# -------------------------------------------------------------- not finite


@pytest.mark.parametrize(
    ("value", "options"),
    [(math.nan, {}), (math.inf, {"plane": "network"}), (-math.inf, {"overlap": "off"}), (math.nan, {"overlap": "on"})],
)
def test_gradient_that_is_not_finite_is_named_and_changes_no_layer(
    value: float, options: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    model, before = seeded(mlp), seeded(mlp)
    with (
        job(bucket_size=0.001) as servers,
        served(model, servers, name="w0", **options) as optimizer,
        caplog.at_level(logging.WARNING, "torch_ps.worker"),
    ):
        backward(model, 0)
        gradient = model.get_parameter("2.weight").grad
        assert gradient is not None
        gradient[3, 4] = value
        optimizer.step()
        assert same(model, before)
        assert optimizer.left_out == 1
        assert servers.status().nonfinite == 1
        assert "gradient of worker w0, step 0 is not finite in tensor '2.weight'" in caplog.text
        optimizer.zero_grad()
        backward(model, 0)
        optimizer.step()
        assert not same(model, before)


def test_finite_gradient_whose_sum_overflows_is_applied() -> None:
    model = nn.Linear(4, 1, bias=False)
    with job() as servers, served(model, servers, overlap="off") as optimizer:
        model.weight.grad = torch.full_like(model.weight, 2e38)
        optimizer.step()
        assert optimizer.left_out == 0
        assert optimizer.samples == 1


# -------------------------------------------------------------- missing


class Branches(nn.Module):
    """Two layers of which a step uses one or both; each fills buckets of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)

    def loss(self, use: str) -> torch.Tensor:
        x = torch.ones(1, 64)
        total = torch.zeros(())
        for name in use.split():
            total = total + self.get_submodule(name)(x).square().sum()
        return total


def optimizer_of(model: Branches) -> torch.optim.Optimizer:
    groups = [{"params": model.first.parameters()}, {"params": model.second.parameters()}]
    return torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1, foreach=False)


@pytest.mark.parametrize("overlap", ["auto", "on", "off"])
def test_parameters_without_a_gradient_are_not_stepped_as_in_torch(overlap: str) -> None:
    uses = ["first second", "first", "first", "second", "first second", "second"]

    def train(model: Branches, optimizer: torch.optim.Optimizer) -> None:
        for use in uses:
            model.loss(use).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()

    local, remote = seeded(Branches), seeded(Branches)
    assert isinstance(local, Branches)
    assert isinstance(remote, Branches)
    train(local, optimizer_of(local))
    with (
        job(bucket_size=0.004) as servers,
        torch_ps.ParameterServerOptimizer(optimizer_of(remote), remote, str(servers), overlap=overlap) as optimizer,
    ):
        train(remote, optimizer)
        assert optimizer.samples == len(uses)
    assert same(local, remote)


def test_gradient_that_one_worker_lacks_is_a_zero_in_the_mean() -> None:
    models = [seeded(Branches) for _ in range(2)]  # before any thread runs: all draw from one generator
    with job(workers=2) as servers:

        def run(index: int) -> None:
            model = models[index]
            assert isinstance(model, Branches)
            optimizer = torch.optim.SGD(optimizer_of(model).param_groups[0]["params"], lr=1.0)
            with torch_ps.ParameterServerOptimizer(optimizer, model, str(servers), name=f"w{index}") as wrapped:
                if index == 0:
                    model.first.weight.grad = torch.ones(64, 64)
                wrapped.step()

        at_once(lambda: run(0), lambda: run(1))
    expected = seeded(Branches).get_parameter("first.weight") - 0.5
    for model in models:
        assert torch.equal(model.get_parameter("first.weight"), expected)


# -------------------------------------------------------------- sparse


class Words(nn.Module):
    def __init__(self, sparse: bool = True) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(100, 8, sparse=sparse), nn.Linear(8, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.out(self.table(x.abs().mul(30).long().clamp(max=99)).mean(1))
        return y


@pytest.mark.parametrize("overlap", ["auto", "on", "off"])
@pytest.mark.filterwarnings("default:the gradient of")
def test_sparse_gradient_trains_as_a_dense_one_and_a_warning_says_so_once(overlap: str) -> None:
    local, remote = seeded(lambda: Words(sparse=False)), seeded(Words)

    def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for step in range(5):
            backward(model, step)
            optimizer.step()
            optimizer.zero_grad()

    train(local, sgd(local))
    with (
        job(bucket_size=0.001) as servers,
        pytest.warns(UserWarning, match="'table.weight' is sparse") as warned,
        served(remote, servers, overlap=overlap) as optimizer,
    ):
        train(remote, optimizer)
    assert len(warned) == 1
    assert same(local, remote)


@pytest.mark.filterwarnings("default:the gradient of")
def test_sparse_gradient_that_is_not_finite_is_left_out() -> None:
    model, before = seeded(Words), seeded(Words)
    with job() as servers, served(model, servers, overlap="off") as optimizer:
        (backward_loss(model) * math.inf).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        assert optimizer.left_out == 1
    assert same(model, before)
