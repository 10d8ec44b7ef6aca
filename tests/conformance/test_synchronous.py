"""Synchronous SGD to the bit: any order of arrival, any number of shards, one process.

The reference is what a reader would write in plain torch: sum in rank order, divide by the number of workers, step.

Source: design of the modes; "sequential" consistency, Li et al., OSDI 2014.
"""

import contextlib
import itertools
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest
import torch

import torch_ps
from tests.support.jobs import Servers, job, until
from tests.support.threads import at_once, spawn

SHAPES = {"weight": (37, 29), "bias": (29,), "scale": (), "table": (400, 5)}
SIZE = 64


@contextlib.contextmanager
def clients(
    servers: Servers,
    *names: str,
    model: dict[str, torch.Tensor],
    spec: torch_ps.OptimizerSpec,
    compress: str = "none",
) -> Iterator[list[torch_ps.Client]]:
    """Workers of one model, all of which have joined."""
    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(torch_ps.Client(str(servers), name=name, compress=compress)) for name in names]
        for client in found:
            client.init(model, spec)
        yield found


class Arrivals:
    """Five workers: four whose gradients are averaged, and one that brings x back to 0 after each mean."""

    def __init__(self, servers: Servers, workers: list[torch_ps.Client], resetter: torch_ps.Client) -> None:
        self.servers, self.workers, self.resetter = servers, workers, resetter

    def mean(self, gradients: list[torch.Tensor], order: tuple[int, ...], weights: tuple[float, ...]) -> torch.Tensor:
        """The mean as the server computes it when the gradients arrive in this order; shape (SIZE,)."""
        pushes = []
        for place, index in enumerate(order):
            pushes.append(self.push(self.workers[index], gradients[index], weights[index]))
            until(lambda place=place: self.num_waiting() == place + 1, "the push has arrived")  # type: ignore[misc]
        last = self.push(self.resetter, torch.zeros(SIZE), 0.0).result(60)
        for push in pushes:
            push.result(60)
        x = last.params["x"]
        back = [self.push(worker, torch.zeros(SIZE), 0.0) for worker in self.workers]
        assert not self.push(self.resetter, x, 1.0).result(60).params["x"].any()
        for push in back:
            push.result(60)
        return -x

    def push(self, client: torch_ps.Client, gradient: torch.Tensor, weight: float) -> "Future[torch_ps.PushResult]":
        return spawn(lambda: client.push({"x": gradient}, weight=weight))

    def num_waiting(self) -> int:
        return sum(worker.waiting_seconds > 0 for worker in self.servers.status().worker)


@contextlib.contextmanager
def arrivals(compress: str = "none") -> Iterator[Arrivals]:
    model, spec = {"x": torch.zeros(SIZE)}, torch_ps.OptimizerSpec("SGD", lr=1.0)
    with (
        job(workers=5) as servers,
        clients(servers, "a", "b", "c", "d", model=model, spec=spec, compress=compress) as workers,
        clients(servers, "e", model=model, spec=spec) as (resetter,),
    ):
        yield Arrivals(servers, workers, resetter)


def random_gradients() -> list[torch.Tensor]:
    """Four gradients whose sum depends on the order of its terms in most elements."""
    return [torch.randn(SIZE) * 10.0 ** torch.randint(-3, 4, (SIZE,)) for _ in range(4)]


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().numpy().tobytes()


@pytest.mark.parametrize("compress", ["none", "fp16"])
def test_all_arrival_orders_give_one_bit_pattern(compress: str) -> None:
    gradients = random_gradients()
    with arrivals(compress) as workers:
        seen = {bits(workers.mean(gradients, order, (1.0,) * 4)) for order in itertools.permutations(range(4))}
    assert len(seen) == 1
    sums = {bits((gradients[i] + gradients[j]) + gradients[k]) for i, j, k in itertools.permutations(range(3))}
    assert len(sums) > 1  # so the order of arrival would have shown


def test_mean_is_the_sum_in_rank_order_divided_once() -> None:
    a, b, c, d = gradients = random_gradients()
    with arrivals() as workers:
        # The fifth worker has weight 0, so the other four are the mean.
        assert bits(workers.mean(gradients, (2, 0, 3, 1), (1.0,) * 4)) == bits((a + b + c + d) / 4)


def test_mean_is_weighted_by_the_number_of_samples() -> None:
    gradients = [torch.full((SIZE,), value) for value in (0.0, 1.0, 7.0, 9.0)]
    with arrivals() as workers:
        assert (workers.mean(gradients, (0, 1, 2, 3), (10.0, 30.0, 0.0, 0.0)) == 0.75).all()


# ------------------------------------------------------------------ whole trainings


def gradients_of(worker: int, step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * worker + step)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def start() -> dict[str, torch.Tensor]:
    return gradients_of(99, 0)


def by_hand(name: str, hyper: dict[str, Any], num_workers: int, steps: int) -> dict[str, torch.Tensor]:
    """The same training in plain torch, in one process."""
    model = {key: value.clone().requires_grad_() for key, value in start().items()}
    optimizer = getattr(torch.optim, name)(model.values(), **hyper)
    for step in range(steps):
        terms = [gradients_of(worker, step) for worker in range(num_workers)]
        for key, parameter in model.items():
            total = terms[0][key]
            for term in terms[1:]:
                total = total + term[key]
            parameter.grad = total / num_workers
        optimizer.step()
    return {key: parameter.detach() for key, parameter in model.items()}


def served(name: str, hyper: dict[str, Any], num_workers: int, steps: int, shards: int) -> dict[str, torch.Tensor]:
    """The training over real servers, the workers at once; all workers have to end with the same bits."""
    names = [f"w{index}" for index in range(num_workers)]
    with (
        job(workers=num_workers, shards=shards, bucket_size=0.004, threads=2) as servers,
        clients(servers, *names, model=start(), spec=torch_ps.OptimizerSpec(name, **hyper)) as workers,
    ):

        def train(index: int) -> dict[str, torch.Tensor]:
            for step in range(steps):
                result = workers[index].push(gradients_of(index, step))
            return result.params

        ends = at_once(*(lambda index=index: train(index) for index in range(num_workers)))
    for end in ends[1:]:
        assert all(bits(end[key]) == bits(ends[0][key]) for key in SHAPES)
    return ends[0]


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "SGD": ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    "SGD fused": ("SGD", {"lr": 0.1, "momentum": 0.9, "fused": True}),
    "Adam": ("Adam", {"lr": 0.01, "weight_decay": 0.01}),
    "Adam fused": ("Adam", {"lr": 0.01, "fused": True}),
    "AdamW": ("AdamW", {"lr": 0.01, "betas": (0.8, 0.95)}),
    "AdamW fused": ("AdamW", {"lr": 0.01, "fused": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_workers_end_with_the_bits_of_one_process_in_plain_torch(case: str) -> None:
    name, hyper = CASES[case]
    found, expected = served(name, hyper, 3, 12, shards=1), by_hand(name, hyper, 3, 12)
    assert {key: bits(value) for key, value in found.items()} == {key: bits(value) for key, value in expected.items()}


@pytest.mark.parametrize("shards", [2, 3])
@pytest.mark.parametrize("case", ["SGD", "AdamW fused"])
def test_number_of_shards_does_not_change_a_bit(case: str, shards: int) -> None:
    name, hyper = CASES[case]
    found, expected = served(name, hyper, 3, 12, shards=shards), by_hand(name, hyper, 3, 12)
    assert {key: bits(value) for key, value in found.items()} == {key: bits(value) for key, value in expected.items()}


def test_small_batches_of_many_workers_equal_one_large_batch() -> None:
    num_workers, batch, steps = 4, 16, 10
    inputs, targets = torch.randn(steps, num_workers * batch, 20), torch.randn(steps, num_workers * batch, 3)

    def gradient(weight: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        weight = weight.clone().requires_grad_()
        ((x @ weight - y) ** 2).mean().backward()  # type: ignore[no-untyped-call]
        assert weight.grad is not None
        return weight.grad

    alone = torch.zeros(20, 3)
    for x, y in zip(inputs, targets, strict=True):
        alone = alone - 0.1 * gradient(alone, x, y)
    names = [f"w{index}" for index in range(num_workers)]
    spec = torch_ps.OptimizerSpec("SGD", lr=0.1)
    with (
        job(workers=num_workers) as servers,
        clients(servers, *names, model={"weight": torch.zeros(20, 3)}, spec=spec) as workers,
    ):

        def train(index: int) -> torch.Tensor:
            weight, mine = torch.zeros(20, 3), slice(index * batch, (index + 1) * batch)
            for x, y in zip(inputs, targets, strict=True):
                weight = workers[index].push({"weight": gradient(weight, x[mine], y[mine])}).params["weight"]
            return weight

        together = at_once(*(lambda index=index: train(index) for index in range(num_workers)))[0]
    assert (together - alone).norm() / alone.norm() < 2e-7
