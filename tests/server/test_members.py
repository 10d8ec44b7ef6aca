"""Members that speak in another's name: they are refused, and the others go on with the right numbers."""

import hashlib
import queue
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import torch_ps
from tests.support.jobs import job, until
from tests.support.pair import SIZE, SPEC, Pair, model, pair
from tests.support.raw import Raw, described, raw, secret_of
from tests.support.raw_worker import raw_workers
from torch_ps.common import version
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.wire.frames import pack, unpack, unpack_all

SECRET = secret_of("mallory")
MODEL = described(model(), hyper={"lr": 1.0})


@pytest.fixture(scope="module")
def running() -> Iterator[Pair]:
    with pair(shards=2, clip_norm=1e6) as found:
        yield found
        found.train()


@pytest.fixture(params=[0, 1], ids=["lead", "shard 1"])
def peer(running: Pair, request: pytest.FixtureRequest) -> Iterator[Raw]:
    with raw(running.servers.addresses[request.param]) as found:
        yield found


@pytest.fixture
def lead(running: Pair) -> Iterator[Raw]:
    with raw(running.servers.addresses[0]) as found:
        yield found


def victim(running: Pair) -> tuple[str, int]:
    """Name and session of w0, as everybody can see them."""
    worker = running.servers.status().worker[0]
    return worker.worker, worker.session


PUSH = pb.UpHeader(push=pb.Push(bucket=0, step=1, weight=1e6, codec="none"))


@pytest.mark.parametrize("secret", [SECRET, b"", bytes(16)], ids=["own", "none", "zeros"])
def test_stream_in_the_name_of_another_is_refused(running: Pair, peer: Raw, secret: bytes) -> None:
    worker, session = victim(running)
    hello = pb.Hello(worker=worker, session=session, incarnation=peer.incarnation, secret=secret)
    found = peer.exchange(pack(pb.UpHeader(hello=hello)), pack(PUSH, [bytes(32)]))
    assert type(found) is torch_ps.UnknownWorker
    assert "joined with another secret" in str(found)
    running.train(1)


def test_copies_of_pushes_in_the_name_of_another_are_refused(running: Pair, lead: Raw) -> None:
    worker, session = victim(running)
    hello = pb.Hello(worker=worker, session=session, incarnation=lead.incarnation, secret=SECRET)
    found = lead.error("Commit", [pack(pb.UpHeader(hello=hello)) + pack(PUSH)])
    assert type(found) is torch_ps.UnknownWorker
    running.train(1)


@pytest.mark.parametrize(
    ("method", "request_"),
    [
        ("Leave", pb.LeaveRequest()),
        ("Renew", pb.RenewRequest()),
        ("Data", pb.DataRequest(data=pb.DataSet(size=10), batch=1, epochs=1)),
        ("Data", pb.DataRequest(data=pb.DataSet(size=10), give_back=True)),
        ("Share", pb.ShareRequest()),
        ("Trace", pb.TraceRequest(part=pb.TracePart())),
        ("Ballot", pb.BallotRequest(take_over=True)),
    ],
    ids=["leave", "renew", "fetch", "give back", "share", "trace", "ballot"],
)
def test_call_in_the_name_of_another_is_refused(
    running: Pair, lead: Raw, method: str, request_: pb.LeaveRequest
) -> None:
    asked = type(request_).FromString(request_.SerializeToString())
    asked.worker, asked.session = victim(running)
    asked.secret = SECRET
    if hasattr(asked, "incarnation"):
        asked.incarnation = lead.incarnation
    found = lead.error(method, [asked.SerializeToString()])
    assert type(found) is torch_ps.UnknownWorker
    assert "joined with another secret" in str(found)
    running.train(1)


@pytest.mark.parametrize(
    ("method", "request_"),
    [
        ("Norm", pb.NormRequest(shard=1, step=10**9, square=1.0)),
        ("Norm", pb.NormRequest(shard=0, step=10**9, square=1.0)),
        ("Kept", pb.KeptRequest(shard=1, version=1, error="no")),
        ("Trace", pb.TraceRequest(shard=1, part=pb.TracePart())),
    ],
    ids=["norm", "norm of the lead", "kept", "trace"],
)
def test_call_in_the_name_of_a_shard_is_refused(
    running: Pair, lead: Raw, method: str, request_: pb.NormRequest
) -> None:
    asked = type(request_).FromString(request_.SerializeToString())
    asked.incarnation, asked.secret = lead.incarnation, SECRET
    found = lead.error(method, [asked.SerializeToString()])
    assert type(found) is torch_ps.Refused
    assert f"this is not shard {request_.shard} of the job: no process with its secret has entered" in str(found)
    running.train(1)


def test_process_that_enters_in_the_place_of_a_shard_costs_that_shard_nothing() -> None:
    with job(shards=2, clip_norm=1e6, bucket_size=1 / 256) as servers, raw(servers.addresses[0]) as peer:
        enter = pb.EnterRequest(shard=1, num_shards=2, secret=SECRET, version=version.current())
        list(peer.call("Enter", [enter.SerializeToString()]))
        with torch_ps.Client(str(servers), name="w0") as client:
            client.init({"x": torch.zeros(4096)}, SPEC)
            assert client.push({"x": torch.ones(4096)}).params["x"].tolist() == [-1.0] * 4096
        enter.secret = secret_of("another")
        assert type(peer.error("Enter", [enter.SerializeToString()])) is torch_ps.Refused


def test_name_of_a_connected_worker_is_not_given_away(running: Pair, lead: Raw) -> None:
    with pytest.raises(torch_ps.NameTaken, match="'w0' is connected to this job"):
        lead.join(pb.JoinRequest(worker="w0", model=MODEL))
    running.train(1)


@pytest.mark.parametrize("length", [0, 15])
def test_secret_that_is_too_short_is_refused(lead: Raw, length: int) -> None:
    request = pb.JoinRequest(worker="w2", model=MODEL, secret=bytes(length), incarnation=lead.incarnation)
    assert f"'w2' shows a secret of {length} bytes; it has 16" in str(lead.error("Join", [request.SerializeToString()]))


def test_nobody_is_told_a_secret(running: Pair, lead: Raw) -> None:
    secrets = [worker._session.identity.secret for worker in running.workers]
    rosters = lead.call("WatchRoster", [pb.WatchRequest().SerializeToString()])
    view = next(rosters)
    rosters.cancel()
    said = [view, running.servers.status().SerializeToString(), running.servers.log.encode()]
    digests = [member.digest for member in pb.RosterView.FromString(view).member]
    assert digests == [hashlib.sha256(secret).hexdigest()[:32] for secret in secrets]
    for secret in secrets:
        assert not any(secret in each or secret.hex().encode() in each for each in said)
    assert not any(secrets[0].hex() in repr(each) or str(secrets[0]) in repr(each) for each in running.workers)
    assert str(secrets[0]) not in repr(running.workers[0]._session.identity)


def test_neither_a_standby_nor_a_checkpoint_has_a_secret(tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    with (
        job(checkpoint=str(folder), checkpoint_every=2) as servers,
        torch_ps.Client(str(servers), name="w0") as client,
        raw(servers.addresses[0]) as peer,
    ):
        client.init(model(), SPEC)
        ends: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        hello = pb.ReplicaHello(server="127.0.0.1:1/00000000", version=version.current())
        ends.put(pb.ReplicaUp(hello=hello).SerializeToString())
        frames = peer.call("Replicate", iter(ends.get, None))
        said: list[bytes] = []
        while not said or not unpack(said[-1], pb.ReplicaHeader)[0].HasField("bucket"):
            said.append(next(frames))
        ends.put(None)
        frames.cancel()
        for _ in range(4):
            client.push({"x": torch.ones(SIZE)})
        until(lambda: servers.status().checkpoint.version >= 2, "a checkpoint is good")
        secret = client._session.identity.secret
        said += [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    digest = hashlib.sha256(secret).hexdigest()[:32].encode()
    assert sum(digest in each for each in said) == 2  # in the roster of either
    assert not any(secret in each or secret.hex().encode() in each for each in said)


def test_samples_that_a_worker_was_not_given_are_neither_covered_nor_given_back() -> None:
    with (
        job(mode="async") as servers,
        raw_workers(servers, model(), hyper={"lr": 1.0}) as (worker,),
        raw(str(servers)) as peer,
    ):
        worker.push(0, torch.ones(SIZE), covers=[pb.Covers(number=7, samples=5)])
        with pytest.raises(torch_ps.ProtocolError, match="covers 5 samples of data set 7; it was given 0"):
            worker.answer()
        asked = pb.DataRequest(worker="w0", session=worker.session, secret=secret_of("w0"), batch=4, epochs=1)
        asked.data.size = 8
        back = type(asked).FromString(asked.SerializeToString())
        back.give_back, back.received = True, 2**63
        list(peer.call("Data", [back.SerializeToString()]))
        (reply,) = [pb.DataReply.FromString(each) for each in peer.call("Data", [asked.SerializeToString()])]
        assert [(part.start, part.stop) for part in reply.range] == [(0, 4)]
        worker.open()
        worker.push(0, torch.ones(SIZE), covers=[pb.Covers(number=reply.number, samples=4)])
        assert worker.answer().values.tolist() == [-1.0] * SIZE


def test_join_that_was_not_answered_is_repeated_and_counts_once() -> None:
    with job() as servers, raw(servers.addresses[0]) as peer:
        first = peer.join(pb.JoinRequest(worker="w0", model=MODEL))
        assert first.seed
        assert peer.join(pb.JoinRequest(worker="w0", model=MODEL)) == first
        assert servers.status().joins == 1
        peer.leave("w0", first.session)
        assert peer.join(pb.JoinRequest(worker="w0", model=MODEL)).session > first.session


def test_second_stream_of_a_session_ends_the_first_and_a_push_on_both_counts_once() -> None:
    with job() as servers, raw_workers(servers, model(), hyper={"lr": 1.0}) as (worker,), raw(str(servers)) as other:
        worker.push(0, torch.ones(SIZE))
        assert worker.answer().values.tolist() == [-1.0] * SIZE
        push = pb.UpHeader(push=pb.Push(bucket=0, step=0, weight=1.0, codec="none"))
        frames: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        frames.put(other.hello("w0", worker.session))
        frames.put(pack(push, [bytes(4 * SIZE)]))
        ((header, payload),) = unpack_all(next(other.call("Exchange", iter(frames.get, None))), pb.DownHeader)
        frames.put(None)
        assert (header.version, header.next_step) == (1, 1)
        assert torch.frombuffer(bytearray(payload), dtype=torch.float32).tolist() == [-1.0] * SIZE
        with pytest.raises(torch_ps.UnknownWorker, match="has opened a newer stream"):
            worker.answer()
