"""Workers come, go, die and are waited for; the others go on with exact results."""

import signal
from pathlib import Path

import pytest
import torch

import torch_ps
from tests.support.jobs import SECONDS, job, until
from tests.support.pair import SIZE, SPEC, model, pair
from tests.support.processes import Child
from tests.support.raw import described, raw
from tests.support.threads import at_once, spawn
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.worker.transport.wait_reasons import waited_for

ONES = {"x": torch.ones(SIZE)}


def test_killed_worker_is_dropped_after_its_lease_and_the_other_goes_on(tmp_path: Path) -> None:
    with job(workers=2, lease=1.0) as servers, torch_ps.Client(str(servers), name="w0") as survivor:
        survivor.init(model(), SPEC)
        victim = Child("tests.support.workers:push_for_ever", (str(servers), "w1", SIZE), tmp_path / "w1")
        try:
            for _ in range(5):
                assert survivor.push(ONES).contributors == ("w0", "w1")
            assert victim.end(signal.SIGKILL) == -signal.SIGKILL
            before = survivor.push(ONES)  # waits for the lease, or takes what the dead one had pushed
            after = survivor.push(ONES)
        finally:
            victim.kill()
        assert after.contributors == ("w0",)
        assert after.params["x"].tolist() == [-after.version] * SIZE == [-before.version - 1] * SIZE
        assert "worker w1 is dropped: no sign of life from w1" in servers.log


def test_worker_that_leaves_does_not_block_the_other() -> None:
    with pair() as workers:
        first, second = workers.workers
        waiting = spawn(lambda: first.push(ONES))
        until(lambda: any(w.waiting_seconds > 0 for w in workers.servers.status().worker), "w0 waits")
        second.close()
        assert waiting.result(SECONDS).contributors == ("w0",)
        assert first.push(ONES).params["x"].tolist() == [-3] * SIZE


@pytest.mark.parametrize("shards", [1, 2])
def test_worker_that_joins_late_takes_part_at_the_next_step(shards: int) -> None:
    with pair(shards=shards) as workers, torch_ps.Client(str(workers.servers), name="w2") as third:
        third.init(model(), SPEC)
        snapshot = spawn(third.pull)
        workers.train(1)
        start = snapshot.result(SECONDS)
        assert start.version == workers.steps
        assert start.params["x"].tolist() == [-workers.steps] * SIZE
        workers.workers.append(third)
        workers.train(3)


def test_worker_that_comes_back_under_its_name_takes_part_again() -> None:
    with pair() as workers:
        workers.workers[1].close()
        workers.workers = workers.workers[:1]
        workers.train(2)
        with torch_ps.Client(str(workers.servers), name="w1") as again:
            again.init(model(), SPEC)
            snapshot = spawn(again.pull)
            workers.train(1)
            assert snapshot.result(SECONDS).params["x"].tolist() == [-workers.steps] * SIZE
            workers.workers.append(again)
            workers.train(2)


def test_wait_that_takes_too_long_names_who_is_waited_for() -> None:
    with pair(timeout=0.5) as workers:
        with pytest.raises(
            torch_ps.WaitTimeout, match=r"'w0' has waited 0.5 s for step 1: step 1 waits for w1.*-timeout"
        ):
            workers.workers[0].push(ONES)
        reply = workers.servers.status()
        status = {w.worker: w for w in reply.worker}
        assert waited_for(status["w0"], reply) == ("w1",)
        assert status["w1"].waiting_seconds == 0


def test_first_step_that_lacks_workers_says_so() -> None:
    with job(workers=2) as servers, torch_ps.Client(str(servers), name="w0", timeout=0.5) as client:
        client.init(model(), SPEC)
        with pytest.raises(torch_ps.WaitTimeout, match=r"1 of 2 workers have not joined.*--timeout"):
            client.workers  # noqa: B018 - the property waits
        with pytest.raises(torch_ps.WaitTimeout, match="waits for the first quorum"):
            client.push(ONES)


def test_ranks_follow_the_request_and_then_the_order_of_names() -> None:
    with job(mode="async", workers=3) as servers:
        clients = [
            torch_ps.Client(str(servers), name=name, rank=rank)
            for name, rank in (("w10", None), ("w9", None), ("z", 0))
        ]
        try:
            at_once(*(lambda c=c: c.init(model(), SPEC) for c in clients))
            assert clients[0].workers == ("z", "w9", "w10")
            assert [client.rank for client in clients] == [2, 1, 0]
        finally:
            for client in clients:
                client.close()


def test_observer_pulls_without_being_waited_for() -> None:
    with pair() as workers, torch_ps.Client(str(workers.servers)) as observer:
        assert observer.pull().params["x"].tolist() == [-1] * SIZE
        workers.train(2)
        assert observer.pull().version == workers.steps


def test_observer_of_an_empty_job_is_told_so() -> None:
    with (
        job() as servers,
        torch_ps.Client(str(servers)) as observer,
        pytest.raises(torch_ps.NotInitialised, match="no parameters yet; a worker has to call init"),
    ):
        observer.pull()


def test_all_workers_may_leave_and_the_parameters_stay() -> None:
    with pair() as workers:
        for client in workers.workers:
            client.close()
        with torch_ps.Client(str(workers.servers), name="late") as late:
            late.init({"x": torch.full((SIZE,), 5.0)}, SPEC)
            start = late.pull()
            assert start.params["x"].tolist() == [-1] * SIZE
            assert late.push(ONES, base=start.version).params["x"].tolist() == [-2] * SIZE


@pytest.mark.parametrize("shards", [1, 2])
def test_worker_that_dies_before_it_has_sent_the_parameters_is_replaced(shards: int) -> None:
    with job(shards=shards, lease=1.0) as servers, raw(servers.addresses[0]) as peer:
        assert peer.join(pb.JoinRequest(worker="first", model=described(model()))).seed
        with torch_ps.Client(str(servers), name="second") as second:
            second.init(model(), SPEC)
            assert not second.pull().params["x"].any()
            assert second.push(ONES).params["x"].tolist() == [-1] * SIZE


def test_worker_that_waits_for_the_first_parameters_is_told_who_owes_them() -> None:
    with job() as servers, raw(servers.addresses[0]) as peer:
        peer.join(pb.JoinRequest(worker="first", model=described(model())))
        with (
            torch_ps.Client(str(servers), name="second", timeout=0.5) as second,
            pytest.raises(torch_ps.WaitTimeout, match="worker 'first' has not sent the first parameters"),
        ):
            second.init(model(), SPEC)
