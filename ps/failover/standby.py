"""A server that waits: it has the state of its primary, and takes over when the workers want it to.

    Describe --> the job's options are this server's; who serves, in which term
    Replicate --> frames --> Replica, one step behind; "received n" --> primary
    Ballot (workers) --> SeatDriver --> Serve --> Replica.take_over --> the job is open

Rules of this file
  1. What this server has is given up for the state of a primary only if that one is at least as new: one that was
     started again from an older checkpoint is not followed.
  2. Each time that it follows it has another name, so nothing that was agreed before counts for what it has now.

Source: see ``ps/core/failover/seat.py``.
"""

import asyncio
import contextlib
import json
import logging
import secrets
import socket
from collections.abc import AsyncIterator
from typing import Any

import grpc

from torch_ps.common import codecs
from torch_ps.common.errors import ConfigError, NotServing, PsError, Unreachable
from torch_ps.common.options.config import ServerConfig
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.rpc import channel
from torch_ps.common.rpc.credentials import Access
from torch_ps.common.rpc.status import error_of
from torch_ps.common.security import tls_probe as probe
from torch_ps.common.wire import address
from torch_ps.common.wire.address import Address
from torch_ps.common.wire.ballots import configuration_from_proto
from torch_ps.common.wire.frames import unpack
from torch_ps.ps.cluster.describe import describe
from torch_ps.ps.core.failover.seat import Seat, Serve
from torch_ps.ps.failover import records
from torch_ps.ps.failover.replica import Replica
from torch_ps.ps.job.job import Job
from torch_ps.ps.job.job_options import take_over_options

log = logging.getLogger("torch_ps.ps")

RETRY_SECONDS = 0.5
#: Seconds in which a primary has to say what it is, at the start and later.
PRIMARY_SECONDS, ANSWER_SECONDS = 60.0, 5.0
PROBE_SECONDS = 3.0


async def inherit(config: ServerConfig, access: Access) -> tuple[ServerConfig, pb.JobDescription]:
    """``config`` with what the primary says about the job, and all that it says.

    Raises:
        ConfigError: an option was given that is not the primary's; says which.
        PsError: the primary does not answer.
    """
    primary = address.parse(config.standby_of)
    async with access.connect_aio(primary) as connection:
        try:
            told = await describe(connection, access, PRIMARY_SECONDS)
        except grpc.aio.AioRpcError as error:
            reason = await asyncio.to_thread(probe.explain_failure, primary, access.tls, PROBE_SECONDS)
            raise (Unreachable(reason) if reason else error_of(error, str(primary))) from None
    if lacking := set(told.codec) - set(codecs.names()):
        raise ConfigError(f"the primary has a codec {min(lacking)!r}; give the standby the same --codecs")
    return take_over_options(config, json.loads(told.options)), told


def name_of(listening: Address, towards: Address | None = None) -> str:
    """A name for this life of a server: where others reach it, and a random part.

    Args:
        towards: one that reaches it; asked for the address on the way there, if the server listens on all.
    """
    host = listening.host
    if host in ("0.0.0.0", "::"):
        host = socket.gethostname()
        if towards is not None:
            with contextlib.suppress(OSError), socket.create_connection(towards, 2.0) as connection:
                host = connection.getsockname()[0]
    return f"{Address(host, listening.port)}/{secrets.token_hex(4)}"


class Standby:
    """One server's time as a standby.

    Args:
        job: that it will serve.
        primary: where it is followed.
        here: where this server listens.
    """

    def __init__(self, job: Job, primary: Address, here: Address, access: Access) -> None:
        self._job, self._primary, self._here, self._access = job, primary, here, access
        self._replica = Replica(job)
        self._served = asyncio.Event()
        self._said = ""
        job.closed = f"this is the standby of shard {job.index}; {primary} serves it"
        job.seat_driver.on_serve = self._serve
        job.replicated = lambda: (self._replica.version, self._replica.complete)

    async def run(self) -> None:
        """Follow the primary until this server serves.

        Raises:
            PsError: what the primary had sent does not make a state; this server cannot serve.
        """
        while not self._served.is_set():
            following = asyncio.create_task(self._follow())
            served = asyncio.create_task(self._served.wait())
            try:
                await asyncio.wait({following, served}, return_when=asyncio.FIRST_COMPLETED)
                if following.done():
                    following.result()
            finally:
                following.cancel()
                served.cancel()
                await asyncio.gather(following, served, return_exceptions=True)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._served.wait(), RETRY_SECONDS)
        await self._replica.take_over()
        self._job.closed = ""
        log.warning("shard %d is served here from version %d on", self._job.index, self._replica.version)

    def _serve(self, serve: Serve) -> None:
        log.warning("taking over shard %d: %s", self._job.index, serve.reason)
        self._served.set()

    async def _follow(self) -> None:
        """One connection to the primary, until it ends."""
        try:
            async with self._access.connect_aio(self._primary) as connection:
                told = await describe(connection, self._access, ANSWER_SECONDS)
                if told.closed:
                    raise NotServing(told.closed)
                self._begin(told)
                await self._receive(connection, told.configuration.term.server)
                reason = "it has ended the stream"
        except grpc.aio.AioRpcError as error:
            reason = str(error_of(error, str(self._primary)))
        except PsError as error:
            reason = str(error)
        if reason != self._said:
            self._said = reason
            log.warning("not following the primary at %s: %s", self._primary, reason)

    def _begin(self, told: pb.JobDescription) -> None:
        """Give up what is here for the state of the primary.

        Raises:
            NotServing: what is here is newer.
        """
        seat_driver, seat = self._job.seat_driver, self._job.seat_driver.seat
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
        seat_driver.anew(name, theirs.term.server)
        self._replica = Replica(self._job)

    async def _receive(self, connection: grpc.aio.Channel, primary: str) -> None:
        seat, replica = self._job.seat_driver.seat, self._replica
        call: Any = connection.stream_stream(channel.method("Replicate"), None, None)(metadata=self._access.metadata)
        hello = pb.ReplicaUp(hello=pb.ReplicaHello(server=seat.me))
        await call.write(hello.SerializeToString())
        receipts = _Receipts(call, self._job.lease / 4)
        saying = asyncio.create_task(receipts.say())
        try:
            async for message in _messages(call):
                header, payload = unpack(message, pb.ReplicaHeader)
                if not self._take(seat, replica, primary, header, payload):
                    return
                receipts.count()
                await replica.room()
        finally:
            saying.cancel()
            call.cancel()

    def _take(self, seat: Seat, replica: Replica, primary: str, header: pb.ReplicaHeader, payload: memoryview) -> bool:
        """Take one frame; False: this server takes nothing from its primary any more."""
        if not replica.complete:
            replica.take(header, payload)
            if replica.complete:
                seat.begin_at(header.complete.number)
                self._said = ""
                log.info("all of shard %d is here, at version %d", self._job.index, replica.version)
            return True
        number, is_change = seat.recorded + 1, header.HasField("change")
        change = records.change_of(header.change, number) if is_change else None
        if not self._job.seat_driver.obey(seat.received(primary, number, change)):
            return False
        if change is None:
            replica.take(header, payload)
        return True


class _Receipts:
    """Tells the primary what has come: at once, in as few messages as that takes, and every so often anyway."""

    def __init__(self, call: Any, seconds: float) -> None:
        self._call, self._seconds = call, seconds
        self._received = 0
        self._changed = asyncio.Event()

    def count(self) -> None:
        self._received += 1
        self._changed.set()

    async def say(self) -> None:
        """Until the stream ends, which whoever reads from it notices too."""
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            while True:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), self._seconds)
                self._changed.clear()
                await self._call.write(pb.ReplicaUp(received=self._received).SerializeToString())


async def _messages(call: Any) -> AsyncIterator[bytes]:
    while (message := await call.read()) is not grpc.aio.EOF:
        yield message
