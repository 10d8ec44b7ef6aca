"""Models of every shape: tied, frozen and unused parameters, other dtypes and memory formats, buffers."""

import pytest
import torch
from torch import nn

import torch_ps
from tests.support.jobs import job
from tests.support.threads import at_once
from tests.support.training import Make, backward, batch, conv, mlp, same, seeded


class Tied(nn.Module):
    """Two layers that share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 7)
        self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.out(torch.tanh(self.b(torch.tanh(self.a(x)))))
        return y


class Unused(nn.Module):
    """A parameter that gets no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(12, 7), nn.Linear(12, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.used(x)
        return y


class Masked(nn.Module):
    """A mask of infinities, as attention has it, beside the statistics of BatchNorm."""

    mask: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(12, 7), nn.BatchNorm1d(7)
        self.register_buffer("mask", torch.full((7, 7), -torch.inf).triu(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.norm(self.layer(x)) @ self.mask.softmax(1)
        return y


def frozen() -> nn.Module:
    model = mlp()
    next(iter(model.parameters())).requires_grad_(False)
    return model


def channels_last() -> nn.Module:
    return conv().to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for step in range(10):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1, momentum=0.9)


@pytest.mark.parametrize("overlap", ["auto", "on"])
@pytest.mark.parametrize("make", [Tied, Unused, Masked, frozen, channels_last])
def test_model_ends_with_the_bits_of_local_training(make: Make, overlap: str) -> None:
    local, remote = seeded(make), seeded(make)
    train(local, sgd(local))
    with (
        job(bucket_size=0.001) as servers,
        torch_ps.ParameterServerOptimizer(sgd(remote), remote, str(servers), overlap=overlap) as optimizer,
    ):
        train(remote, optimizer)
    assert same(remote, local)
    for a, b in zip(remote.parameters(), local.parameters(), strict=True):
        assert a.stride() == b.stride()


def test_defaults_of_the_script_for_dtype_and_device_change_nothing() -> None:
    local, remote = seeded(mlp), seeded(mlp)
    train(local, sgd(local))
    batches = [batch(step) for step in range(10)]
    torch.set_default_dtype(torch.float64)
    try:
        with (
            torch.device("meta"),
            job() as servers,
            torch_ps.ParameterServerOptimizer(sgd(remote), remote, str(servers)) as optimizer,
        ):
            for inputs, labels in batches:
                torch.autograd.backward(nn.functional.cross_entropy(remote(inputs), labels))
                optimizer.step()
                optimizer.zero_grad()
    finally:
        torch.set_default_dtype(torch.float32)
    assert same(local, remote)


def test_bf16_model_trains_on_an_fp32_master_copy() -> None:
    # Steps far below the precision of bfloat16 add up on the server and show in the model at last.
    model = nn.Linear(4, 4, bias=False, dtype=torch.bfloat16)
    nn.init.ones_(model.weight)
    with (
        job() as servers,
        torch_ps.ParameterServerOptimizer(
            torch.optim.SGD(model.parameters(), lr=1e-3), model, str(servers)
        ) as optimizer,
    ):
        for _ in range(100):
            model.weight.grad = torch.ones_like(model.weight)
            optimizer.step()
    assert model.weight.dtype == torch.bfloat16
    assert model.weight.float().mean().item() == pytest.approx(0.9, abs=2.0**-8)


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_workers_begin_and_end_with_the_same_parameters_and_buffers(mode: str) -> None:
    with job(mode=mode, workers=2) as servers:
        models = [seeded(conv, seed) for seed in (1, 2)]

        def run(index: int) -> None:
            model = models[index]
            with torch_ps.ParameterServerOptimizer(
                torch.optim.AdamW(model.parameters(), lr=0.01), model, str(servers), name=f"w{index}"
            ) as optimizer:
                assert optimizer.world == 2
                assert optimizer.rank == index
                for step in range(15):
                    optimizer.weight = 16.0
                    backward(model, step, worker=index)
                    optimizer.step()
                    optimizer.zero_grad()
                if mode == "sync":
                    assert optimizer.version == 15
                    assert optimizer.samples == 15 * 2 * 16

        at_once(lambda: run(0), lambda: run(1))
        with torch_ps.Client(str(servers)) as observer:
            last = observer.pull()
    if mode == "sync":
        assert same(*models)
        assert all(torch.equal(last.params[name], value) for name, value in models[0].state_dict().items())
    assert last.version == (15 if mode == "sync" else 30)


def test_buffers_are_the_mean_over_the_workers() -> None:
    class Holder(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))
            self.register_buffer("mean", torch.tensor([value]))
            self.register_buffer("count", torch.tensor(int(value)))
            self.register_buffer("scratch", torch.tensor(value), persistent=False)

    with job(workers=2) as servers:
        holders = [Holder(0.0), Holder(0.0)]

        def run(index: int) -> None:
            model = holders[index]
            with torch_ps.ParameterServerOptimizer(
                torch.optim.SGD(model.parameters(), lr=1.0), model, str(servers), name=f"w{index}"
            ) as optimizer:
                for buffer in model.buffers():
                    buffer.fill_(10 + 10 * index)
                model.weight.grad = torch.zeros(1)
                optimizer.step()

        at_once(lambda: run(0), lambda: run(1))
    for index, model in enumerate(holders):
        state = {name: buffer.item() for name, buffer in model.named_buffers()}
        assert state == {"mean": 15.0, "count": 15, "scratch": 10 + 10 * index}
