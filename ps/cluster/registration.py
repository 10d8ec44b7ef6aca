"""How another shard than the lead enters the job, before it listens and reads a checkpoint, and how the lead lets it.

start --> Enter --> lead: is the place free? --> number of the incarnation, version that the lead has gone on from
"""

import asyncio
import logging
import secrets
import time

import grpc

from torch_ps.common.errors import Refused, Restarted, Unreachable, WaitTimeout
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.rpc import channel
from torch_ps.common.rpc.credentials import Access
from torch_ps.common.rpc.status import error_of
from torch_ps.common.security import tls_probe as probe
from torch_ps.common.wire.address import Address
from torch_ps.ps.job.job import Job

log = logging.getLogger("torch_ps.ps")

#: Seconds in which the lead has to have come up and read its part of a checkpoint.
LEAD_SECONDS = 300.0
#: Seconds between two tries.
RETRY_SECONDS = 0.5
#: Seconds in which the lead's port has to show why a connection fails.
PROBE_SECONDS = 3.0


def let_in(job: Job, shard: int, num_shards: int, process: int) -> None:
    """On the lead: a process takes the place of a shard.

    Raises:
        Restarted: it was started alone, and this start of the servers ends for that: it has to ask again.
        Refused: the same, and it does not end.
    """
    try:
        job.incarnation.enter(shard, num_shards, process)
    except Refused:
        if job.on_alone is None:
            raise
        error = Restarted(f"shard {shard} was started anew, so all servers have to start together again")
        job.on_alone(error)
        raise error from None


async def enter(lead: Address, shard: int, num_shards: int, access: Access) -> pb.EnterReply:
    """Take the place of ``shard``; waits until the lead answers.

    Raises:
        Refused: the place was another process's, whose state is lost; says what to do.
        ConfigError: the lead's job has another number of shards.
        Unreachable: TLS does not fit; says how.
        WaitTimeout: the lead has not come up.
    """
    request = pb.EnterRequest(shard=shard, num_shards=num_shards, process=secrets.randbits(63))
    begin, told = time.monotonic(), False
    while True:
        left = begin + LEAD_SECONDS - time.monotonic()
        try:
            async with access.connect_aio(lead) as connection:
                call = connection.unary_unary(
                    channel.method("Enter"), pb.EnterRequest.SerializeToString, pb.EnterReply.FromString
                )
                reply: pb.EnterReply = await call(request, timeout=left, metadata=access.metadata)
                return reply
        except grpc.aio.AioRpcError as error:
            failure = error_of(error, str(lead))
            if not isinstance(failure, Unreachable | WaitTimeout | Restarted):
                raise failure from None
        if reason := await asyncio.to_thread(probe.explain_failure, lead, access.tls, PROBE_SECONDS):
            raise Unreachable(reason)
        if time.monotonic() - begin > LEAD_SECONDS:
            raise WaitTimeout(f"shard {shard} has waited for {LEAD_SECONDS:g} s for the lead: {failure}")
        if not told:
            log.warning("shard %d waits for the lead: %s", shard, failure)
            told = True
        await asyncio.sleep(RETRY_SECONDS)
