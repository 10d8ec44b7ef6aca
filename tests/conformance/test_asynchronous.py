"""Asynchronous SGD does what delayed gradient descent does in theory: stability limits, golden numbers, staleness.

Source: the stability limit 2 sin(pi / (2 (2 tau + 1))) of x_{t+1} = x_t - a x_{t-tau}; Levin and May, 1976.
"""

import random
from collections import Counter
from math import pi, sin

import pytest
import torch

from tests.support.jobs import job
from tests.support.quadratic import quadratics, round_robin
from tests.support.threads import at_once

#: Number of workers -> steps in which 0.9 of the limit has converged, and 1.1 of it has left every bound.
STEPS = {2: (131, 143), 4: (318, 353)}
GOLDEN = (1, 0.75, 0.5, 0.3125, 0.1875, 0.109375, 0.0625, 0.03515625)


@pytest.fixture(scope="module")
def trajectories() -> dict[int, torch.Tensor]:
    """Number of workers -> x for 0.9 and 1.1 of the limit, and for a = 1/4, after every push of a round robin."""
    found = {}
    for num_workers, steps in STEPS.items():
        limit = 2 * sin(pi / (2 * (2 * (num_workers - 1) + 1)))
        with (
            job(mode="async", workers=num_workers) as servers,
            quadratics(servers, num_workers, (0.9 * limit, 1.1 * limit, 0.25)) as workers,
        ):
            found[num_workers] = round_robin(workers, max(steps))
    return found


@pytest.mark.parametrize("num_workers", STEPS)
def test_nine_tenths_of_the_stability_limit_converge(num_workers: int, trajectories: dict[int, torch.Tensor]) -> None:
    assert trajectories[num_workers][STEPS[num_workers][0] :, 0].abs().max() < 1e-3


@pytest.mark.parametrize("num_workers", STEPS)
def test_eleven_tenths_of_the_stability_limit_diverge(num_workers: int, trajectories: dict[int, torch.Tensor]) -> None:
    assert trajectories[num_workers][: STEPS[num_workers][1] + 1, 1].abs().max() > 1e3


def test_two_workers_in_turn_give_the_golden_trajectory(trajectories: dict[int, torch.Tensor]) -> None:
    x = trajectories[2][:, 2].tolist()
    assert x[: len(GOLDEN)] == list(GOLDEN)
    exact = [(1 + t / 2) / 2**t for t in range(60)]
    assert x[: len(exact)] == pytest.approx(exact, rel=1e-5)


def test_synchronous_workers_step_as_one_does() -> None:
    with job(workers=2) as servers, quadratics(servers, 2, (0.25,)) as workers:
        for step in range(1, 16):  # fp32 holds the powers of 3/4 up to the 15th
            assert [x.item() for x in at_once(*(worker.push for worker in workers))] == [0.75**step] * 2


@pytest.fixture(scope="module")
def uneven() -> tuple[list[list[int]], dict[int, int]]:
    """Staleness per worker and push, and the server's histogram: four workers of very different speed."""
    order = random.Random(3).choices(range(4), weights=(1, 2, 5, 12), k=400)
    with job(mode="async", workers=4) as servers, quadratics(servers, 4, (1e-3,)) as workers:
        for index in [*order, 0, 1, 2, 3]:  # the last round leaves every worker with a push near the end
            workers[index].push()
        return [worker.staleness for worker in workers], dict(servers.status().staleness)


def test_mean_staleness_is_the_number_of_other_workers(uneven: tuple[list[list[int]], dict[int, int]]) -> None:
    per_worker, _ = uneven
    total = sum(map(len, per_worker))
    mean = sum(map(sum, per_worker)) / total
    assert mean == pytest.approx(3, abs=4 * 3 / total)


def test_staleness_of_a_worker_follows_from_its_share_of_pushes(uneven: tuple[list[list[int]], dict[int, int]]) -> None:
    per_worker, _ = uneven
    total = sum(map(len, per_worker))
    for values in per_worker:
        assert sum(values) / len(values) == pytest.approx(total / len(values) - 1, abs=4 / len(values))


def test_histogram_of_the_server_is_what_the_workers_were_told(uneven: tuple[list[list[int]], dict[int, int]]) -> None:
    per_worker, histogram = uneven
    assert histogram == Counter(staleness for values in per_worker for staleness in values)
