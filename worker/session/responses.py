"""What an answer brings: the parameters of one bucket as fp32 values, wherever they are.

payload of the frame --decode--> values, or what the worker's copy lacks --> on_values
shared memory        --read----> values, again if they changed meanwhile --> on_values
"""

from collections.abc import Callable, Sequence

import torch

from torch_ps.common import codecs
from torch_ps.common.codecs import Codec
from torch_ps.common.codecs.pulled_copies import Copies
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.plan import Bucket
from torch_ps.common.trace import Trace
from torch_ps.worker.gradients.flat_tensors import empty_fp32
from torch_ps.worker.session.shared_memory import SharedMemory

#: Takes the fresh fp32 values of one bucket; called on a reader thread. The tensor is valid during the call only.
OnValues = Callable[[Bucket, torch.Tensor], None]


class ResponseDecoder:
    """The answers to one life of a session; each shard's are taken by a thread of its own.

    Args:
        codec: of pulls.
    """

    def __init__(self, buckets: Sequence[Bucket], num_shards: int, shared_memory: SharedMemory, codec: Codec) -> None:
        self._buckets, self._planes, self._codec = buckets, shared_memory, codec
        largest = max((bucket.numel for bucket in buckets), default=0)
        self._scratch = [empty_fp32(largest) for _ in range(num_shards)]
        self._copies = Copies()

    def take(
        self, header: pb.DownHeader, payload: memoryview, on_values: OnValues, trace: Trace, step: int
    ) -> tuple[int, int]:
        """Hand the values of one bucket to ``on_values``; gives their version, and how many bytes they were."""
        bucket = self._buckets[header.bucket]

        def write(bucket: Bucket, values: torch.Tensor) -> None:
            with trace.span("write", step, bucket.index):
                on_values(bucket, values)

        if header.place:
            return self._planes.read(bucket, header.place, write), 4 * bucket.numel
        with trace.span("decode", step, bucket.index):
            codec = codecs.codec(header.codec)
            codec.check(payload, bucket.numel)
            values = codec.decode(payload, self._scratch[bucket.shard][: bucket.numel])
            if self._codec.coarse and bucket.rule == "optimizer":
                values = self._copies.take(bucket.index, values, delta=header.delta)
        write(bucket, values)
        return header.version, len(payload)
