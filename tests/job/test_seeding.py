"""The first parameters: those of the lowest rank, or where it leaves half-way, those of the next one."""

import contextlib
import functools
import queue
import threading
from collections.abc import Iterator

import pytest
import torch

import torch_ps
from tests.support.jobs import SECONDS, Servers, job, until
from tests.support.raw import raw, secret_of
from tests.support.threads import spawn
from torch_ps.common.errors import PsError
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.plan import Bucket, plan
from torch_ps.common.schema import Group, Model, TensorSpec
from torch_ps.common.wire import address
from torch_ps.common.wire.frames import Frame, pack, unpack_all
from torch_ps.worker.session.identity import Identity
from torch_ps.worker.transport.link import Link

SPEC = torch_ps.OptimizerSpec("SGD", lr=1.0)
MODEL = Model("SGD", (Group((TensorSpec.of("x", torch.zeros(4096)),), {}),))
SMALL = Model("SGD", (Group((TensorSpec.of("x", torch.zeros(4)),), dict(SPEC.hyper)),))


def pull(shard: Link, incarnation: int, bucket: Bucket) -> set[float]:
    """The values of one bucket, as an observer gets them."""
    came: queue.SimpleQueue[Frame | PsError] = queue.SimpleQueue()

    def take(message: Frame) -> bool:
        came.put(message)
        return True

    stream = shard.open(shard.dial(), take, came.put)
    stream.send(Identity("", 0, incarnation).hello("none"))
    stream.send(pack(pb.UpHeader(pull=pb.Pull(bucket=bucket.index))))
    message = came.get(timeout=SECONDS)
    stream.close()
    assert not isinstance(message, PsError), message
    (_, payload), *_ = unpack_all(message, pb.DownHeader)
    return set(torch.frombuffer(bytearray(payload), dtype=torch.float32).tolist())


def test_shard_serves_the_parameters_that_replace_others() -> None:
    with job(shards=2, bucket_size=1 / 256) as servers:
        lead, other = (Link(address.parse(each)) for each in servers.addresses)
        described = lead.describe(SECONDS)
        buckets = plan(MODEL, described.bucket_bytes, 2).of_shard(1)
        for name, value in (("w0", 1.0), ("w1", 2.0)):
            secret = secret_of(name)
            reply = lead.join(Identity(name, 0, described.incarnation, secret).join(MODEL, None), SECONDS)
            assert reply.seed
            worker = Identity(name, reply.session, described.incarnation, secret)
            values = {bucket: torch.full((bucket.numel,), value) for bucket in buckets}
            other.seed(functools.partial(worker.seeds, MODEL, buckets, values.__getitem__), SECONDS)
            assert pull(other, described.incarnation, buckets[0]) == {value}
            lead.leave(pb.LeaveRequest(worker=name, session=reply.session, secret=secret), SECONDS)
        lead.close()
        other.close()


def test_parameters_come_from_the_seeder_alone_on_every_shard_and_count_once() -> None:
    with job(shards=2, bucket_size=1 / 256) as servers:
        links = [Link(address.parse(each)) for each in servers.addresses]
        incarnation = links[0].describe(SECONDS).incarnation
        buckets = [plan(MODEL, int((1 << 20) / 256), 2).of_shard(index) for index in range(2)]

        def join(name: str) -> Identity:
            who = Identity(name, 0, incarnation, secret_of(name))
            session = links[0].join(who.join(MODEL, None), SECONDS).session
            return Identity(name, session, incarnation, secret_of(name))

        def frames(who: Identity, shard: int, value: float) -> list[bytes]:
            values = functools.partial(torch.full, fill_value=value)
            return list(who.seeds(MODEL, buckets[shard], lambda bucket: values((bucket.numel,))))

        seeder = join("w0")
        stranger = Identity("w0", seeder.session, incarnation, secret_of("mallory"))
        for shard in (1, 0):
            with pytest.raises(torch_ps.UnknownWorker, match="joined with another secret"):
                links[shard].seed(frames(stranger, shard, 9.0).copy, SECONDS)
            with pytest.raises(torch_ps.CorruptFrame, match="left out 1 buckets"):
                links[shard].seed(frames(seeder, shard, 8.0)[:-1].copy, SECONDS)
            with pytest.raises(torch_ps.CorruptFrame, match="came twice"):
                links[shard].seed([*(all_ := frames(seeder, shard, 8.0)), *all_[1:]].copy, SECONDS)
            links[shard].seed(frames(seeder, shard, 1.0).copy, SECONDS)
            links[shard].seed(frames(seeder, shard, 2.0).copy, SECONDS)  # its answer was lost
        other = join("w1")
        for shard in (1, 0):
            with pytest.raises(torch_ps.ProtocolError, match=f"'w1' was not told to send .* of shard {shard}"):
                links[shard].seed(frames(other, shard, 3.0).copy, SECONDS)
            assert pull(links[shard], incarnation, buckets[shard][0]) == {1.0}
        for link in links:
            link.close()


def test_stream_of_parameters_that_another_one_replaces_holds_no_memory() -> None:
    large = Model("SGD", (Group((TensorSpec.of("x", torch.zeros(8 << 20)),), {}),))  # 32 MiB
    with job(lease=SECONDS) as servers, contextlib.ExitStack() as left_open:
        lead = Link(address.parse(servers.addresses[0]))
        who = Identity("w0", 0, servers.incarnation, secret_of("w0"))
        session = lead.join(who.join(large, None), SECONDS).session
        who = Identity("w0", session, servers.incarnation, secret_of("w0"))
        buckets = plan(large, lead.describe(SECONDS).bucket_bytes, 1).buckets
        frames = list(who.seeds(large, buckets, lambda bucket: torch.ones(bucket.numel)))
        peer = left_open.enter_context(raw(servers.addresses[0]))
        before = servers.status().load.memory_bytes
        for _ in range(8):
            sent, end = threading.Event(), threading.Event()
            left_open.callback(peer.call("Seed", all_but_one(frames, sent, end)).cancel)
            left_open.callback(end.set)
            assert sent.wait(SECONDS)
        grown = servers.status().load.memory_bytes - before
        lead.seed(frames.copy, SECONDS)
        assert pull(lead, servers.incarnation, buckets[0]) == {1.0}
        lead.close()
    assert grown < 160 << 20, f"{grown / (1 << 20):.0f} MiB"


def all_but_one(frames: list[bytes], sent: threading.Event, end: threading.Event) -> Iterator[bytes]:
    yield from frames[:-1]
    sent.set()  # gRPC has taken them all
    end.wait(SECONDS)


def test_all_shards_get_the_model_with_which_the_seeder_has_joined() -> None:
    other_lr = Model("SGD", (Group(MODEL.groups[0].tensors, {"lr": 9.0}),))
    with job(shards=2, bucket_size=1 / 256) as servers, contextlib.ExitStack() as stack:
        links = [stack.enter_context(contextlib.closing(Link(address.parse(each)))) for each in servers.addresses]
        described = links[0].describe(SECONDS)
        who = Identity("w0", 0, described.incarnation, secret_of("w0"))
        session = links[0].join(who.join(MODEL, None), SECONDS).session
        for model in (SMALL, other_lr):
            with pytest.raises(torch_ps.ModelMismatch, match="'w0' sends the lead another model than"):
                links[0].join(who.join(model, None), SECONDS)
        who = Identity("w0", session, described.incarnation, secret_of("w0"))
        for shard in (1, 0):
            for model in (SMALL, other_lr, MODEL):
                buckets = plan(model, described.bucket_bytes, 2).of_shard(shard)
                frames = list(who.seeds(model, buckets, lambda bucket: torch.ones(bucket.numel)))
                if model is MODEL:
                    links[shard].seed(frames.copy, SECONDS)
                else:
                    with pytest.raises(torch_ps.ModelMismatch, match=f"'w0' sends shard {shard} another model than"):
                        links[shard].seed(frames.copy, SECONDS)
            assert pull(links[shard], described.incarnation, buckets[0]) == {1.0}


def joined(servers: Servers, rank: int) -> float:
    """The parameters with which a worker begins whose own are all ``rank + 1``."""
    with torch_ps.Client(str(servers), rank=rank, timeout=SECONDS) as client:
        client.init({"x": torch.full((4,), rank + 1.0)}, SPEC)
        return float(client.pull().params["x"][0])


def test_job_begins_with_the_parameters_of_rank_0_though_it_comes_last() -> None:
    with job(workers=2) as servers:
        first = spawn(lambda: joined(servers, 1))
        until(lambda: servers.incarnation > 0 and "worker w1 waits" in servers.log, "w1 has come")
        assert joined(servers, 0) == 1.0
        assert first.result(SECONDS) == 1.0


def test_worker_whose_job_lacks_a_quorum_is_told_who_came() -> None:
    with (
        job(workers=2) as servers,
        torch_ps.Client(str(servers), rank=1, timeout=0.5) as client,
        pytest.raises(torch_ps.WaitTimeout, match=r"1 of 2 workers have not joined the job.*; w1 did for"),
    ):
        client.init({"x": torch.zeros(4)}, SPEC)


def test_next_rank_seeds_where_rank_0_dies_before_it_has_sent_the_parameters() -> None:
    with job(workers=2, lease=1.0) as servers:
        lead = Link(address.parse(servers.addresses[0]))
        assert lead.join(Identity("w0", 0, servers.incarnation, secret_of("w0")).join(SMALL, 0), SECONDS).seed
        others = [spawn(functools.partial(joined, servers, rank)) for rank in (1, 2)]
        assert [other.result(SECONDS) for other in others] == [2.0, 2.0]
        lead.close()
