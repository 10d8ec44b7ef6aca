"""Bounded staleness, backup workers and rates that follow staleness, on real server processes.

Source: stability of x_{t+1} = x_t - a / (1 + tau) x_{t-tau} for every tau iff a <= pi / 2; Levin and May, 1976.
"""

import contextlib
from collections.abc import Iterator
from math import pi

import pytest
import torch

import torch_ps
from tests.support.jobs import Servers, job, until
from tests.support.quadratic import quadratics, round_robin
from tests.support.threads import at_once, spawn


@contextlib.contextmanager
def clients(
    servers: Servers, count: int, spec: torch_ps.OptimizerSpec, size: int = 1
) -> Iterator[list[torch_ps.Client]]:
    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(torch_ps.Client(str(servers), name=f"w{i}")) for i in range(count)]
        for client in found:
            client.init({"x": torch.ones(size)}, spec)
        for client in found:
            client.pull()
        yield found


def clocks(servers: Servers) -> dict[str, int]:
    return {worker.worker: worker.clock for worker in servers.status().worker}


@pytest.mark.parametrize("slack", [1, 3])
def test_worker_may_lead_by_the_slack_and_one_step_in_flight(slack: int) -> None:
    with (
        job(mode="ssp", slack=slack, workers=2) as servers,
        clients(servers, 2, torch_ps.OptimizerSpec("SGD", lr=2**-10)) as (fast, slow),
    ):
        one = {"x": torch.ones(1)}
        for _ in range(slack):
            fast.push(one)
        ahead = spawn(lambda: fast.push(one))
        until(lambda: any(w.waiting_for for w in servers.status().worker), "w0 waits")
        status = servers.status()
        assert status.mode_details == f"ssp, slack {slack}"
        (held,) = [w for w in status.worker if w.waiting_for]
        assert (held.worker, list(held.waiting_for)) == ("w0", [1])
        assert clocks(servers) == {"w0": slack + 1, "w1": 0}
        slow.push(one)
        # A read at clock slack + 1 holds every push of clock 0: the slow worker's own.
        assert ahead.result(60).params["x"].item() == 1 - (slack + 2) / 1024


def test_clocks_stay_together_and_reads_hold_what_they_must_while_all_run() -> None:
    """One-hot pushes of exact size: the parameters tell how many steps of whom a read has seen."""
    slack, workers, steps = 2, 4, 60
    with (
        job(mode="ssp", slack=slack, workers=workers, shards=2) as servers,
        clients(servers, workers, torch_ps.OptimizerSpec("SGD", lr=1.0), size=workers) as found,
    ):

        def run(rank: int) -> None:
            for clock in range(1, steps + 1):
                seen = 1 - found[rank].push({"x": torch.eye(workers)[rank]}).params["x"]
                assert seen[rank] == clock
                assert seen.min() >= clock - slack
                assert seen.max() - clock <= slack + 1

        at_once(*(lambda rank=rank: run(rank) for rank in range(workers)))
        assert found[0].pull().params["x"].tolist() == [1 - steps] * workers


def test_slack_zero_is_sync_bit_for_bit() -> None:
    found = []
    gradients = torch.randn(20, 3, 500, generator=torch.Generator().manual_seed(1))
    for settings in ({"mode": "sync"}, {"mode": "ssp", "slack": 0}):
        with (
            job(workers=3, **settings) as servers,
            clients(servers, 3, torch_ps.OptimizerSpec("AdamW", lr=0.01), size=500) as each,
        ):
            for step in range(20):
                results = at_once(
                    *(lambda r=r, c=c, s=step: c.push({"x": gradients[s, r]}) for r, c in enumerate(each))
                )
            found.append(results[0].params["x"])
    assert torch.equal(found[0], found[1])


def test_newcomer_holds_nobody_back() -> None:
    with (
        job(mode="ssp", slack=1, workers=1) as servers,
        clients(servers, 1, torch_ps.OptimizerSpec("SGD", lr=0.1)) as (first,),
    ):
        for _ in range(5):
            first.push({"x": torch.ones(1)})
        with torch_ps.Client(str(servers), name="w1") as second:
            second.init({"x": torch.ones(1)}, torch_ps.OptimizerSpec("SGD", lr=0.1))
            first.push({"x": torch.ones(1)})
            assert second.pull().params["x"].item() == pytest.approx(0.4)
            assert clocks(servers) == {"w0": 6, "w1": 6}
        assert first.push({"x": torch.ones(1)}).version == 7  # the other has left; nobody waits for it


def test_step_closes_without_its_backup_worker_whose_push_is_dropped_counted_and_answered() -> None:
    with (
        job(workers=3, backup_workers=1) as servers,
        clients(servers, 3, torch_ps.OptimizerSpec("SGD", lr=1.0), size=3) as (a, b, c),
    ):
        base = c.pull().version
        one_hot = torch.eye(3)
        for _ in range(2):
            results = at_once(lambda: a.push({"x": one_hot[0]}), lambda: b.push({"x": one_hot[1]}))
        assert [r.contributors for r in results] == [("w0", "w1")] * 2
        late = c.push({"x": one_hot[2]}, base=base)
        assert (late.applied, late.version, late.params["x"].tolist()) == (False, 2, [0, 0, 1])
        assert servers.status().late == 1
        in_time, _ = at_once(lambda: c.push({"x": one_hot[2]}), lambda: a.push({"x": one_hot[0]}))
        assert (in_time.applied, in_time.contributors) == (True, ("w0", "w2"))
        assert servers.status().mode_details == "sync, 1 backup worker"


def test_push_that_is_too_stale_is_answered_with_fresh_parameters_and_not_applied() -> None:
    with (
        job(mode="async", workers=2, max_staleness=2) as servers,
        clients(servers, 2, torch_ps.OptimizerSpec("SGD", lr=0.125)) as (fast, slow),
    ):
        one = {"x": torch.ones(1)}
        for _ in range(3):
            fast.push(one)
        refused = slow.push(one)
        assert (refused.applied, refused.staleness, refused.version) == (False, 3, 3)
        assert refused.params["x"].item() == 1 - 3 / 8
        assert servers.status().late == 1
        assert slow.push(one).params["x"].item() == 1 - 4 / 8


@pytest.mark.parametrize("num_workers", [2, 4, 8])
def test_rate_over_one_plus_staleness_is_stable_up_to_half_pi(num_workers: int) -> None:
    with (
        job(mode="async", workers=num_workers, staleness_lr="inverse") as servers,
        quadratics(servers, num_workers, (0.95 * pi / 2,)) as workers,
    ):
        x = round_robin(workers, 400)[:, 0].abs()
        assert x[-num_workers:].max() < 0.1 * x[: 4 * num_workers].max()


def test_rate_is_divided_by_one_plus_staleness_exactly() -> None:
    with (
        job(mode="async", workers=2, staleness_lr="inverse") as servers,
        quadratics(servers, 2, (0.25,)) as workers,
    ):
        # The first push is fresh, then the staleness is 1: half the rate.
        x = round_robin(workers, 3)[:, 0].tolist()
        assert x == [1, 0.75, 0.75 - 0.25 / 2, 0.75 - 0.25 / 2 - 0.25 * 0.75 / 2]


@pytest.mark.parametrize(("num_workers", "limit"), [(2, 0.1), (3, 0.0512), (4, 0.0348), (8, 0.0158)])
def test_heavy_ball_under_delay_has_its_own_stability_limit(num_workers: int, limit: float) -> None:
    with (
        job(mode="async", workers=num_workers) as servers,
        contextlib.ExitStack() as stack,
    ):
        rates = torch.tensor([0.9 * limit, 1.1 * limit])
        found = []
        for index in range(num_workers):
            client = stack.enter_context(torch_ps.Client(str(servers), name=f"w{index}"))
            client.init({"x": torch.ones(2)}, torch_ps.OptimizerSpec("SGD", lr=1.0, momentum=0.9))
            found.append(client)
        snapshots = [client.pull() for client in found]
        peaks = []
        for step in range(1200):
            at = step % num_workers
            result = found[at].push({"x": rates * snapshots[at].params["x"]}, base=snapshots[at].version)
            snapshots[at] = torch_ps.Snapshot(result.params, result.version)
            peaks.append(result.params["x"].abs())
        early, late = torch.stack(peaks[100:300]).amax(0), torch.stack(peaks[-200:]).amax(0)
        assert late[0] < early[0]
        assert late[1] > early[1]
