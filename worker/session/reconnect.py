"""Before a stream that broke is used again: the server behind it may be another process, which has mapped no memory.

    stream breaks --> server answers again --prepare()--> memory shared anew --> what was not answered is sent again

Whether the server still knows this worker, and its step, shows in the answers; see ``worker/optim/rejoin.py``. One of
another incarnation is spoken to only when all shards are of it; see ``torch_ps.worker.session.handshake``.
"""

import logging
from collections.abc import Sequence

from torch_ps.common.errors import NoSharedMemory, Restarted
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.plan import Bucket
from torch_ps.common.wire.frames import pack, unpack
from torch_ps.worker.session.shard_streams import ShardStreams
from torch_ps.worker.session.shared_memory import SharedMemory
from torch_ps.worker.transport.link import Link

log = logging.getLogger("torch_ps.worker")


def check(link: Link, now: pb.JobDescription, before: pb.JobDescription) -> None:
    """Whether the server that answers again is of the incarnation of before.

    Raises:
        Restarted: it is not.
    """
    if now.incarnation != before.incarnation:
        raise Restarted(f"server {link.address} was started anew")


def prepare(
    shared_memory: SharedMemory,
    exchange: ShardStreams,
    link: Link,
    buckets: Sequence[Bucket],
    worker: str,
    session: int,
) -> None:
    """Before the stream to one shard, which has ``buckets``, is opened again: let its server read this memory.

    Raises:
        UnknownWorker: the server does not know this worker.
        PsError: it does not answer.
    """
    shard = buckets[0].shard if buckets else -1
    if not shared_memory.has(shard):
        return
    try:
        shared_memory.share_again(link, shard, worker, session)
    except NoSharedMemory as error:
        log.info("from now on the network carries all to and from %s: %s", link.address, error)
        for bucket in buckets:
            frame = exchange.unanswered(bucket.index)
            header = unpack(frame, pb.UpHeader)[0] if frame else pb.UpHeader()
            if header.push.HasField("arena_bytes"):
                payload = shared_memory.payload(bucket, header.push.arena_bytes)
                header.push.ClearField("arena_bytes")
                exchange.keep(bucket.index, pack(header, (payload,)))
        shared_memory.forget(shard)
