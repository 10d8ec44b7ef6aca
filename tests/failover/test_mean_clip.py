"""Clipping by the norm of the mean goes on where a connection breaks or a primary is killed while workers ask."""

import random
import threading
from typing import Any

import pytest
from torch import nn

import torch_ps
from tests.checkpoint.test_resume import sgd
from tests.support.jobs import SECONDS, job, until
from tests.support.proxy import Proxy
from tests.support.replicated import replicated
from tests.support.threads import at_once
from tests.support.training import backward, mlp, same, seeded

STEPS, FAULT = 8, 4


def train(servers: str, model: nn.Module, rank: int, fault: Any = None, **options: Any) -> list[float]:
    """The norms of all steps; ``fault`` is called with the number of each before it is asked for."""
    norms = []
    with torch_ps.ParameterServerOptimizer(sgd(model), model, servers, rank=rank, **options) as optimizer:
        for step in range(STEPS):
            optimizer.zero_grad()
            backward(model, step, rank)
            if fault is not None:
                fault(step)
            norms.append(float(optimizer.clip_grad_norm_(0.2)))
            optimizer.step()
    return norms


def undisturbed() -> tuple[nn.Module, list[float]]:
    models = [seeded(mlp), seeded(mlp)]
    with job(workers=2, shards=2, bucket_size=0.002) as servers:
        norms = at_once(*(lambda r=r: train(str(servers), models[r], r) for r in (0, 1)))
    assert same(*models)
    return models[0], norms[0]


def test_kill_of_a_primary_while_a_worker_waits_for_a_norm_changes_no_bit() -> None:
    whole, expected = undisturbed()
    models = [seeded(mlp), seeded(mlp)]
    reached, over = threading.Event(), threading.Event()

    def hold(step: int) -> None:
        if step == FAULT:
            reached.set()
            assert over.wait(SECONDS)

    with replicated(2, workers=2, bucket_size=0.002) as servers:

        def kill() -> list[float]:
            assert reached.wait(SECONDS)
            until(lambda: servers.paired(), "every shard has its standby")
            waits = "the norm of step 4 waits for w1"
            until(lambda: any(w.reason == waits for w in servers.status(servers.primaries[1]).worker), waits)
            servers.kill(1)
            over.set()
            return []

        first, second, _ = at_once(
            lambda: train(str(servers), models[0], 0),
            lambda: train(str(servers), models[1], 1, hold),
            kill,
        )
    assert first == second == expected
    assert all(same(model, whole) for model in models)


@pytest.mark.parametrize("plane", ["network", "memory"])
def test_connections_that_break_change_no_bit(plane: str) -> None:
    whole, expected = undisturbed()
    models, chance = [seeded(mlp), seeded(mlp)], random.Random(3)
    with (
        job(workers=2, shards=2, bucket_size=0.002) as servers,
        Proxy(servers.addresses[1]) as proxy,
    ):
        cut = f"{servers.addresses[0]},{proxy.address}"
        first, second = at_once(
            lambda: train(
                cut,
                models[0],
                0,
                lambda step: proxy.sever_after(chance.randrange(60)) if step % 2 else None,
                plane=plane,
            ),
            lambda: train(str(servers), models[1], 1, plane=plane),
        )
        assert proxy.num_severed >= 3
    assert first == second == expected
    assert all(same(model, whole) for model in models)
