"""A parameter without a gradient is left alone, beside others of its bucket, with the bits of torch.optim.

The reference is torch on whole tensors, where ``.grad`` is None. Which tensors have a gradient is drawn for each step
and worker: always, never until late, in most steps, or in few.
"""

import random

import pytest
import torch

from tests.support.sliced import (
    CASES,
    NAMES,
    Gradients,
    Hyper,
    Sliced,
    Tensors,
    gradients_of,
    leaves,
    optimizer_of,
    schedule,
    start,
)

STEPS = 30
WORKERS = 2
LATE = 24
#: Without the case in which torch computes a tensor of no dimensions in float64, as its lr is one of float64 too.
ELEMENTWISE = [case for case in CASES if case != "AdamW lr of float64"]
#: Probability that a worker has a gradient for a tensor.
USED = {"weight": 1.0, "bias": 0.7, "scale": 0.2, "table": 0.4, "odd": 0.5, "kernel": 0.6}


def drawn(step: int) -> list[Gradients]:
    """Random gradients of each worker for one step; some parameters have none."""
    found: list[Gradients] = []
    for rank in range(WORKERS):
        lots, values = random.Random(100 * step + rank), gradients_of(100 * step + rank)
        has = {name: lots.random() < USED[name] and (name != "odd" or step >= LATE) for name in NAMES}
        found.append({name: values[name] if has[name] else None for name in NAMES})
    return found


def mean_of(workers: list[Gradients], name: str) -> torch.Tensor | None:
    """As DDP averages it where not every worker uses a parameter."""
    tensors = [have[name] for have in workers]
    if all(tensor is None for tensor in tensors):
        return None
    first, second = (torch.zeros_like(start()[name]) if tensor is None else tensor for tensor in tensors)
    return (first + second) / WORKERS


def by_torch(name: str, hyper: Hyper) -> Tensors:
    """With an optimizer for each tensor, as torch's fused SGD fails where only some tensors make their first step."""
    parameters = leaves(start())
    optimizers = {key: optimizer_of(name, hyper, parameters) for key in NAMES}
    for step in range(STEPS):
        workers = drawn(step)
        for key, optimizer in optimizers.items():
            schedule(optimizer, step)
            optimizer.zero_grad()
            parameters[key].grad = mean_of(workers, key)
            optimizer.step()
    return {key: parameter.detach() for key, parameter in parameters.items()}


@pytest.mark.parametrize(
    ("case", "bucket_bytes"), [(case, (1024, 1 << 20)[number % 2]) for number, case in enumerate(ELEMENTWISE)]
)
def test_what_nobody_has_a_gradient_for_is_left_alone(case: str, bucket_bytes: int) -> None:
    """Also if its state goes through ``export`` and ``restore`` in the middle, as with a checkpoint or a standby."""
    found = Sliced(*CASES[case], bucket_bytes, 1)
    for step in range(STEPS):
        if step in (1, LATE // 2):
            found = restored(found, *CASES[case], bucket_bytes)
        found.step(step, drawn(step))
    assert found.differing(by_torch(*CASES[case])) == []


def restored(before: Sliced, name: str, hyper: Hyper, bucket_bytes: int) -> Sliced:
    after = Sliced(name, hyper, bucket_bytes, 1)
    for bucket in before.buckets:
        tensors = before.store.export(bucket.index)
        after.store.restore(bucket.index, tensors)
        again = after.store.export(bucket.index)
        assert tensors.keys() == again.keys()
        assert all(torch.equal(tensors[key], again[key]) for key in tensors)
    return after
