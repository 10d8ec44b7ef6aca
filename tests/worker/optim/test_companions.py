"""One data set for the optimizers of several models: equal weights, the same closing steps, nobody waits for ever."""

import contextlib
import copy
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import torch_ps
from tests.support.jobs import SECONDS, Servers, job, until
from tests.support.threads import at_once
from torch_ps.worker.leased_data import order_of

#: Samples, which two workers with batches of 4 cannot share evenly: in the last round one of them has one sample.
SIZE, BATCH, EPOCHS = 17, 4, 2
DATA = torch.randn(SIZE, 3, generator=torch.Generator().manual_seed(0))

MODELS = nn.Linear(3, 1), nn.Linear(3, 3)

Make = Callable[[torch.optim.Optimizer, nn.Module, int], Any]


class Gan:
    """Generator and critic of one worker, which step in turn."""

    def __init__(self, wrap: Make) -> None:
        self.models = copy.deepcopy(MODELS)
        sgd = [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for model in self.models]
        self.critic, self.generator = (wrap(sgd[place], self.models[place], place) for place in (0, 1))

    def train(self, batch: torch.Tensor, number: int, every: int) -> None:
        critic, generator = self.models
        fake = generator(batch.flip(1))
        self.critic.zero_grad()
        (critic(fake.detach()) - critic(batch)).square().mean().backward()
        self.critic.step()
        if number % every == 0:
            self.generator.zero_grad()
            critic(fake).square().mean().backward()
            self.generator.step()


def alone(every: int) -> Gan:
    """One process with the batches of both workers together."""
    gan = Gan(lambda optimizer, model, place: optimizer)
    for epoch in range(EPOCHS):
        for number, batch in enumerate(torch.split(DATA[order_of(SIZE, shuffle=True, seed=epoch)], 2 * BATCH)):
            gan.train(batch, number, every)
    return gan


@pytest.mark.parametrize(("every", "named", "plane"), [(1, False, "auto"), (2, True, "network")])
def test_two_models_train_as_in_one_process_though_the_samples_do_not_come_out_even(
    every: int, named: bool, plane: str
) -> None:
    expected = alone(every)
    weights: list[list[tuple[float, float]]] = [[], []]

    def work(rank: int, servers: list[Servers]) -> Gan:
        def wrap(optimizer: torch.optim.Optimizer, model: nn.Module, place: int) -> torch_ps.ParameterServerOptimizer:
            return torch_ps.ParameterServerOptimizer(
                optimizer, model, str(servers[place]), rank=rank, plane=plane, timeout=20
            )

        gan = Gan(wrap)
        with gan.critic, gan.generator:
            loader = torch_ps.shard(TensorDataset(DATA), gan.critic, *[gan.generator] * named, batch_size=BATCH)
            for _ in range(EPOCHS):
                for number, (batch,) in enumerate(loader):
                    weights[rank].append((gan.critic.weight, gan.generator.weight))
                    gan.train(batch, number, every)
            assert gan.critic.weight == gan.generator.weight == 1
            assert gan.generator.samples == sum(EPOCHS * size for size in (8, 8, 1)[::every])
            return gan

    with job(workers=2) as critic, job(workers=2) as generator:
        gans = at_once(*(lambda rank=rank: work(rank, [critic, generator]) for rank in range(2)))
    assert sum(map(len, weights)) == 5 * EPOCHS
    assert all(one == other for one, other in weights[0] + weights[1])
    for gan in gans:
        for mine, theirs, first in zip(gan.models, expected.models, gans[0].models, strict=True):
            for one, other, same in zip(mine.parameters(), theirs.parameters(), first.parameters(), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
                assert torch.equal(one, same)


def test_a_worker_that_joins_both_jobs_in_the_middle_takes_part_and_all_come_to_an_end() -> None:
    begun = threading.Event()
    data = TensorDataset(DATA.repeat(6, 1))

    def work(rank: int, servers: list[Servers]) -> int:
        if rank == 2:
            begun.wait(SECONDS)

        def wrap(optimizer: torch.optim.Optimizer, model: nn.Module, place: int) -> torch_ps.ParameterServerOptimizer:
            if (rank, place) == (2, 1):
                wait_for_w2 = [[2], [2]]
                late = time.monotonic() + 3  # or they wait for samples, which no status says
                until(
                    lambda: (
                        [list(w.waiting_for) for w in servers[0].status().worker][:2] == wait_for_w2
                        or time.monotonic() > late
                    ),
                    "they wait",
                )
            return torch_ps.ParameterServerOptimizer(optimizer, model, str(servers[place]), rank=rank, timeout=20)

        gan = Gan(wrap)
        batches = 0
        with gan.critic, gan.generator:
            for _ in range(EPOCHS):
                for (batch,) in torch_ps.shard(data, gan.critic, gan.generator, batch_size=BATCH):
                    gan.train(batch, 0, 1)
                    batches += 1
                    if batches == 2:
                        begun.set()
        return batches

    with job(workers=2) as critic, job(workers=2) as generator:
        batches = at_once(*(lambda rank=rank: work(rank, [critic, generator]) for rank in range(3)))
        assert critic.status().samples == generator.status().samples == EPOCHS * len(data)
    assert all(batches)


def test_a_wait_for_samples_that_is_too_long_says_whom_for_and_names_the_option() -> None:
    with job(workers=2) as critic, job(workers=2) as generator, contextlib.ExitStack() as stack:

        def wrap(optimizer: torch.optim.Optimizer, model: nn.Module, place: int) -> torch_ps.ParameterServerOptimizer:
            servers = str((critic, generator)[place])
            wrapped = torch_ps.ParameterServerOptimizer(optimizer, model, servers, rank=rank, timeout=1.5)
            return stack.enter_context(wrapped)

        gans = []
        for rank in range(2):  # noqa: B007  # ``wrap`` reads it
            gans.append(Gan(wrap))
        loader = torch_ps.shard(TensorDataset(DATA), gans[0].critic, gans[0].generator, batch_size=BATCH)
        says = r"'w0' has waited for samples for 1\.5 s: epoch 0 .* w1 has not asked for it; .* raise --timeout"
        with pytest.raises(torch_ps.WaitTimeout, match=says):
            next(iter(loader))


def test_one_optimizer_given_twice_is_refused() -> None:
    with job() as servers:
        model = nn.Linear(3, 1)
        optimizer = torch_ps.ParameterServerOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, str(servers))
        with optimizer, pytest.raises(torch_ps.ConfigError, match="got one optimizer twice"):
            torch_ps.shard(TensorDataset(DATA), optimizer, optimizer, batch_size=4)
