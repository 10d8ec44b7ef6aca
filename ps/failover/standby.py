"""The life of a standby: it inherits the options of its primary, follows its state, and takes over when told to.

    Describe --> the job's options are this server's; who serves, in which term
    Replicate --> frames --> Replica, one step behind; receipts --> primary
    Ballot (workers) or etcd --> SeatDriver --> Serve --> Replica.take_over --> the job is open

It never decides by itself that its primary is dead. Workers that hear nothing ask it to take over
(``worker/session/heartbeat.py``, ``worker/transport/shard_servers.py``) and ``ps/core/failover/elected.py`` counts
their votes; with etcd, the end of the lease decides (``ps/core/failover/leased.py``).

Rules of this file
  1. The standby drops its state only for that of a primary that is at least as new: one that was started again from an
     older checkpoint is not followed.
  2. Each time that it follows it takes a new name, so no vote or receipt of before counts for the state it has now.

Source: Vertical Paxos, as ``ps/core/failover/seat.py`` uses it.
"""

import asyncio
import contextlib
import json
import logging
import secrets
import socket

from torch_ps.common import codecs, version
from torch_ps.common.errors import ConfigError, NotServing, PsError, Unreachable, WaitTimeout
from torch_ps.common.options.server_config import ServerConfig
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.rpc.credentials import Access
from torch_ps.common.security import tls_probe
from torch_ps.common.wire import address
from torch_ps.common.wire.address import Address
from torch_ps.common.wire.ballots import configuration_from_proto
from torch_ps.common.wire.frames import unpack
from torch_ps.ps.cluster import peer
from torch_ps.ps.cluster.peer import Peer
from torch_ps.ps.core.failover.seat import Seat, Serve
from torch_ps.ps.failover import records
from torch_ps.ps.failover.replica import Replica
from torch_ps.ps.job.job import Job
from torch_ps.ps.job.job_options import dump_options, take_over_options
from torch_ps.ps.job.lead_address import LeadAddress
from torch_ps.ps.job.seat_driver import SeatDriver, SeatListener

log = logging.getLogger("torch_ps.ps")

RETRY_SECONDS = 0.5
#: Seconds in which the primary has to answer Describe, at the start and later.
PRIMARY_SECONDS, ANSWER_SECONDS = 60.0, 5.0
#: Seconds for the probe that finds out why TLS fails at the primary's port.
PROBE_SECONDS = 3.0


async def inherit(config: ServerConfig, access: Access) -> tuple[ServerConfig, pb.JobDescription]:
    """Ask the primary for the options of the job.

    Returns:
        ``config`` with these options, and the whole description that the primary has given.

    Raises:
        ConfigError: An option was given that differs from the primary's; the message says which.
        PsError: The primary does not answer.
    """
    where = address.parse(config.standby_of)
    async with peer.connect(where, access) as primary:
        try:
            told = await primary.describe(ANSWER_SECONDS)
        except (Unreachable, WaitTimeout):
            if reason := await asyncio.to_thread(tls_probe.explain_failure, where, access.tls, PROBE_SECONDS):
                raise Unreachable(reason) from None
            log.info("no primary answers at %s; it may come up and is waited for %g s", where, PRIMARY_SECONDS)
            told = await primary.describe(PRIMARY_SECONDS)
    version.check(f"the primary at {where}", told.version, "this standby")
    if lacking := set(told.codec) - set(codecs.names()):
        raise ConfigError(f"the primary has a codec {min(lacking)!r}; give the standby the same --codecs")
    options = json.loads(told.options)
    taken, theirs = take_over_options(config, options), options.get("checkpoint")
    if theirs and json.loads(dump_options(taken))["checkpoint"] != theirs:
        log.warning(
            "checkpoints of this shard go to %s while the primary at %s serves it, and to %s once this server does, as "
            "--checkpoint is given here and differs; leave it out to keep them in one place",
            theirs,
            where,
            taken.checkpoint,
        )
    return taken, told


def name_of(listening: Address, towards: Address | None = None) -> str:
    """A name for this life of a server: the address at which others reach it, and a random part.

    Args:
        towards: Another server. If this one listens on all addresses, it takes the one on the way there.
    """
    host = listening.host
    if host in ("0.0.0.0", "::"):
        host = socket.gethostname()
        if towards is not None:
            with contextlib.suppress(OSError), socket.create_connection(towards, 2.0) as connection:
                host = connection.getsockname()[0]
    return f"{Address(host, listening.port)}/{secrets.token_hex(4)}"


class Standby(SeatListener):
    """One server's time as a standby.

    Args:
        job: Job that this server will serve.
        driver: Driver of this server's seat.
        primary: Address of the primary.
        here: Address at which this server listens.
        access: TLS and token settings.
        lead: Where another shard than the lead finds it; None on the lead.

    Attributes:
        closed: Why this server does not serve; "" from the takeover on.
    """

    def __init__(
        self,
        job: Job,
        driver: SeatDriver,
        *,
        primary: Address,
        here: Address,
        access: Access,
        lead: LeadAddress | None,
    ) -> None:
        self._job, self._driver, self._lead = job, driver, lead
        self._primary, self._here, self._access = primary, here, access
        self._replica = Replica(job, lead)
        self._serves = asyncio.Event()
        self._logged = ""
        self.closed = f"this is the standby of shard {job.settings.index}; {primary} serves it"

    def progress(self) -> tuple[int, bool]:
        """Version that every bucket here has reached, and whether all of the shard is here."""
        return self._replica.version, self._replica.complete

    async def run(self) -> None:
        """Follow the primary until this server serves.

        Raises:
            ValueError: The records of the primary do not make a state; this server cannot serve.
        """
        while not self._serves.is_set():
            following = asyncio.create_task(self._follow())
            serves = asyncio.create_task(self._serves.wait())
            try:
                await asyncio.wait({following, serves}, return_when=asyncio.FIRST_COMPLETED)
                if following.done():
                    following.result()
            finally:
                following.cancel()
                serves.cancel()
                await asyncio.gather(following, serves, return_exceptions=True)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._serves.wait(), RETRY_SECONDS)
        await self._replica.take_over()
        self.closed = ""
        log.warning("shard %d is served here from version %d on", self._job.settings.index, self._replica.version)

    def on_serve(self, serve: Serve) -> None:
        log.warning("taking over shard %d: %s", self._job.settings.index, serve.reason)
        self._serves.set()

    async def _follow(self) -> None:
        """One connection to the primary, until it ends."""
        try:
            async with peer.connect(self._primary, self._access) as primary:
                told = await primary.describe(ANSWER_SECONDS)
                if told.closed:
                    raise NotServing(told.closed)
                self._begin(told)
                await self._receive(primary, told.configuration.term.server)
                reason = "it has ended the stream"
        except PsError as error:
            reason = str(error)
        if reason != self._logged:
            self._logged = reason
            log.warning("not following the primary at %s: %s", self._primary, reason)

    def _begin(self, told: pb.JobDescription) -> None:
        """Drop the state that is here for that of the primary.

        Raises:
            NotServing: The state here is newer, or the primary is of another start of the servers.
        """
        seat = self._driver.seat
        theirs = configuration_from_proto(told.configuration)
        if not seat.may_follow(theirs.term):
            raise NotServing(
                f"it serves in an older term than {seat.configuration.term}, of which this server has the state; "
                "waiting to take over"
            )
        if told.incarnation != self._job.incarnation.number:
            raise NotServing(
                "it was started anew, in another job than this server stands by for; start this one again too"
            )
        name = name_of(self._here, self._primary)
        self._driver.restart(name, theirs.term.server)
        self._replica = Replica(self._job, self._lead)

    async def _receive(self, primary: Peer, name: str) -> None:
        """Take frames until the primary, which has this name, ends the stream or is not to be followed any more."""
        seat, replica = self._driver.seat, self._replica
        async with primary.replicate(seat.me, self._job.settings.lease / 4) as stream:
            async for message in stream.frames():
                header, payload = unpack(message, pb.ReplicaHeader)
                try:
                    follows = self._take(seat, replica, name, header, payload)
                except PsError as error:
                    await stream.fail(str(error))
                    raise
                if not follows:
                    return
                stream.confirm()
                await replica.room()

    def _take(self, seat: Seat, replica: Replica, primary: str, header: pb.ReplicaHeader, payload: memoryview) -> bool:
        """Take one frame. Returns False if this server takes nothing from its primary any more."""
        if not replica.complete:
            replica.take(header, payload)
            if replica.complete:
                seat.begin_at(header.complete.number)
                self._logged = ""
                log.info("all of shard %d is here, at version %d", self._job.settings.index, replica.version)
            return True
        number, is_change = seat.recorded + 1, header.HasField("change")
        change = records.change_of(header.change, number) if is_change else None
        if not self._driver.obey(seat.received(primary, number, change)):
            return False
        if change is None:
            replica.take(header, payload)
        return True
