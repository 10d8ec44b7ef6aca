"""Connections that break: each is repaired, and every push counts exactly once (conformance family C8).

The proxy between one worker and one shard cuts after a seeded number of bytes, so cuts fall into headers, payloads and
answers alike.
"""

import contextlib
import json
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import torch_ps
from tests.support.jobs import SECONDS, Servers, job, until
from tests.support.processes import Child
from tests.support.proxy import Proxy
from tests.support.raw import raw
from tests.support.threads import at_once, spawn
from torch_ps.common import schema
from torch_ps.common.wire import address
from torch_ps.worker.session import heartbeat
from torch_ps.worker.transport.link import Link

LR = 2.0**-10
SIZE = 600
PUSHES = 60


@pytest.mark.parametrize(("plane", "most"), [("network", 3 * SIZE), ("memory", 150)])
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_cut_connections_neither_lose_nor_double_a_push(mode: str, plane: str, most: int) -> None:
    """``most`` bytes go through before a cut: a few frames, whatever they carry."""
    chance = random.Random(5)
    with (
        job(mode=mode, workers=2, shards=2) as servers,
        Proxy(servers.addresses[1]) as proxy,
        torch_ps.Client(f"{servers.addresses[0]},{proxy.address}", name="w0", plane=plane) as cut,
        torch_ps.Client(str(servers), name="w1", plane=plane) as whole,
    ):
        for client in (cut, whole):
            client.init({"x": torch.zeros(SIZE)}, torch_ps.OptimizerSpec("SGD", lr=LR))

        def push(client: torch_ps.Client, index: int, severed: bool) -> None:
            gradient = torch.zeros(SIZE)
            gradient[index::2] = 1
            for step in range(PUSHES):
                if severed and step % 6 == 5:
                    proxy.sever_after(chance.randrange(most))
                assert client.push({"x": gradient}).applied

        at_once(lambda: push(cut, 0, True), lambda: push(whole, 1, False))
        x = whole.pull().params["x"] / -LR * (2 if mode == "sync" else 1)
    assert x.tolist() == [PUSHES] * SIZE
    assert proxy.num_severed >= 5


def connected(servers: Servers) -> bool:
    return servers.status().worker[0].connected


def test_connection_that_breaks_while_nobody_waits_is_open_again_before_it_is_needed() -> None:
    with (
        job() as servers,
        Proxy(servers.addresses[0]) as proxy,
        torch_ps.Client(proxy.address, name="w0") as client,
    ):
        client.init({"x": torch.zeros(1)}, torch_ps.OptimizerSpec("SGD", lr=LR))
        for push in range(3):
            proxy.sever()
            until(lambda push=push: proxy.num_severed > push and connected(servers), "it is back")  # type: ignore[misc]
            assert client.push({"x": torch.ones(1)}).version == push + 1


def test_server_that_is_gone_is_reported_with_its_address() -> None:
    with job(lease=1.0) as servers, torch_ps.Client(str(servers), name="w0") as client:
        client.init({"x": torch.zeros(1)}, torch_ps.OptimizerSpec("SGD", lr=LR))
        client.push({"x": torch.ones(1)})
        servers.processes[0].end()
        with pytest.raises(torch_ps.PsError, match=rf"{servers.addresses[0]}|shard 0 was stopped") as caught:
            client.push({"x": torch.ones(1)})
        assert isinstance(caught.value, (torch_ps.Unreachable, torch_ps.ServerStopped))


def test_worker_that_waits_is_told_when_the_server_stops() -> None:
    with job(workers=2) as servers, torch_ps.Client(str(servers), name="w0") as client:
        client.init({"x": torch.zeros(1)}, torch_ps.OptimizerSpec("SGD", lr=LR))

        def wait() -> None:
            with pytest.raises(torch_ps.ServerStopped, match="shard 0 was stopped; start the job again"):
                client.push({"x": torch.ones(1)})

        def stop() -> None:
            until(lambda: servers.status().worker[0].waiting_seconds > 0, "the worker waits")
            assert servers.processes[0].end() == 0

        at_once(wait, stop)


def test_connection_is_made_though_the_first_answer_of_the_server_takes_a_while() -> None:
    with job() as servers, Proxy(str(servers)) as proxy:
        proxy.hold()
        link = Link(address.parse(proxy.address))
        try:
            asked = spawn(lambda: link.status(SECONDS))
            assert not threading.Event().wait(1.0)  # what a far or busy server may take
            proxy.release()
            assert asked.result(SECONDS).mode == "sync"
        finally:
            link.close()


def test_what_is_asked_at_every_reconnection_is_short_whatever_the_model() -> None:
    names = [f"layer.{index}.weight" for index in range(2000)]
    with (
        job() as servers,
        torch_ps.Client(str(servers), name="w0") as client,
        contextlib.closing(Link(address.parse(str(servers)))) as link,
    ):
        client.init({name: torch.zeros(1) for name in names}, torch_ps.OptimizerSpec("SGD", lr=LR))
        assert link.describe_once(SECONDS).ByteSize() < 1000
        assert [tensor.name for tensor in schema.from_proto(link.model(SECONDS)).tensors()] == names


def test_worker_to_whom_no_answer_comes_through_is_told_so_before_its_wait_is_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(heartbeat, "ALONE_SECONDS", 4.0)
    with (
        job(lease=3.0) as servers,
        Proxy(str(servers)) as proxy,
        torch_ps.Client(proxy.address, name="w0", plane="network", timeout=45.0) as client,
    ):
        client.init({"x": torch.ones(1)}, torch_ps.OptimizerSpec("SGD", lr=0.25))
        proxy.hold()
        with pytest.raises(torch_ps.Unreachable, match="no sign of life of"):  # and not WaitTimeout
            client.push({"x": torch.ones(1)})
        proxy.release()


def test_worker_whose_gradient_travels_for_longer_than_its_lease_keeps_its_place() -> None:
    size, lease = 60_000, 1.0
    with (
        job(workers=2, lease=lease) as servers,
        Proxy(str(servers)) as proxy,
        torch_ps.Client(proxy.address, name="w0", plane="network") as far,
        torch_ps.Client(str(servers), name="w1", plane="network") as near,
    ):
        for client in (far, near):
            client.init({"x": torch.zeros(size)}, torch_ps.OptimizerSpec("SGD", lr=1.0))
        proxy.slow(int(4 * size / (2 * lease)))
        for version in (1, 2):
            results = at_once(*(lambda c=client: c.push({"x": torch.ones(size)}) for client in (far, near)))
            for result in results:
                assert (result.version, result.contributors) == (version, ("w0", "w1"))
        assert "is dropped" not in servers.log


def test_call_that_never_says_anything_is_ended(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    arguments = ["--listen", "127.0.0.1:0", "--ready-file", str(ready)]
    server = Child("tests.support.workers:serve_impatiently", (arguments, 0.2), tmp_path / "log")
    while not ready.exists():
        assert server.wait(0.01) is None, server.output
    closed = threading.Event()

    def silence() -> Iterator[bytes]:
        closed.wait(60)
        yield from ()

    with raw(json.loads(ready.read_text())["servers"][0]) as peer:
        silent = {"Exchange": "Hello", "Replicate": "ReplicaHello", "Seed": "Seed", "Commit": "Commit"}
        errors = {message: peer.error(method, silence()) for method, message in silent.items()}
    closed.set()
    for message, error in errors.items():
        assert isinstance(error, torch_ps.WaitTimeout)
        assert f"no {message} came within 0.2 s" in str(error)
    assert server.end() == 0
    assert "Traceback" not in server.output
