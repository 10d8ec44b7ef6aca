"""A primary that has lost its standby asks that one whether it serves: it may have been taken for dead itself.

SIGSTOP, a lost network: primary silent --> workers have the standby take over --> the primary is back
    --Describe at the standby--> "I serve in term t" --> StepDown: it ends, having acknowledged nothing meanwhile
"""

import asyncio
import logging
import time

import grpc

from torch_ps.common.errors import ConfigError, NotServing
from torch_ps.common.rpc.credentials import Access
from torch_ps.common.wire import address
from torch_ps.common.wire.ballots import address_of, configuration_from_proto
from torch_ps.ps.cluster.describe import describe
from torch_ps.ps.core.failover.seat import Role, StepDown
from torch_ps.ps.job.job import Job

log = logging.getLogger("torch_ps.ps")

#: Seconds between two questions, and that an answer may take.
EVERY_SECONDS, ANSWER_SECONDS = 0.5, 2.0
#: Seconds between two lines in the log about what is waited for.
SAY_SECONDS = 10.0


async def rivals(job: Job, access: Access) -> None:
    """While this primary waits for leave to go on alone, ask its former standby who serves; until cancelled."""
    begin = said = time.monotonic()
    while True:
        await asyncio.sleep(EVERY_SECONDS)
        seat = job.seat_driver.seat
        if seat.follows or not seat.partner or seat.role not in (Role.ASKING, Role.CONFIRMING):
            begin = said = time.monotonic()
            continue
        if (now := time.monotonic()) > said + SAY_SECONDS:
            said = now
            log.warning(
                "shard %d has acknowledged nothing for %.0f s: its standby is lost, and it waits for %s to let it go "
                "on alone",
                job.index,
                now - begin,
                "etcd" if seat.lapses else f"a majority of the {len(seat.electorate)} workers",
            )
        try:
            async with access.connect_aio(address.parse(address_of(seat.partner))) as connection:
                told = await describe(connection, access, ANSWER_SECONDS)
        except (grpc.aio.AioRpcError, ConfigError):
            continue
        if not told.closed:
            job.seat_driver.obey(seat.refused(configuration_from_proto(told.configuration), serving=True))


def deposed(job: Job, step_down: StepDown) -> NotServing:
    """The last words of a primary in whose place another one serves."""
    configuration = step_down.configuration
    return NotServing(
        f"shard {job.index} is served by {address_of(configuration.primary)} now, in {configuration.term}: this server "
        "was taken for dead and has acknowledged nothing since then; start it again with "
        f"--standby-of {address_of(configuration.primary)}"
    )
