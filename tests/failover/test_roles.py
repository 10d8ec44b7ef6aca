"""Who may acknowledge: never two servers, and one again soon after whatever has happened."""

import functools
import signal
import threading

import pytest
import torch

import torch_ps
from tests.failover.conftest import LEASE, Workers
from tests.support.etcd import needs_etcd
from tests.support.jobs import SECONDS, until
from tests.support.replicated import Replicated
from tests.support.threads import spawn

WITH_ETCD = pytest.param("etcd", marks=needs_etcd)


@pytest.mark.parametrize("decides", ["votes", WITH_ETCD], indirect=True)
def test_primary_that_was_stopped_for_longer_than_the_lease_is_deposed(servers: Replicated, workers: Workers) -> None:
    primary, standby = servers.primaries[0], servers.standbys[0]
    primary.process.send(signal.SIGSTOP)
    workers.train()
    assert servers.role(standby) == "alone"
    primary.process.send(signal.SIGCONT)
    assert primary.process.wait(SECONDS) == 1
    assert f"shard 0 is served by {standby.address} now" in primary.process.output
    workers.train()


@pytest.mark.parametrize("decides", ["votes", WITH_ETCD], indirect=True)
def test_primary_goes_on_alone_with_leave_and_takes_a_new_standby(servers: Replicated, workers: Workers) -> None:
    primary, standby = servers.primaries[0], servers.standbys[0]
    standby.process.send(signal.SIGKILL)
    workers.train()
    assert servers.role(primary) == "alone"
    assert "is lost" in primary.process.output
    second = servers.standby(primary.address)
    servers.wait()
    workers.train()
    servers.kill(0)
    workers.train()
    assert servers.role(second) == "alone"


def test_standby_that_is_silent_for_longer_than_the_lease_is_given_up_and_comes_back(
    servers: Replicated, workers: Workers
) -> None:
    primary, standby = servers.primaries[0], servers.standbys[0]
    standby.process.send(signal.SIGSTOP)
    workers.train()
    assert servers.role(primary) == "alone"
    standby.process.send(signal.SIGCONT)
    servers.wait()
    workers.train()
    servers.kill(0)
    workers.train()
    assert servers.role(standby) == "alone"


def test_the_one_that_was_deposed_becomes_the_standby_of_the_one_that_serves(
    servers: Replicated, workers: Workers
) -> None:
    standby = servers.standbys[0]
    servers.kill(0)
    workers.train()
    third = servers.standby(standby.address)
    until(lambda: servers.role(standby) == "paired", "it has a standby")
    workers.train()
    standby.process.send(signal.SIGKILL)
    workers.train()
    assert servers.role(third) == "alone"


def test_no_answer_leaves_while_the_standby_is_stopped(servers: Replicated, workers: Workers) -> None:
    servers.standbys[0].process.send(signal.SIGSTOP)
    pushed = threading.Event()

    def push(client: torch_ps.Client) -> torch_ps.PushResult:
        result = client.push({"x": torch.ones(8)})
        pushed.set()
        return result

    answers = [spawn(functools.partial(push, client)) for client in workers.clients]
    until(lambda: servers.status(servers.primaries[0]).standby.lag_seconds > LEASE / 8, "an answer waits")
    assert (
        servers.status(servers.primaries[0]).standby.lag_records == 1
    )  # the step that they wait for, and nothing more
    assert not pushed.is_set()
    servers.standbys[0].process.send(signal.SIGCONT)
    workers.steps += 1
    assert all(a.result(SECONDS).params["x"].tolist() == [-workers.steps] * 8 for a in answers)
    assert servers.role(servers.primaries[0]) == "paired"
