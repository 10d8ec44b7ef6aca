"""Peers of different versions: each pair names both and says which to upgrade first."""

from pathlib import Path

import pytest
import torch

import torch_ps
from tests.support.jobs import SECONDS, job
from tests.support.processes import Child
from tests.support.raw import described, raw
from torch_ps.common import version
from torch_ps.common.errors import PsError, Refused, Restarted
from torch_ps.common.options.command_line import arguments_of
from torch_ps.common.options.server_config import ServerConfig
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.wire import address
from torch_ps.common.wire.frames import pack
from torch_ps.worker.commands.status import Poller
from torch_ps.worker.transport.link import Link
from torch_ps.worker.transport.shard_servers import ShardServers

HERE, WIRE = torch_ps.__version__, version.WIRE


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        (pb.Version(package="0.0.1", wire=WIRE), ""),
        (
            pb.Version(package="9.0.0", wire=WIRE + 1),
            f"X runs torch-ps 9.0.0 (wire {WIRE + 1}), and Y runs torch-ps {HERE} (wire {WIRE}): "
            "upgrade Y to 9.0.0 first",
        ),
        (
            pb.Version(),
            f"X tells no version, as torch-ps of before wire 1 does, and Y runs torch-ps {HERE} (wire {WIRE}): "
            "upgrade X first",
        ),
    ],
)
def test_a_mismatch_names_both_numbers_and_whom_to_upgrade(theirs: pb.Version, said: str) -> None:
    assert version.mismatch("X", theirs, "Y") == said


def test_the_older_of_two_is_to_be_upgraded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(version, "WIRE", 7)
    said = version.mismatch("X", pb.Version(package="0.1.0", wire=6), "Y")
    assert said.endswith(f": upgrade X to {HERE} first")


def test_a_worker_and_a_ps_status_of_another_version_than_the_server_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with job() as servers:
        monkeypatch.setattr(version, "WIRE", WIRE + 1)
        with pytest.raises(
            Refused, match=rf"the server at \S+ runs torch-ps .*\(wire {WIRE}\), and this worker .*first"
        ):
            torch_ps.Client(str(servers))
        place = [address.parse(servers.addresses[0])]
        (advice,) = Poller("", [ShardServers(Link(place[0]), place)], SECONDS).poll().advice
        monkeypatch.setattr(version, "WIRE", WIRE)
    assert f"(wire {WIRE}), and this ps-status runs" in advice
    assert advice.endswith("figures may be missing or wrong")


def test_a_server_refuses_the_calls_of_a_worker_of_another_version_and_names_one_that_tells_none() -> None:
    newer = pb.Version(package="9.0.0", wire=WIRE + 1)
    with job() as servers, raw(servers.addresses[0]) as peer:
        model = described({"x": torch.zeros(4)})
        with pytest.raises(Refused, match=r"worker 'w0' runs torch-ps 9.0.0 .* upgrade shard 0 to 9.0.0 first"):
            peer.join(pb.JoinRequest(worker="w0", model=model, version=newer))
        hello = pb.Hello(worker="w0", session=1, incarnation=peer.incarnation, version=newer)
        assert "upgrade shard 0 to 9.0.0 first" in str(peer.exchange(pack(pb.UpHeader(hello=hello))))
        peer.incarnation = 0
        with pytest.raises(Restarted, match="worker 'w0' tells no version, as torch-ps of before wire 1 does"):
            peer.join(pb.JoinRequest(worker="w0", model=model))
        assert "'w0' tells no version" in str(peer.exchange(peer.hello("w0", 1)))


@pytest.mark.parametrize("role", ["shard", "standby"])
def test_a_shard_and_a_standby_of_another_version_do_not_start(role: str, tmp_path: Path) -> None:
    with job(shards=1) as servers:
        at = servers.addresses[0]
        config = ServerConfig(
            listen="127.0.0.1:0",
            shard="1/2" if role == "shard" else "",
            lead=at if role == "shard" else "",
            standby_of=at if role == "standby" else "",
        )
        child = Child("tests.support.newer:serve", (arguments_of(config),), tmp_path / "log")
        assert child.wait(SECONDS) == 1
    newer = f"runs torch-ps {HERE} (wire {WIRE + 2})"
    assert f"(wire {WIRE})" in child.output
    assert newer in child.output
    assert "upgrade the " in child.output
    assert "Traceback" not in child.output


def test_a_primary_refuses_a_standby_that_tells_no_version() -> None:
    with job() as servers, raw(servers.addresses[0]) as peer:
        hello = pb.ReplicaUp(hello=pb.ReplicaHello(server="host:1/a")).SerializeToString()
        refused: PsError = peer.error("Replicate", [hello])
        assert isinstance(refused, Refused)
        assert "the standby 'host:1/a' tells no version" in str(refused)
        assert "its primary runs" in str(refused)
