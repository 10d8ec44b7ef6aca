"""Workers that live on while all servers die and come back from a checkpoint."""

import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import torch_ps
from tests.support.jobs import until
from tests.support.processes import Child
from tests.support.push_counts import disturbed
from tests.support.restart import Shards, shards
from tests.support.threads import at_once
from tests.support.training import backward, mlp, same, seeded

STEPS = 40


def fault(servers: Shards, at: list[threading.Event], go: threading.Event) -> None:
    """When all workers wait: SIGKILL of all servers, and from their checkpoint again."""
    assert all(event.wait(60) for event in at)
    until(lambda: servers.status().checkpoint.version > 0, "a checkpoint is good")
    servers.kill()
    servers.start(resume=True)
    go.set()


def finish(
    servers: Shards, model: torch.nn.Module, rank: int, at: threading.Event, go: threading.Event, **options: Any
) -> None:
    """Train to the end, whatever the servers do; in version 10 say so and wait."""
    inner = torch.optim.AdamW(model.parameters(), lr=0.01)
    with torch_ps.ParameterServerOptimizer(inner, model, str(servers), name=f"w{rank}", **options) as optimizer:
        while optimizer.version < STEPS:
            backward(model, optimizer.version, rank)
            optimizer.step()
            optimizer.zero_grad()
            if optimizer.version == 10 and not at.is_set():
                at.set()
                assert go.wait(60)


@pytest.mark.parametrize(
    ("num_shards", "plane", "every"), [(1, "memory", 3), (2, "memory", 4), (2, "network", 4), (2, "memory", 2)]
)
def test_workers_go_on_and_finish_when_all_servers_were_killed_and_resumed(
    num_shards: int, plane: str, every: int, tmp_path: Path
) -> None:
    settings = {"workers": 2, "bucket_size": 0.002, "checkpoint": str(tmp_path), "checkpoint_every": every}
    with shards(num_shards, workers=2, bucket_size=0.002) as servers:
        ready = threading.Event()
        ready.set()
        undisturbed = [seeded(mlp) for _ in range(2)]
        at_once(*(lambda r=r, m=m: finish(servers, m, r, ready, ready) for r, m in enumerate(undisturbed)))
    with shards(num_shards, **settings) as servers:
        at, go = [threading.Event(), threading.Event()], threading.Event()

        models = [seeded(mlp) for _ in range(2)]
        at_once(
            *(lambda r=r, m=m: finish(servers, m, r, at[r], go, plane=plane) for r, m in enumerate(models)),
            lambda: fault(servers, at, go),
        )
        status = servers.status()
        assert status.version == STEPS
        assert not status.worker
    assert all(same(model, undisturbed[0]) for model in models)


@pytest.mark.parametrize(("mode", "num_shards"), [("async", 2), ("ssp", 1)])
def test_every_push_after_the_restart_counts_once_in_each_bucket(mode: str, num_shards: int, tmp_path: Path) -> None:
    """At a version of an asynchronous job one bucket may have a push that another one has not.

    After the restart that step is pushed again: the bucket that lacks it takes it, the other one knows it.
    """
    settings = {"mode": mode, "workers": 2, "checkpoint": str(tmp_path), "checkpoint_every": 4}
    with shards(num_shards, **settings) as servers:

        def fault(go: threading.Event) -> None:
            servers.kill()
            servers.start(resume=True)
            go.set()

        disturbed(servers, fault)


@pytest.mark.parametrize("plane", ["memory", "network"])
def test_worker_that_the_checkpoint_does_not_know_joins_again_by_itself(
    plane: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"workers": 2, "bucket_size": 0.002, "checkpoint": str(tmp_path), "checkpoint_every": 8}
    with shards(2, **settings) as servers:
        late, go = threading.Event(), threading.Event()
        at = [threading.Event() for _ in range(3)]
        models = [seeded(mlp) for _ in range(3)]

        def worker(rank: int) -> None:
            inner = torch.optim.AdamW(models[rank].parameters(), lr=0.01)
            with torch_ps.ParameterServerOptimizer(
                inner, models[rank], str(servers), name=f"w{rank}", plane=plane
            ) as optimizer:
                while optimizer.version < STEPS:
                    backward(models[rank], optimizer.version, rank)
                    optimizer.step()
                    optimizer.zero_grad()
                    if optimizer.version == 9 and rank < 2 and not late.is_set():
                        until(lambda: servers.status().checkpoint.version == 8, "the checkpoint of version 8 is good")
                        until(lambda: len(servers.status().worker) == 3, "w2 has joined")
                        late.set()
                    if optimizer.version == 12 and not at[rank].is_set():
                        at[rank].set()
                        assert go.wait(60)

        def newcomer() -> None:
            until(lambda: servers.status().checkpoint.version == 8, "the checkpoint of version 8 is good")
            worker(2)

        def restart() -> None:
            assert all(event.wait(60) for event in at)
            servers.kill()
            servers.start(resume=True)
            assert [member.worker for member in servers.status().worker] == ["w0", "w1"]
            go.set()

        at_once(lambda: worker(0), lambda: worker(1), newcomer, restart)
        assert servers.status().version == STEPS
    said = [record.getMessage() for record in caplog.records if "takes part again" in record.getMessage()]
    assert sorted(line.split()[1] for line in said) == ["w0", "w1", "w2"], said
    for line in said:  # w2 may also hear of it from a shard that is to read its memory
        assert "was started anew" in line or ("worker w2" in line and line.endswith("join again")), said
    assert same(models[0], models[1])


def test_worker_that_is_stopped_while_its_servers_come_back_goes_on_though_a_lease_has_passed(tmp_path: Path) -> None:
    lease = 2.0
    with shards(workers=1, lease=lease, checkpoint=str(tmp_path / "kept"), checkpoint_every=5) as servers:
        arguments = (str(servers), "w0", 400, 1, 2, "network", str(tmp_path / "acks"))
        worker = Child("tests.chaos.worker:train", arguments, tmp_path / "log")
        try:
            until(lambda: servers.status().checkpoint.version > 0, "a checkpoint is good")
            servers.kill()
            until(lambda: worker.wait(0.01) is None and "lost the connection" in worker.output, "the worker knows it")
            worker.send(signal.SIGSTOP)
            servers.start(resume=True)
            assert not threading.Event().wait(lease + 0.5)
            worker.send(signal.SIGCONT)
            assert worker.wait(60) == 0, worker.output
        finally:
            worker.kill()
