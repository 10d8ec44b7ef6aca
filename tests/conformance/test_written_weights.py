"""A loop that writes to its weights after its steps (clamps, scales) has the bits of plain torch on every way."""

import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import torch_ps
from tests.support.jobs import job, until
from tests.support.proxy import Proxy
from tests.support.replicated import replicated
from tests.support.threads import at_once
from tests.support.training import Make, backward, mlp, same, seeded

STEPS = 7


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def write(model: nn.Module, step: int) -> None:
    """What the loop does to its weights: in turn to all, to one, to none."""
    if step % 3 == 0:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.clamp_(-0.05, 0.05)
    elif step % 3 == 1:
        next(model.parameters()).data.mul_(1.1)


def plain(workers: int, make: Make = mlp) -> nn.Module:
    """The same in one process: each step with the mean of the workers' gradients."""
    model = seeded(make)
    optimizer = sgd(model)
    for step in range(STEPS):
        means: list[torch.Tensor] = []
        for rank in range(workers):
            optimizer.zero_grad()
            backward(model, step, rank)
            gradients = [each.grad.clone() for each in model.parameters() if each.grad is not None]
            means = [torch.add(*pair) for pair in zip(means, gradients, strict=True)] if means else gradients
        for parameter, mean in zip(model.parameters(), means, strict=True):
            parameter.grad = mean / workers
        optimizer.step()
        write(model, step)
    return model


def train(
    servers: str,
    model: nn.Module,
    rank: int,
    after: Callable[[int], None] = lambda step: None,
    before: Callable[[], None] = lambda: None,
    **options: Any,
) -> None:
    """Train; ``after`` is called after each step, ``before`` before each backward."""
    with torch_ps.ParameterServerOptimizer(sgd(model), model, servers, name=f"w{rank}", **options) as optimizer:
        for step in range(STEPS):
            optimizer.zero_grad()
            before()
            backward(model, step, rank)
            optimizer.step()
            write(model, step)
            after(step)


@pytest.mark.parametrize(
    ("workers", "shards", "settings", "options"),
    [
        (2, 1, {}, {"plane": "network"}),
        (2, 2, {}, {"overlap": "forward"}),
        (2, 2, {"clip_norm": 1e6}, {"overlap": "off"}),
        (1, 2, {"mode": "async", "delay_compensation": "constant"}, {"plane": "network", "overlap": "forward"}),
        (1, 1, {"mode": "ssp"}, {}),
    ],
)
def test_weights_that_a_loop_writes_count(
    workers: int, shards: int, settings: dict[str, Any], options: dict[str, Any]
) -> None:
    models = [seeded(mlp) for _ in range(workers)]
    with job(workers=workers, shards=shards, bucket_size=0.002, **settings) as servers:
        at_once(*(lambda r=r, m=m: train(str(servers), m, r, **options) for r, m in enumerate(models)))
        assert not servers.status().advice
    expected = plain(workers)
    assert all(same(model, expected) for model in models)


@pytest.mark.parametrize("plane", ["network", "auto"])
def test_weights_that_a_loop_writes_count_when_the_primary_dies_between_two_steps(plane: str) -> None:
    """The write after a step and the death of the server meet: the standby is told of it with the next push."""
    models, dead = [seeded(mlp) for _ in range(2)], threading.Event()
    with replicated(workers=2, bucket_size=0.002) as servers:

        def after(step: int) -> None:
            if step == 0:
                servers.wait()
            if step == 3:
                servers.kill(0)
                dead.set()

        def wait(step: int) -> None:
            if step == 3:
                assert dead.wait(60)

        hooks = (after, wait)
        at_once(*(lambda r=r, m=m: train(str(servers), m, r, hooks[r], plane=plane) for r, m in enumerate(models)))
        until(lambda: servers.role(servers.standbys[0]) == "alone", "the standby serves")
    expected = plain(2)
    assert all(same(model, expected) for model in models)


def wide() -> nn.Module:
    """Some buckets, so that cuts fall between those that are sent ahead and the pushes."""
    return nn.Sequential(nn.Linear(12, 200), nn.Tanh(), nn.Linear(200, 7))


@pytest.mark.parametrize("overlap", ["auto", "forward"])
def test_connection_that_is_cut_while_gradients_are_sent_ahead_changes_no_bit(overlap: str) -> None:
    chance, model = random.Random(3), seeded(wide)
    with job(bucket_size=0.002) as servers, Proxy(servers.addresses[0]) as proxy:
        train(
            proxy.address,
            model,
            0,
            before=lambda: proxy.sever_after(chance.randrange(1, 40_000)),
            plane="network",
            overlap=overlap,
        )
    assert proxy.num_severed >= STEPS // 2
    assert same(model, plain(1, wide))
