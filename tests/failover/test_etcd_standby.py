"""Servers whose right to serve is a key in a real etcd: nobody has to vote, and never do two serve."""

import pytest

from tests.failover.conftest import ETCD_LEASE, Workers
from tests.support.etcd import EtcdProcess, needs_etcd
from tests.support.jobs import SECONDS, until
from tests.support.replicated import Replicated, replicated

pytestmark = needs_etcd


@pytest.fixture
def decides() -> str:
    return "etcd"


def test_standby_takes_over_from_a_primary_that_is_killed(servers: Replicated, workers: Workers) -> None:
    servers.kill(0)
    workers.train()
    assert servers.role(servers.standbys[0]) == "alone"
    assert "the lease of its primary has run out" in servers.standbys[0].process.output


def test_job_waits_while_etcd_stands_still_for_longer_than_a_lease_and_then_goes_on(
    servers: Replicated, workers: Workers, etcd: EtcdProcess
) -> None:
    primary = servers.primaries[0]
    etcd.stop()
    until(lambda: "etcd does not answer" in primary.process.output, "the primary notices")
    etcd.go_on()
    workers.train()  # with the primary, or the standby if that was quicker


def test_second_primary_of_a_job_is_refused_and_says_who_serves(servers: Replicated, etcd: EtcdProcess) -> None:
    primary = servers.primaries[0]
    until(lambda: "term 1 of" in primary.process.output, "the primary has the seat")  # else the rival may be first
    rival = servers.server(workers=2, lease=ETCD_LEASE, etcd=etcd.url)
    assert rival.process.wait(SECONDS) == 1, rival.process.output
    assert "--standby-of" in rival.process.output
    assert primary.address in rival.process.output


def test_standby_has_to_be_told_of_the_same_etcd(etcd: EtcdProcess) -> None:
    with replicated(0, workers=1) as servers:
        primary = servers.server(workers=1, etcd=etcd.url)
        with pytest.raises(AssertionError, match="give both the same --etcd"):
            servers.server(standby_of=primary.address)
