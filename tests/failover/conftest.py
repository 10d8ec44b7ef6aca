"""A synchronous job with a standby whose workers can be told to train; who decides who serves is the test's to say."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import torch_ps
from tests.support.etcd import EtcdProcess
from tests.support.jobs import SECONDS
from tests.support.replicated import Replicated, replicated
from tests.support.threads import at_once

SPEC = torch_ps.OptimizerSpec("SGD", lr=1.0)
#: With votes, and with etcd.
LEASE, ETCD_LEASE = 2.0, 4.0


class Workers:
    """Clients of a synchronous job that push ones: x falls by 1 a step."""

    def __init__(self, servers: Replicated, count: int = 2) -> None:
        self.clients = [torch_ps.Client(str(servers), name=f"w{n}", timeout=SECONDS) for n in range(count)]
        for client in self.clients:
            client.init({"x": torch.zeros(8)}, SPEC)
        self.steps = 0

    def train(self, steps: int = 3) -> None:
        """All push; every step is applied exactly once."""
        for _ in range(steps):
            results = at_once(*(lambda c=client: c.push({"x": torch.ones(8)}) for client in self.clients))
            self.steps += 1
            for result in results:
                assert result.params["x"].tolist() == [-self.steps] * 8

    def close(self) -> None:
        at_once(*(client.close for client in self.clients))


@pytest.fixture
def decides(request: pytest.FixtureRequest) -> str:
    """Who says who serves: "votes" or "etcd", by indirect parametrization."""
    return getattr(request, "param", "votes")


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[EtcdProcess]:
    with EtcdProcess(tmp_path) as process:
        yield process


@pytest.fixture
def servers(decides: str, request: pytest.FixtureRequest) -> Iterator[Replicated]:
    url = "" if decides == "votes" else request.getfixturevalue("etcd").url
    lease = ETCD_LEASE if url else LEASE
    with replicated(workers=2, lease=lease, etcd=url, of_standbys={"etcd": url}) as found:
        yield found


@pytest.fixture
def workers(servers: Replicated) -> Iterator[Workers]:
    found = Workers(servers)
    servers.wait()
    found.train()
    yield found
    found.close()
