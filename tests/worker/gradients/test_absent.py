"""A parameter without a gradient is left alone, as in torch, also beside parameters of its bucket that have one."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

import torch_ps
from tests.support.jobs import Servers, job
from tests.support.threads import at_once
from tests.support.training import Experts, backward, same, seeded

STEPS = 10
OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "SGD": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.01),
    "AdamW": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, weight_decay=0.1),
    "Adam fused": lambda m: torch.optim.Adam(m.parameters(), lr=0.01, weight_decay=0.1, fused=True),
}


def by_torch(name: str, num_workers: int) -> list[nn.Module]:
    """The model after each step of one process, with the mean gradient; who does not use a parameter counts as 0."""
    model, found = seeded(Experts), []
    optimizer = OPTIMIZERS[name](model)
    for step in range(STEPS):
        copies = [copy.deepcopy(model) for _ in range(num_workers)]
        for rank, each in enumerate(copies):
            each.zero_grad()
            backward(each, step, rank)
        for parameter, *grads in zip(model.parameters(), *(each.parameters() for each in copies), strict=True):
            terms = [torch.zeros_like(g) if g.grad is None else g.grad for g in grads]
            total = terms[0] if len(terms) == 1 else terms[0] + terms[1]
            parameter.grad = None if all(g.grad is None for g in grads) else total / num_workers
        optimizer.step()
        found.append(copy.deepcopy(model))
    return found


def train(
    servers: Servers, name: str, model: nn.Module, rank: int, expected: list[nn.Module], **options: object
) -> None:
    with torch_ps.ParameterServerOptimizer(
        OPTIMIZERS[name](model),
        model,
        str(servers),
        name=f"w{rank}",
        **options,  # type: ignore[arg-type]
    ) as optimizer:
        for step in range(STEPS):
            backward(model, step, rank)
            optimizer.step()
            optimizer.wait()
            assert same(model, expected[step]), step
            optimizer.zero_grad()


@pytest.mark.parametrize("overlap", ["auto", "off"])
@pytest.mark.parametrize("plane", ["memory", "network"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_expert_that_a_batch_does_not_use_is_left_alone(name: str, plane: str, overlap: str) -> None:
    with job() as servers:
        train(servers, name, seeded(Experts), 0, by_torch(name, 1), plane=plane, overlap=overlap)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_expert_that_one_of_two_workers_uses_gets_half_its_gradient_and_one_that_none_uses_none(name: str) -> None:
    expected = by_torch(name, 2)
    models = [seeded(Experts) for _ in range(2)]  # before any thread runs: all draw from one generator
    with job(workers=2, shards=2, bucket_size=0.001) as servers:
        at_once(*(lambda r=r, m=model: train(servers, name, m, r, expected) for r, model in enumerate(models)))


@pytest.mark.parametrize("compress", ["topk:0.2", "sign"])
def test_parameter_without_a_gradient_is_left_alone_where_feedback_keeps_a_residual_of_it(compress: str) -> None:
    model = seeded(Experts)
    with (
        job() as servers,
        torch_ps.ParameterServerOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1), model, str(servers), compress=compress
        ) as optimizer,
    ):
        for step in range(STEPS):
            before = copy.deepcopy(model)
            backward(model, step)
            optimizer.step()
            optimizer.wait()
            for parameter, old in zip(model.parameters(), before.parameters(), strict=True):
                assert parameter.grad is not None or torch.equal(parameter, old)
            optimizer.zero_grad()
