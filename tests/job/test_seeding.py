"""The first parameters, where the worker that was asked for them leaves half-way: those of the next one count."""

import queue

import torch

from tests.support.jobs import SECONDS, job
from torch_ps.common.errors import PsError
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.plan import Bucket, plan
from torch_ps.common.schema import Group, Model, TensorSpec
from torch_ps.common.wire import address
from torch_ps.common.wire.frames import pack, unpack_all
from torch_ps.worker.session.identity import Identity
from torch_ps.worker.transport.link import Link

MODEL = Model("SGD", (Group((TensorSpec.of("x", torch.zeros(4096)),), {}),))


def pull(shard: Link, incarnation: int, bucket: Bucket) -> set[float]:
    """The values of one bucket, as an observer gets them."""
    came: queue.SimpleQueue[bytes | PsError] = queue.SimpleQueue()
    stream = shard.open(came.put, came.put)
    stream.send(Identity("", 0, incarnation).hello("none"))
    stream.send(pack(pb.UpHeader(pull=pb.Pull(bucket=bucket.index))))
    message = came.get(timeout=SECONDS)
    stream.close()
    assert isinstance(message, bytes), message
    (_, payload), *_ = unpack_all(message, pb.DownHeader)
    return set(torch.frombuffer(bytearray(payload), dtype=torch.float32).tolist())


def test_shard_serves_the_parameters_that_replace_others() -> None:
    with job(shards=2, bucket_size=1 / 256) as servers:
        lead, other = (Link(address.parse(each)) for each in servers.addresses)
        described = lead.describe(SECONDS)
        buckets = plan(MODEL, described.bucket_bytes, 2).of_shard(1)
        for name, value in (("w0", 1.0), ("w1", 2.0)):
            reply = lead.join(Identity(name, 0, described.incarnation).join(MODEL, None), SECONDS)
            assert reply.seed
            worker = Identity(name, reply.session, described.incarnation)
            values = {bucket: torch.full((bucket.numel,), value) for bucket in buckets}
            other.seed(worker.seeds(MODEL, buckets, values.__getitem__), SECONDS)
            assert pull(other, described.incarnation, buckets[0]) == {value}
            lead.leave(pb.LeaveRequest(worker=name, session=reply.session), SECONDS)
        lead.close()
        other.close()
