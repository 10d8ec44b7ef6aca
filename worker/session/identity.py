"""Who a session is to the servers, and what it says of itself: the messages that bring it into a job.

Join --> session --> Seed, where it was asked to --> Hello, the first frame of every stream
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from torch_ps.common import codecs, schema
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.plan import Bucket
from torch_ps.common.schema import Model
from torch_ps.common.wire.frames import pack


@dataclass(frozen=True, slots=True)
class Identity:
    """One worker in one incarnation of the servers.

    Attributes:
        session: 0: an observer, or not joined yet.
    """

    worker: str
    session: int
    incarnation: int

    def join(self, model: Model, rank: int | None) -> pb.JoinRequest:
        return pb.JoinRequest(worker=self.worker, rank=rank, model=schema.to_proto(model), incarnation=self.incarnation)

    def hello(self, pull_codec: str) -> bytes:
        worker = self.worker if self.session else ""
        hello = pb.Hello(worker=worker, session=self.session, pull_codec=pull_codec, incarnation=self.incarnation)
        return pack(pb.UpHeader(hello=hello))

    def seeds(
        self, model: Model, buckets: Sequence[Bucket], values: Callable[[Bucket], torch.Tensor]
    ) -> Iterator[bytes]:
        """Frames with one shard's first parameters; ``values`` gives those of one of its buckets, shape (numel,)."""
        header = pb.SeedHeader(worker=self.worker, session=self.session, model=schema.to_proto(model))
        header.incarnation = self.incarnation
        yield pack(header)
        plain = codecs.codec("none")
        for bucket in buckets:
            yield pack(pb.SeedHeader(bucket=bucket.index), plain.encode(values(bucket)))
