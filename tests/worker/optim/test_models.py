"""Models of every shape: tied, frozen and unused parameters, other dtypes and memory formats, buffers."""

from typing import Any

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


class Holder(nn.Module):
    """One parameter, and buffers of every rule with values that fp32 does not hold."""

    running_mean: torch.Tensor
    count: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.register_buffer("running_mean", torch.zeros(1, dtype=torch.float64))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("scratch", torch.tensor(0), persistent=False)

    def set(self, value: int) -> None:
        self.running_mean = self.running_mean + value  # another tensor, as some layers make it
        for name in ("count", "scratch"):
            getattr(self, name).fill_(2**53 + value)

    def state(self) -> dict[str, float]:
        return {name: buffer.item() for name, buffer in self.named_buffers()}


@pytest.mark.parametrize("overlap", ["auto", "forward"])
@pytest.mark.parametrize("buffers", ["sync", "local"])
def test_running_statistics_become_the_mean_and_other_buffers_those_of_rank_0(buffers: str, overlap: str) -> None:
    with job(workers=2) as servers:
        holders = [Holder(), Holder()]

        def run(index: int) -> None:
            model = holders[index]
            with torch_ps.ParameterServerOptimizer(
                torch.optim.SGD(model.parameters(), lr=1.0),
                model,
                str(servers),
                name=f"w{index}",
                buffers=buffers,
                overlap=overlap,
            ) as optimizer:
                model.set(10 + 11 * index)
                model.weight.grad = torch.zeros(1)
                optimizer.step()

        at_once(lambda: run(0), lambda: run(1))
    for index, model in enumerate(holders):
        own = 10 + 11 * index
        mean, count = (15.5, 2**53 + 10) if buffers == "sync" else (own, 2**53 + own)
        assert model.state() == {"running_mean": mean, "count": count, "scratch": 2**53 + own}


def test_workers_that_disagree_about_buffers_are_told() -> None:
    with job(workers=2) as servers:
        model = Holder()
        with torch_ps.ParameterServerOptimizer(torch.optim.SGD(model.parameters()), model, str(servers), name="w0"):
            other = Holder()
            with pytest.raises(torch_ps.ModelMismatch, match=r"'running_mean'.*give all workers the same buffers="):
                torch_ps.ParameterServerOptimizer(
                    torch.optim.SGD(other.parameters()), other, str(servers), name="w1", buffers="local"
                )


class Stateful(nn.Module):
    """A layer with buffers of every kind that it changes, replaces and drops as it runs."""

    queue: torch.Tensor
    next: torch.Tensor
    seen: torch.Tensor
    phase: torch.Tensor
    wide: torch.Tensor
    position: torch.Tensor
    grows: torch.Tensor
    comes: torch.Tensor
    goes: torch.Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(12, 7), nn.BatchNorm1d(7, momentum=None)
        self.exact = nn.BatchNorm1d(7).double()
        self.register_buffer("queue", torch.nn.functional.normalize(torch.randn(16, 7), dim=1))
        self.register_buffer("next", torch.tensor(2**40))
        self.register_buffer("seen", torch.zeros(7, dtype=torch.bool))
        self.register_buffer("phase", torch.ones(1, dtype=torch.complex64))
        self.register_buffer("wide", torch.ones(3, dtype=torch.complex128))
        self.register_buffer("sparse", torch.eye(3).to_sparse())
        self.register_buffer("position", torch.ones(1).expand(5))
        self.register_buffer("grows", torch.zeros(0))
        self.register_buffer("comes", None)
        self.register_buffer("goes", torch.ones(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.norm(self.layer(x)) @ self.queue[:7].clone() * self.position[0]
        with torch.no_grad():
            at = int(self.next) % 16
            self.queue[at] = torch.nn.functional.normalize(y[0], dim=0)
            self.next += 1
            self.seen[at % 7] = True
            self.phase = self.phase * torch.tensor(0.6 + 0.8j)
            self.wide.mul_(0.5)
            self.exact(y.detach().double() / 3)
            self.grows = torch.cat([self.grows, y[0, :1]])
            self.goes = None if at % 3 else y[0, :2].clone()
            self.comes = y[0].clone()
        return y


@pytest.mark.parametrize("overlap", ["auto", "forward"])
@pytest.mark.parametrize("plane", ["memory", "network"])
def test_every_buffer_of_one_worker_has_the_bits_of_local_training_after_every_step(plane: str, overlap: str) -> None:
    local: Any = seeded(Stateful)
    remote: Any = seeded(Stateful)
    alone = sgd(local)
    with (
        job(bucket_size=0.001) as servers,
        torch_ps.ParameterServerOptimizer(sgd(remote), remote, str(servers), overlap=overlap, plane=plane) as optimizer,
    ):
        for step in range(6):
            for model, each in ((local, alone), (remote, optimizer)):
                backward(model, step)
                each.step()
                each.zero_grad()
            versions = {name: buffer._version for name, buffer in local.named_buffers()}
            for name, buffer in remote.named_buffers():
                expected = local.get_buffer(name)
                assert torch.equal(buffer.to_dense(), expected.to_dense()), (step, name)
                assert buffer.stride() == expected.stride() if not buffer.is_sparse else True
                assert buffer._version == versions[name], (step, name)
    assert local.next.item() == 2**40 + 6


def test_buffers_that_some_workers_have_no_more_are_those_of_the_others() -> None:
    with job(workers=2) as servers:
        holders = [Holder(), Holder()]

        def run(index: int) -> None:
            model = holders[index]
            with torch_ps.ParameterServerOptimizer(
                torch.optim.SGD(model.parameters(), lr=1.0), model, str(servers), name=f"w{index}"
            ) as optimizer:
                model.set(10 + 11 * index)
                if index == 0:
                    model._buffers["count"] = None
                    model._buffers["running_mean"] = None
                model.weight.grad = torch.zeros(1)
                optimizer.step()

        at_once(lambda: run(0), lambda: run(1))
    assert list(holders[0].state()) == ["scratch"]
    assert holders[1].state() == {"running_mean": 21.0, "count": 2**53 + 21, "scratch": 2**53 + 21}
