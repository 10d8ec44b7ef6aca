"""``--batch-size auto``: what the search chooses, that it runs for ready-made tasks, that it leaves no trace."""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.support.gpu import GPU
from torch_ps.common.errors import ConfigError
from torch_ps.common.options.worker_config import WorkerConfig
from torch_ps.worker.tasks import Task
from torch_ps.worker.training import batch_size
from torch_ps.worker.training import loop as train

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("limit", "least", "most", "chosen"),
    [(100, 1, 1024, 64), (64, 1, 1024, 64), (1, 1, 1024, 1), (0, 1, 1024, 0), (1000, 1, 32, 32), (1, 2, 64, 0)],
)
def test_the_largest_power_of_two_that_fits_is_found(limit: int, least: int, most: int, chosen: int) -> None:
    asked: list[int] = []

    def fits(size: int) -> bool:
        asked.append(size)
        return size <= limit

    assert batch_size.find_largest(fits, least, most) == chosen
    assert len(asked) == len(set(asked)), "a trial may take seconds and is made once"


@pytest.mark.parametrize(
    ("overhead", "each", "most", "chosen"),
    [(1.0, 1.0, 1024, 32), (0.0, 1.0, 1024, 1), (1000.0, 0.001, 64, 64)],
)
def test_the_smallest_that_is_about_as_fast_per_sample_is_found(
    overhead: float, each: float, most: int, chosen: int
) -> None:
    size, tried = batch_size.find_fastest(lambda size: 1e-6 * (overhead + each * size), 1, most)
    assert size == chosen
    assert size in tried


def test_no_larger_size_is_tried_after_two_that_are_slower_or_one_that_is_long() -> None:
    _, tried = batch_size.find_fastest(lambda size: 1e-3 * (8 + (size - 8) ** 2), 1, 1 << 16)
    assert list(tried) == [1, 2, 4, 8, 16, 32]
    _, tried = batch_size.find_fastest(lambda size: 0.3 * size**0.5, 1, 1 << 16)
    assert list(tried) == [1, 2, 4, 8, 16]


def test_a_job_keeps_its_fewest_pushes() -> None:
    assert [batch_size.largest_allowed(samples) for samples in (1, 64, 20_000, 10**9)] == [1, 1, 256, 1 << 16]


class Watched(Task):
    """Has everything that a trial could disturb: BatchNorm, dropout, global random numbers, a buffer made anew."""

    name = "watched"

    def model(self) -> nn.Sequential:
        model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 1))
        model.register_buffer("seen", torch.zeros(()))
        return model

    def batches(self, rank: int, world: int, batch_size: int, seed: int) -> Iterator[torch.Tensor]:
        while True:
            yield torch.randn(batch_size, 8) + random.random() + float(np.random.rand())

    def loss(self, model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        model.seen = model.get_buffer("seen") + 1  # a new tensor in the place of the old one
        loss: torch.Tensor = model(batch).pow(2).mean()
        return loss


def state_of(model: nn.Module) -> list[Any]:
    named = [*model.named_parameters(), *model.named_buffers()]
    return [
        [(name, id(tensor), tensor.detach().clone()) for name, tensor in named],
        [None if p.grad is None else (id(p.grad), p.grad.clone()) for p in model.parameters()],
        [module.training for module in model.modules()],
        (torch.get_rng_state(), random.getstate(), str(np.random.get_state())),
    ]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def test_the_search_leaves_no_trace() -> None:
    task = Watched()
    model = task.model()
    model[0].eval()
    weight = model.get_parameter("3.weight")
    weight.grad = torch.ones_like(weight)
    before = state_of(model)
    size, reason = batch_size.find_batch_size(task, model, CPU, WorkerConfig(samples=4096))
    assert 2 <= size <= 64, "BatchNorm cannot train on a single sample"
    assert reason.startswith("the fastest on the CPU with ")
    assert same(state_of(model), before)


def test_no_trace_is_left_where_the_loss_fails() -> None:
    class Broken(Watched):
        def loss(self, model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
            super().loss(model, batch)
            raise RuntimeError("a bug of the user's")

    task = Broken()
    model = task.model()
    before = state_of(model)
    with pytest.raises(RuntimeError, match="a bug of the user's"):
        batch_size.find_batch_size(task, model, CPU, WorkerConfig(samples=4096))
    assert same(state_of(model), before)


@pytest.mark.parametrize("task", ["digits", "digits:cnn", "gpt"])
def test_it_runs_for_the_ready_made_tasks_on_the_cpu(task: str, caplog: pytest.LogCaptureFixture) -> None:
    config = WorkerConfig(task=task, device="cpu", batch_size="auto", samples=2048)
    with caplog.at_level("INFO"):
        setting = train.prepare(config)
    assert setting.batch_size in (1, 2, 4, 8, 16, 32)
    assert caplog.messages == [f"batch size auto: {setting.batch_size}, {setting.batch_size_reason}"]
    plain = train.prepare(WorkerConfig(task=task, device="cpu", samples=2048))
    assert plain.batch_size_reason == ""
    for found, expected in zip(setting.model.state_dict().values(), plain.model.state_dict().values(), strict=True):
        assert torch.equal(found, expected)
    assert all(parameter.grad is None for parameter in setting.model.parameters())


def test_a_task_without_batches_is_refused() -> None:
    class Empty(Watched):
        def batches(self, rank: int, world: int, batch_size: int, seed: int) -> Iterator[torch.Tensor]:
            return iter(())

    task = Empty()
    with pytest.raises(ConfigError, match="task 'watched' gives no batch of 1 samples; give a number"):
        batch_size.find_batch_size(task, task.model(), CPU, WorkerConfig(samples=4096))


@GPU
@pytest.mark.whole_gpu
def test_a_gpu_is_filled_up_to_its_headroom_and_emptied_again() -> None:
    class Wide(Task):
        """A sample takes 64 MiB: a few hundred of them fill any GPU."""

        name = "wide"

        def model(self) -> nn.Module:
            return nn.Linear(1, 1 << 24, bias=False)

        def batches(self, rank: int, world: int, batch_size: int, seed: int) -> Iterator[torch.Tensor]:
            while True:
                yield torch.ones(batch_size, 1)

        def loss(self, model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
            return (model(batch) ** 2).mean()  # type: ignore[no-any-return]

    device = torch.device("cuda", 0)
    task = Wide()
    model = task.model().to(device)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(device)
    free = torch.cuda.mem_get_info(device)[0]
    state = torch.cuda.get_rng_state(device)
    size, reason = batch_size.find_batch_size(task, model, device, WorkerConfig(samples=1 << 22))
    assert size * (1 << 26) <= (1 - batch_size.HEADROOM) * free < 2 * size * 8 * (1 << 26)
    assert size & (size - 1) == 0
    assert reason.startswith("the largest power of two that leaves 20% of the free ")
    assert torch.cuda.memory_reserved(device) <= before + (1 << 26)
    assert torch.equal(torch.cuda.get_rng_state(device), state)
    assert model.weight.grad is None
