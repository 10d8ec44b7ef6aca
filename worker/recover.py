"""A worker that lives on while its servers die and come back: what it does before a stream is used again, and after.

    stream breaks --> server answers again --prepare()--> memory shared anew --> what was not answered is sent again
    StepConflict: the servers have gone back to a checkpoint --recovered()--> pull --> on from there

Rules of this file
  1. A gradient that could not be applied is gone with the steps that the servers have lost: they are trained again.
"""

import dataclasses
import logging
from typing import TYPE_CHECKING

from torch_ps.common.errors import NoSharedMemory, StepConflict
from torch_ps.common.frames import pack, unpack
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.worker.exchange import Exchange
from torch_ps.worker.plane import Planes
from torch_ps.worker.transport import Link

if TYPE_CHECKING:
    from torch_ps.common.plan import Bucket
    from torch_ps.worker.session import Outcome, Session

log = logging.getLogger("torch_ps.worker")


def prepare(
    planes: Planes, exchange: Exchange, link: Link, buckets: "tuple[Bucket, ...]", worker: str, session: int
) -> None:
    """Before the stream to one shard, which has ``buckets``, is opened again: let its server read this memory.

    Raises:
        PsError: the server does not answer, or does not know this worker.
    """
    shard = buckets[0].shard if buckets else -1
    if not planes.has(shard):
        return
    try:
        planes.share_again(link, shard, worker, session)
    except NoSharedMemory as error:
        log.info("from now on the network carries all to and from %s: %s", link.address, error)
        for bucket in buckets:
            frame = exchange.unanswered(bucket.index)
            header = unpack(frame, pb.UpHeader)[0] if frame else pb.UpHeader()
            if header.push.HasField("arena_bytes"):
                payload = planes.payload(bucket, header.push.arena_bytes)
                header.push.ClearField("arena_bytes")
                exchange.keep(bucket.index, pack(header, (payload,)))
        planes.forget(shard)


def recovered(session: "Session", conflict: StepConflict) -> "Outcome":
    """Pull everything after a push was refused with ``conflict``; the outcome of a push that was not applied.

    Raises:
        WaitTimeout: says who is waited for.
    """
    before = session.version
    for bucket in session.plan.buckets:
        session.pull(bucket)
    outcome = session.wait()
    log.warning(
        "worker %s goes on from version %d; it had version %d, and its last push was refused: %s",
        session.name,
        outcome.version,
        before,
        conflict,
    )
    return dataclasses.replace(outcome, applied=False)
