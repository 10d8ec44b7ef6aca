"""Fencing of a deposed primary: one that has lost its standby asks that server whether it serves, and ends if so.

SIGSTOP, a lost network: primary silent --> workers have the standby take over --> the primary is back
    --Describe at the standby--> "I serve in term t" --> StepDown: it ends, having acknowledged nothing meanwhile
"""

import asyncio
import logging
import time
from collections.abc import Callable

from torch_ps.common.errors import NotServing, PsError
from torch_ps.common.rpc.credentials import Access
from torch_ps.common.wire import address
from torch_ps.common.wire.ballots import address_of, configuration_from_proto
from torch_ps.ps.cluster import peer
from torch_ps.ps.core.failover.seat import Role, StepDown
from torch_ps.ps.job.replication_status import ReplicationStatus
from torch_ps.ps.job.seat_driver import SeatDriver, SeatListener

log = logging.getLogger("torch_ps.ps")

#: Seconds between two questions, and that an answer may take.
EVERY_SECONDS, ANSWER_SECONDS = 0.5, 2.0
#: Seconds between two log lines about what is waited for.
LOG_SECONDS = 10.0


class Fence(SeatListener):
    """Ends a primary in whose place another server serves.

    Args:
        shard: Index of the shard.
        access: TLS and token settings.
        on_failure: Called with the error that this server ends with.
    """

    def __init__(
        self,
        shard: int,
        driver: SeatDriver,
        replication: ReplicationStatus,
        access: Access,
        on_failure: Callable[[BaseException], None],
    ) -> None:
        self._shard, self._driver, self._replication = shard, driver, replication
        self._access, self._on_failure = access, on_failure

    def on_step_down(self, step_down: StepDown) -> None:
        if self._replication.closed:
            return  # a standby goes on following
        configuration = step_down.configuration
        server = address_of(configuration.primary)
        self._on_failure(
            NotServing(
                f"shard {self._shard} is served by {server} now, in {configuration.term}: this server was taken for "
                f"dead and has acknowledged nothing since then; start it again with --standby-of {server}"
            )
        )

    async def watch(self) -> None:
        """While this primary waits for leave to go on alone, ask its former standby who serves; until cancelled."""
        begin = logged = time.monotonic()
        while True:
            await asyncio.sleep(EVERY_SECONDS)
            seat = self._driver.seat
            if seat.follows or not seat.partner or seat.role not in (Role.ASKING, Role.CONFIRMING):
                begin = logged = time.monotonic()
                continue
            if (now := time.monotonic()) > logged + LOG_SECONDS:
                logged = now
                log.warning(
                    "shard %d has acknowledged nothing for %.0f s: its standby is lost, and it waits for %s to let it "
                    "go on alone",
                    self._shard,
                    now - begin,
                    "etcd" if seat.lapses else f"a majority of the {len(seat.electorate)} workers",
                )
            try:
                async with peer.connect(address.parse(address_of(seat.partner)), self._access) as partner:
                    told = await partner.describe(ANSWER_SECONDS)
            except PsError:
                continue
            if not told.closed:
                self._driver.obey(seat.refused(configuration_from_proto(told.configuration), serving=True))
