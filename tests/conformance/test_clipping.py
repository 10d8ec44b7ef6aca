"""--clip-norm clips the averaged gradient as ``clip_grad_norm_`` does on one process, also when workers or servers die.

The model fills many small buckets on every shard, so a norm over one bucket or one shard alone would show.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import torch_ps
from tests.support.jobs import Servers, job, until
from tests.support.threads import at_once, spawn

SHAPES = {"weight": (37, 29), "bias": (29,), "scale": (), "table": (400, 5)}
CLIP, STEPS = 20.0, 8
SMALL_BUCKETS = 0.004
CASES: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01},
    "AdamW": {"lr": 0.01, "fused": True},
}


def gradients_of(worker: int, step: int) -> dict[str, torch.Tensor]:
    """Some steps are within the clip norm, most are not."""
    generator = torch.Generator().manual_seed(1000 * worker + step)
    size = 0.3 if step % 3 == 2 else 3.0
    return {key: size * torch.randn(shape, generator=generator) for key, shape in SHAPES.items()}


def start() -> dict[str, torch.Tensor]:
    return gradients_of(99, 0)


def by_hand(name: str, updates: list[list[dict[str, torch.Tensor]]]) -> dict[str, torch.Tensor]:
    """Plain torch in one process; each update is the mean of some gradients."""
    model = {key: value.clone().requires_grad_() for key, value in start().items()}
    optimizer = getattr(torch.optim, name)(model.values(), **CASES[name])
    for terms in updates:
        for key, parameter in model.items():
            parameter.grad = torch.stack([term[key] for term in terms]).mean(0)
        nn.utils.clip_grad_norm_(model.values(), CLIP)
        optimizer.step()
    return {key: parameter.detach() for key, parameter in model.items()}


@contextlib.contextmanager
def clients(servers: Servers, num_workers: int, name: str = "SGD") -> Iterator[list[torch_ps.Client]]:
    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(torch_ps.Client(str(servers), name=f"w{i}")) for i in range(num_workers)]
        for client in found:
            client.init(start(), torch_ps.OptimizerSpec(name, **CASES[name]))
        yield found


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for key, value in expected.items():
        assert (found[key] - value).norm() <= 1e-6 * value.norm(), key


def synchronous(name: str, shards: int) -> dict[str, torch.Tensor]:
    with (
        job(workers=2, shards=shards, bucket_size=SMALL_BUCKETS, threads=2, clip_norm=CLIP) as servers,
        clients(servers, 2, name) as workers,
    ):

        def train(index: int) -> dict[str, torch.Tensor]:
            for step in range(STEPS):
                result = workers[index].push(gradients_of(index, step))
            return result.params

        return at_once(lambda: train(0), lambda: train(1))[0]


@pytest.mark.parametrize("name", CASES)
def test_clipped_steps_are_those_of_one_process_and_their_bits_do_not_depend_on_shards(name: str) -> None:
    found = {shards: synchronous(name, shards) for shards in (1, 2, 3)}
    assert_close(found[1], by_hand(name, [[gradients_of(0, k), gradients_of(1, k)] for k in range(STEPS)]))
    for shards in (2, 3):
        assert all(torch.equal(found[shards][key], found[1][key]) for key in SHAPES)


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_asynchronous_pushes_are_clipped_one_by_one(shards: int) -> None:
    with (
        job(mode="async", workers=2, shards=shards, bucket_size=SMALL_BUCKETS, clip_norm=CLIP) as servers,
        clients(servers, 2) as workers,
    ):
        for step in range(STEPS):
            result = workers[step % 2].push(gradients_of(step % 2, step), base=step)
    assert_close(result.params, by_hand("SGD", [[gradients_of(k % 2, k)] for k in range(STEPS)]))


def test_asynchronous_pushes_that_cross_on_their_lanes_do_not_wait_for_each_other() -> None:
    with (
        job(mode="async", workers=4, shards=2, bucket_size=SMALL_BUCKETS, threads=2, clip_norm=CLIP) as servers,
        clients(servers, 4) as workers,
    ):

        def train(index: int) -> None:
            for step in range(25):
                workers[index].push(gradients_of(index, step))

        at_once(*(lambda index=index: train(index) for index in range(4)))
        assert workers[0].pull().version == 100


def push_part(client: torch_ps.Client, part: str) -> None:
    """What a worker leaves behind that dies while it pushes: huge gradients of one shard or bucket."""
    session = client._session
    buckets = session.plan.of_shard(session.plan.num_shards - 1)
    for bucket in buckets if part == "a shard" else buckets[:1]:
        session.push(bucket, torch.full((bucket.numel,), 1e6), step=0, base=0, weight=1.0)


@pytest.mark.parametrize("part", ["a bucket", "a shard"])
@pytest.mark.parametrize("end", ["leaves", "falls silent"])
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_worker_that_goes_half_way_holds_up_nobody(mode: str, end: str, part: str) -> None:
    with (
        job(mode=mode, workers=2, shards=2, bucket_size=SMALL_BUCKETS, clip_norm=CLIP, lease=1.0) as servers,
        clients(servers, 2) as (victim, survivor),
    ):
        push_part(victim, part)
        until(lambda: any(worker.bytes_pushed for worker in servers.status(1).worker), "it is there")
        waiting = spawn(lambda: survivor.push(gradients_of(1, 0), base=0))
        if end == "leaves":
            victim.close()
        else:
            victim._session._streams._stopping.set()
        waiting.result(30)
        result = survivor.push(gradients_of(1, 1))
        if mode == "async":  # a synchronous bucket that closed before the worker left has its gradient
            assert_close(result.params, by_hand("SGD", [[gradients_of(1, 0)], [gradients_of(1, 1)]]))


def test_gradient_that_is_not_finite_neither_counts_nor_makes_the_norm_infinite() -> None:
    bad = gradients_of(0, 0)
    bad = {key: torch.full_like(value, torch.nan) for key, value in bad.items()}
    with job(workers=2, shards=2, bucket_size=SMALL_BUCKETS, clip_norm=CLIP) as servers, clients(servers, 2) as workers:
        result, _ = at_once(lambda: workers[0].push(bad), lambda: workers[1].push(gradients_of(1, 0)))
        assert servers.status().nonfinite > 0
    assert_close(result.params, by_hand("SGD", [[gradients_of(1, 0)]]))


def test_buffers_are_not_clipped_and_do_not_count() -> None:
    params, buffers = {"x": torch.zeros(4)}, {"mean": torch.zeros(4)}
    with job(shards=2, clip_norm=1.0) as servers, torch_ps.Client(str(servers), name="w0") as client:
        client.init(params, torch_ps.OptimizerSpec("SGD", lr=1.0), buffers)
        result = client.push({"x": torch.full((4,), 2.0), "mean": torch.full((4,), 100.0)})
    torch.testing.assert_close(result.params["x"], torch.full((4,), -0.5))
    assert result.params["mean"].tolist() == [100.0] * 4
