"""Every push counts once: with a learning rate of 2**-10 and gradients of 1, the parameters are a counter.

x = x0 - T / 1024 is exact in fp32 up to T = 2**24. One element per worker tells whose push was lost or doubled.
"""

import contextlib
from collections.abc import Iterator

import pytest
import torch

import torch_ps
from tests.support.jobs import Servers, job
from tests.support.threads import at_once

LR = 2.0**-10


@contextlib.contextmanager
def counting(servers: Servers, num_workers: int) -> Iterator[list[torch_ps.Client]]:
    """Workers of a model with one element each, in two tensors so that two shards have a part."""
    with contextlib.ExitStack() as stack:
        clients = []
        for index in range(num_workers):
            client = stack.enter_context(torch_ps.Client(str(servers), name=f"w{index}"))
            client.init(counters(num_workers), torch_ps.OptimizerSpec("SGD", lr=LR))
            clients.append(client)
        yield clients


def counters(num_workers: int) -> dict[str, torch.Tensor]:
    return {"early": torch.zeros(num_workers), "padding": torch.zeros(256), "late": torch.zeros(num_workers)}


def one_hot(index: int, num_workers: int) -> dict[str, torch.Tensor]:
    gradient = counters(num_workers)
    gradient["early"][index] = gradient["late"][index] = 1.0
    return gradient


def pushes(client: torch_ps.Client, index: int, num_workers: int, times: int) -> torch_ps.PushResult:
    for _ in range(times):
        result = client.push(one_hot(index, num_workers))
        assert result.applied
    return result


@pytest.mark.parametrize("shards", [1, 2])
def test_asynchronous_pushes_of_all_workers_at_once_are_counted_exactly(shards: int) -> None:
    times = [120, 90, 60, 30]
    with job(mode="async", workers=4, shards=shards) as servers, counting(servers, 4) as clients:
        results = at_once(*(lambda i=i, c=c: pushes(c, i, 4, times[i]) for i, c in enumerate(clients)))
        params = clients[0].pull().params
    for name in ("early", "late"):
        assert (params[name] / -LR).tolist() == times
    assert not params["padding"].any()
    assert max(result.samples for result in results) == sum(times)


@pytest.mark.parametrize("shards", [1, 2])
def test_synchronous_pushes_of_all_workers_at_once_are_counted_exactly(shards: int) -> None:
    with job(workers=4, shards=shards) as servers, counting(servers, 4) as clients:
        results = at_once(*(lambda i=i, c=c: pushes(c, i, 4, 100) for i, c in enumerate(clients)))
    for result in results:
        assert result.version == 100
        assert result.contributors == ("w0", "w1", "w2", "w3")
        assert (result.params["early"] / -LR * 4).tolist() == [100] * 4
        assert (result.params["late"] / -LR * 4).tolist() == [100] * 4


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_adam_has_one_step_counter_for_all_workers(mode: str) -> None:
    # A counter per worker would get the bias correction wrong and end at -0.0805.
    def push(client: torch_ps.Client) -> torch.Tensor:
        for _ in range(100 if mode == "sync" else 25):
            result = client.push({"x": torch.full((1,), 0.3)})
        return result.params["x"]

    with job(mode=mode, workers=4) as servers, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(torch_ps.Client(str(servers), name=f"w{i}")) for i in range(4)]
        for client in clients:
            client.init({"x": torch.zeros(1)}, torch_ps.OptimizerSpec("Adam", lr=1e-3))
        at_once(*(lambda c=c: push(c) for c in clients))
        snapshot = clients[0].pull()
    assert snapshot.version == 100
    assert snapshot.params["x"].item() == pytest.approx(-0.1, abs=1e-5)
