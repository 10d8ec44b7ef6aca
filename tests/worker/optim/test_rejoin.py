"""A worker that was dropped takes part again by itself, with fresh parameters; what it had not pushed is lost."""

import logging
from itertools import chain
from typing import Any

import pytest
import torch

import torch_ps
from tests.support.jobs import SECONDS, Servers, job, until
from tests.support.sample_counts import Trainer
from tests.support.threads import at_once, spawn
from tests.support.training import backward, mlp, same, seeded
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.wire import address
from torch_ps.worker.transport.link import Link

OPTIONS: list[dict[str, Any]] = [
    {},
    {"overlap": "on"},
    {"plane": "network"},
    {"compress": "topk:0.1"},
    {"compress_pull": "int8"},
    {"accumulate": 3},
    {"local_steps": 3},
]


def drop(servers: Servers, worker: torch_ps.ParameterServerOptimizer) -> None:
    """Take a worker out of the roster, as the end of its lease does."""
    who = worker.session.identity
    link = Link(address.parse(servers.addresses[0]))
    link.leave(pb.LeaveRequest(worker=who.worker, session=who.session, secret=who.secret), 20)
    link.close()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shards", [1, 2])
def test_dropped_worker_goes_on_with_the_parameters_of_the_job(
    options: dict[str, Any], shards: int, caplog: pytest.LogCaptureFixture
) -> None:
    passes = options.get("accumulate", 1) * options.get("local_steps", 1)
    with job(workers=2, shards=shards) as servers:
        models = [seeded(mlp), seeded(mlp)]
        optimizers = [
            torch_ps.ParameterServerOptimizer(
                torch.optim.SGD(model.parameters(), lr=0.1), model, str(servers), name=f"w{i}", timeout=30, **options
            )
            for i, model in enumerate(models)
        ]

        def push(index: int, first: int) -> None:
            for step in range(first, first + passes):
                backward(models[index], step, index)
                optimizers[index].step()
                optimizers[index].zero_grad()

        try:
            at_once(lambda: push(0, 0), lambda: push(1, 0))
            drop(servers, optimizers[1])
            push(0, 10)
            version = optimizers[0].version
            with caplog.at_level(logging.WARNING, "torch_ps.worker"):
                again = spawn(lambda: push(1, 10))  # finds out at its push, and waits for its first step
                until(lambda: len(servers.status().worker) == 2, "w1 has joined again")
                push(0, 20)
                again.result(SECONDS)
            assert sum(r.getMessage().startswith("worker w1 takes part again") for r in caplog.records) == 1
            assert optimizers[1].version == optimizers[0].version == version + 1
            at_once(lambda: push(0, 30), lambda: push(1, 30))
            assert optimizers[1].version == version + 2
            if "compress_pull" not in options:
                assert same(*models)
        finally:
            for optimizer in optimizers:
                optimizer.close()


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("options", [{}, {"accumulate": 2}, {"local_steps": 2, "outer_lr": 1.0, "outer_momentum": 0.0}])
def test_samples_of_a_dropped_worker_are_trained_on_once(mode: str, options: dict[str, Any]) -> None:
    size = 90
    with job(mode=mode, workers=2) as servers:
        workers = [Trainer(str(servers), f"w{i}", size, **options) for i in range(2)]

        def read(trainer: Trainer) -> list[list[int]]:
            batches = []
            for number, indices in enumerate(trainer.epochs(batch_size=3)):
                batches.append(indices)
                if number == 4 and trainer is workers[1]:
                    drop(servers, trainer.optimizer)
            return batches

        try:
            batches = at_once(*(lambda w=w: read(w) for w in workers))
            with torch_ps.Client(str(servers)) as observer:
                assert observer.pull().params["x"].all()
            assert max(w.optimizer.samples for w in workers) == size
        finally:
            for worker in workers:
                worker.close()
    assert set(chain(*chain(*batches))) == set(range(size))
