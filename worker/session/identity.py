"""The messages by which a worker tells the servers who it is and what it trains.

Join --> session --> Seed, if the lead asks for it --> Hello, the first frame of every stream
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from torch_ps.common import codecs, schema, version
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.plan import Bucket
from torch_ps.common.schema import Model
from torch_ps.common.wire.frames import pack


@dataclass(frozen=True, slots=True)
class Identity:
    """One session of one worker in one incarnation of the servers.

    Attributes:
        worker: name.
        session: number of the session; 0 for an observer, or before joining.
        incarnation: joint start of the servers.
        secret: 16 random bytes that show the servers who speaks for the session; printed nowhere.
    """

    worker: str
    session: int
    incarnation: int
    secret: bytes = field(default=b"", repr=False)

    def join(self, model: Model, rank: int | None) -> pb.JoinRequest:
        """The request to join with ``model``; without a rank, the order of names decides."""
        return pb.JoinRequest(
            worker=self.worker,
            rank=rank,
            model=schema.to_proto(model),
            incarnation=self.incarnation,
            secret=self.secret,
            version=version.current(),
        )

    def hello(self, pull_codec: str) -> bytes:
        """The first frame of a stream, which names the codec of pulls."""
        hello = pb.Hello(pull_codec=pull_codec, incarnation=self.incarnation, version=version.current())
        if self.session:
            hello.worker, hello.session, hello.secret = self.worker, self.session, self.secret
        return pack(pb.UpHeader(hello=hello))

    def seeds(
        self, model: Model, buckets: Sequence[Bucket], values: Callable[[Bucket], torch.Tensor]
    ) -> Iterator[bytes]:
        """Frames with the first parameters of one shard.

        Args:
            model: model of the job.
            buckets: buckets of the shard.
            values: function that returns the fp32 values of one bucket, shape (numel,).
        """
        header = pb.SeedHeader(worker=self.worker, session=self.session, model=schema.to_proto(model))
        header.incarnation, header.secret = self.incarnation, self.secret
        yield pack(header)
        plain = codecs.codec("none")
        for bucket in buckets:
            yield pack(pb.SeedHeader(bucket=bucket.index), plain.encode(values(bucket)))
