"""Prepares a server that answers again: it may be another process, which has mapped no memory of this worker.

    stream breaks --> server answers again --restore_shared_memory()--> what was not answered is sent again

Whether the server still knows this worker, and its step, shows in the answers: see ``worker/optim/rejoin.py``. A server
of another incarnation is spoken to only when all shards are of that one: see ``worker/session/handshake.py``.
"""

import logging
from collections.abc import Sequence

from torch_ps.common.errors import NoSharedMemory, Restarted
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.plan import Bucket
from torch_ps.common.wire.frames import pack, unpack
from torch_ps.worker.session.identity import Identity
from torch_ps.worker.session.shard_streams import ShardStreams
from torch_ps.worker.session.shared_memory import SharedMemory
from torch_ps.worker.transport.link import Link

log = logging.getLogger("torch_ps.worker")


def check_incarnation(link: Link, now: pb.JobDescription, before: pb.JobDescription) -> None:
    """Compare what a server says of its job now with what it said before.

    Raises:
        Restarted: the server is of another incarnation.
    """
    if now.incarnation != before.incarnation:
        raise Restarted(f"server {link.address} was started anew")


def restore_shared_memory(
    memory: SharedMemory, streams: ShardStreams, link: Link, buckets: Sequence[Bucket], who: Identity
) -> None:
    """Share memory again with a shard whose stream is about to be opened.

    If the shard shares none any more, what was not answered gets its payload back, for the network to carry.

    Args:
        memory: memory that this worker shares.
        streams: streams with the frames that were not answered.
        link: connection to the shard.
        buckets: buckets of the shard.
        who: identity of the worker.

    Raises:
        UnknownWorker: the server does not know this worker.
        PsError: the server does not answer.
    """
    shard = buckets[0].shard if buckets else -1
    if not memory.has(shard):
        return
    try:
        memory.share_again(link, shard, who)
    except NoSharedMemory as error:
        log.info("the network carries all payloads to and from %s from now on: %s", link.address, error)
        for bucket in buckets:
            frame = streams.unanswered(bucket.index)
            header = unpack(frame, pb.UpHeader)[0] if frame else pb.UpHeader()
            told = header.measure if header.HasField("measure") else header.push
            if told.HasField("arena_bytes"):
                payload = memory.payload(bucket, told.arena_bytes)
                told.ClearField("arena_bytes")
                streams.replace_unanswered(bucket.index, pack(header, (payload,)))
        memory.forget(shard)
