"""Servers that are started alone while others live on: refused or ended, and no update is lost, doubled or halved."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message

import torch_ps
from tests.support.jobs import SECONDS, job
from tests.support.push_counts import Counted, disturbed
from tests.support.raw import Raw, raw
from tests.support.restart import shards
from tests.support.threads import at_once, spawn
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.rpc import channel
from torch_ps.common.rpc.status import error_of
from torch_ps.common.wire.frames import pack


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    return {"workers": 2, "checkpoint": str(folder), "checkpoint_every": 4, "lease": 5.0, **more}


@pytest.fixture(params=["sync", "async"])
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_shard_that_starts_alone_is_refused_and_all_together_go_on(mode: str, tmp_path: Path) -> None:
    with shards(2, **settings(tmp_path, mode=mode, lease=20.0)) as servers:

        def fault(go: threading.Event) -> None:
            servers.kill(1)
            go.set()
            version = servers.status().version
            said = servers.refused(1, resume=True)
            assert "Error: shard 1 cannot start alone: the job has begun with another process in its place" in said
            assert "start all servers together with --resume: workers that live on go on from the checkpoint" in said
            assert servers.status().version <= version + 2  # what was on its way when the shard was killed
            servers.kill(0)
            servers.start(resume=True)

        disturbed(servers, fault)


def test_servers_that_restart_together_do_so_when_one_has_died(tmp_path: Path) -> None:
    with shards(3, **settings(tmp_path, lease=20.0, resume=True, restart_together=True)) as servers:

        def fault(go: threading.Event) -> None:
            servers.kill(1)
            go.set()
            again = spawn(lambda: servers.start_alone(1))  # waits for a lead that goes on
            code, said = servers.ended(0)
            assert code == 1
            assert "shard 1 was started anew, so all servers have to start together again" in said
            servers.start_alone(0)
            assert servers.ended(2)[0] == 1
            servers.start_alone(2)
            again.result(SECONDS)

        disturbed(servers, fault)


def test_workers_of_a_shard_that_is_gone_are_told_which_after_their_lease(mode: str, tmp_path: Path) -> None:
    with shards(2, **settings(tmp_path, mode=mode, lease=1.0)) as servers:
        with Counted(servers, 0, 2) as one, Counted(servers, 1, 2) as two:
            for client in (one, two):
                client.begin()
            at_once(one.once, two.once)
            servers.kill(1)
            waiting = [spawn(client.once) for client in (one, two)]
            for each in waiting:
                error = each.exception(SECONDS)
                assert isinstance(error, torch_ps.PsError)
                assert servers.addresses[1] in str(error)
            assert "cannot start alone" in servers.refused(1, resume=True)
        servers.kill(0)
        servers.start(resume=True)


def test_lead_that_starts_alone_ends_the_shards_of_before_and_all_go_on_from_its_checkpoint(
    mode: str, tmp_path: Path
) -> None:
    with shards(3, **settings(tmp_path, mode=mode, lease=20.0)) as servers:

        def fault(go: threading.Event) -> None:
            servers.kill(0)
            go.set()
            servers.start_alone(0, resume=True)
            for shard in (1, 2):
                code, said = servers.ended(shard)
                assert code == 1
                assert "was started anew, without what this shard has trained; start all servers together" in said
                assert "Traceback" not in said
            for shard in (1, 2):
                servers.start_alone(shard, resume=True)

        disturbed(servers, fault)


@pytest.mark.parametrize("count", [1, 2])
def test_servers_that_hold_nothing_of_the_job_are_not_seeded_by_workers_of_before(mode: str, count: int) -> None:
    with shards(count, mode=mode, workers=1, lease=5.0) as servers:
        with Counted(servers) as client:
            client.begin()
            assert client.once() == [1.0] * 3
            servers.kill(0)
            servers.start_alone(0)
            for shard in range(1, count):
                assert servers.ended(shard)[0] == 1
                servers.start_alone(shard)
            for _ in range(2):
                with pytest.raises(torch_ps.ServerStopped, match=r"hold nothing of the job .* --resume, or begin anew"):
                    client.once()
            assert not servers.status().initialised
        with Counted(servers) as anew:
            anew.begin()
            assert anew.once() == [1.0] * 3


def test_worker_is_told_when_not_all_servers_come_back(tmp_path: Path) -> None:
    with shards(2, **settings(tmp_path, workers=1, lease=1.0)) as servers:
        with Counted(servers) as client:
            client.begin()
            while servers.status().checkpoint.version == 0:
                client.once()
            servers.kill(0)
            servers.start_alone(0, resume=True)
            assert servers.ended(1)[0] == 1
            client._session.timeout = 3.0
            with pytest.raises(torch_ps.Unreachable, match=f"no server answers at {servers.addresses[1]} within [23]"):
                client.once()
        servers.start_alone(1, resume=True)


def test_shard_may_start_alone_until_a_worker_takes_part(tmp_path: Path) -> None:
    with shards(2, **settings(tmp_path, workers=1)) as servers:
        servers.kill(1)
        servers.start_alone(1)
        with Counted(servers) as client:
            client.begin()
            while servers.status().checkpoint.version == 0:
                client.once()
            servers.kill()
            servers.start(resume=True)
            servers.kill(1)  # nobody has come back yet
            servers.start_alone(1, resume=True)
            with pytest.raises(torch_ps.StepConflict):
                client.once()
            counts = client.count(client.pull().params)
            assert counts == [servers.status().checkpoint.version] * 3
            assert client.once() == [counts[0] + 1] * 3


def test_shard_without_the_checkpoint_from_which_the_lead_goes_on_is_refused(tmp_path: Path) -> None:
    with shards(2, **settings(tmp_path, workers=1)) as servers:
        with Counted(servers) as client:
            client.begin()
            while servers.status().checkpoint.version == 0:
                client.once()
        servers.kill()
        servers.start_alone(0, resume=True)
        said = servers.refused(1, checkpoint="", checkpoint_every=0)
        assert "the lead goes on from version" in said
        assert "give shard 1 the same --checkpoint" in said
        servers.start_alone(1, resume=True)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("Norm", pb.NormRequest(shard=1, square=1.0)),
        ("Kept", pb.KeptRequest(shard=1, version=1, error="no")),
        ("WatchRoster", pb.WatchRequest(incarnation=1)),
        ("Join", pb.JoinRequest(worker="w1")),
    ],
)
def test_what_is_of_another_start_changes_nothing(method: str, message: Message) -> None:
    with job(shards=2) as servers, grpc.insecure_channel(servers.addresses[0]) as connection:
        call: Any = connection.unary_unary(channel.method(method), lambda m: m.SerializeToString())
        with pytest.raises(grpc.RpcError) as caught:
            call(message, timeout=SECONDS)
        assert isinstance(error_of(caught.value, str(servers)), torch_ps.Restarted)
        assert not servers.status().worker


@pytest.fixture
def stranger() -> Iterator[Raw]:
    with job() as servers, raw(servers.addresses[0]) as peer:
        peer.incarnation += 1
        yield peer


@pytest.mark.parametrize("worker", ["w0", ""])
def test_stream_of_another_start_is_refused_before_its_first_push(stranger: Raw, worker: str) -> None:
    error = stranger.exchange(stranger.hello(worker, 1), pack(pb.UpHeader(push=pb.Push(weight=1.0))))
    assert isinstance(error, torch_ps.Restarted)


def test_seed_of_another_start_is_refused(stranger: Raw) -> None:
    header = pb.SeedHeader(worker="w0", session=1, incarnation=stranger.incarnation)
    assert isinstance(stranger.error("Seed", [pack(header)]), torch_ps.Restarted)
