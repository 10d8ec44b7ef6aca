"""What another shard than the lead asks of the lead: rosters, norms of updates, checkpoint reports, its trace.

Rosters come on one WatchRoster stream, which is opened again whenever it breaks. Until it is back the shard goes on
with the roster that it has; the core parks pushes of a newer epoch. Every attempt opens a new channel, with the
certificates and the token as they are then.
"""

import asyncio
import logging
import time
from dataclasses import dataclass

import grpc

from torch_ps.common.errors import NotServing, PsError, Restarted, Unreachable, WaitTimeout
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.rpc import channel
from torch_ps.common.rpc.credentials import Access
from torch_ps.common.rpc.status import error_of, reason_of
from torch_ps.common.security import tls_probe
from torch_ps.common.trace import TRIPS, RoundTrip, Trace, clock, clock_name, estimate_offset
from torch_ps.common.wire.address import Address
from torch_ps.ps.cluster.peer import Peer
from torch_ps.ps.core.effects import UpdateKey
from torch_ps.ps.core.incarnation import TOGETHER
from torch_ps.ps.core.roster import Member, Roster
from torch_ps.ps.engine.shard_state import Kept
from torch_ps.ps.job.job import Job
from torch_ps.ps.job.lead_address import LeadAddress

log = logging.getLogger("torch_ps.ps")

RETRY_SECONDS = 0.5
#: Seconds after which a request that the lead has not answered is sent again.
ASK_SECONDS = 30.0
#: Seconds, beyond twice the lease, in which the lead has to answer with the norm over all shards.
NORM_SECONDS = 300.0
#: Seconds for the probe that finds out why TLS fails at the lead's port.
PROBE_SECONDS = 3.0
#: Seconds for one call that compares clocks with the lead or sends it a trace.
TRACE_SECONDS = 10.0


@dataclass(eq=False, slots=True)
class _NormChannel:
    """A connection to the lead for requests for norms, and how many of them are open on it."""

    address: Address
    connection: grpc.aio.Channel
    requests: int = 0


class LeadClient:
    """The lead, as one other shard of the job calls it. All methods run on the event loop.

    Args:
        lead: Where the lead is; shared with whoever else learns its addresses.
        shard: Index of the shard that calls.
        incarnation: Number of the start of the servers that the shard belongs to.
        access: TLS and token settings.
        lease: Seconds after which another server may be the lead.
        norm_seconds: Seconds in which the lead has to answer with a norm; after that the shard cannot go on.
    """

    def __init__(
        self,
        lead: LeadAddress,
        *,
        shard: int,
        incarnation: int,
        access: Access,
        lease: float,
        norm_seconds: float | None = None,
    ) -> None:
        self._lead, self._shard, self._incarnation, self._access = lead, shard, incarnation, access
        self._lease = lease
        self._norm_seconds = NORM_SECONDS + 2 * lease if norm_seconds is None else norm_seconds
        self._norms: _NormChannel | None = None  # what new requests for norms go over
        self._heard = True  # the lead answers, as far as the log says
        self._lost = False  # the log says that it does not
        self._stopped = ""  # what the lead has said when it was told to stop

    # -------------------------------------------------------------- norms

    async def request_norm(self, group: UpdateKey, square: float) -> float | None:
        """Report this shard's squared norm of an update; wait until all shards have.

        Returns:
            The squared norm over all shards; None drops the update.

        Raises:
            WaitTimeout: The lead has not answered in time.
            PsError: The lead refuses.
        """
        worker, session, step = group
        request = pb.NormRequest(
            shard=self._shard,
            worker=worker,
            session=session,
            step=step,
            square=square,
            incarnation=self._incarnation,
            secret=self._lead.secret,
        )
        begin = time.monotonic()
        while True:
            if self._norms is None:
                address = self._lead.address
                self._norms = _NormChannel(address, self._access.connect_aio(address))
            used = self._norms
            call = used.connection.unary_unary(
                channel.method("Norm"), pb.NormRequest.SerializeToString, pb.NormReply.FromString
            )
            used.requests += 1
            try:
                patience = min(ASK_SECONDS, self._lease) if self._lead.several else ASK_SECONDS
                reply = await call(request, timeout=patience, metadata=self._access.metadata)
            except grpc.aio.AioRpcError as error:
                if not isinstance(failed := error_of(error, str(self._lead)), Unreachable | NotServing | WaitTimeout):
                    raise failed from None
                waited = time.monotonic() - begin
                if waited > self._norm_seconds:
                    raise WaitTimeout(
                        f"shard {self._shard} has waited for {waited:.1f} s for the lead at {self._lead} to say the "
                        f"norm of step {step}{f' of worker {worker}' if worker else ''} ({reason_of(error)})"
                    ) from None
                if self._norms is used:
                    self._norms = None
                if not isinstance(failed, WaitTimeout):  # ``follow`` finds out whether the lead is silent
                    self._lead.skip(used.address)
                await asyncio.sleep(RETRY_SECONDS)
            else:
                return None if reply.dropped else reply.square
            finally:
                used.requests -= 1
                if self._norms is not used and not used.requests:  # closing it earlier would cut off other requests
                    await used.connection.close()

    # -------------------------------------------------------------- reports

    async def report_kept(self, kept: Kept, seconds: float, wait: bool) -> bool:
        """Report what has become of this shard's part of a checkpoint.

        Args:
            kept: The part.
            seconds: Longest time to wait for the answer.
            wait: Whether to wait for a lead that cannot be reached.

        Returns:
            False if the lead has not answered within ``seconds``.
        """
        request = pb.KeptRequest(
            shard=kept.shard,
            version=kept.version,
            size=kept.size,
            sha256=kept.sha256,
            error=kept.error,
            incarnation=self._incarnation,
            secret=self._lead.secret,
        )
        try:
            async with self._access.connect_aio(self._lead.address) as connection:
                call = connection.unary_unary(
                    channel.method("Kept"), pb.KeptRequest.SerializeToString, pb.KeptReply.FromString
                )
                await call(request, timeout=seconds, wait_for_ready=wait, metadata=self._access.metadata)
        except grpc.aio.AioRpcError as error:
            log.debug("cannot report a checkpoint to the lead at %s: %s", self._lead, reason_of(error))
            return False
        return True

    async def send_trace(self, trace: Trace) -> bool:
        """Send all spans of this shard, with their times on the lead's clock.

        Returns:
            False if the lead does not answer.
        """
        request = pb.TraceRequest(shard=self._shard, incarnation=self._incarnation, secret=self._lead.secret)
        try:
            async with self._access.connect_aio(self._lead.address) as connection:
                call = connection.unary_unary(
                    channel.method("Trace"), pb.TraceRequest.SerializeToString, pb.TraceReply.FromString
                )
                offset, trips = (0, 0), list[RoundTrip]()
                while len(trips) < TRIPS:
                    sent = clock()
                    reply = await call(request, timeout=TRACE_SECONDS, metadata=self._access.metadata)
                    if reply.clock and reply.clock == clock_name():
                        break
                    trips.append(RoundTrip(sent, reply.now, clock()))
                else:
                    offset = estimate_offset(trips)
                request.part.CopyFrom(trace.part(*offset))
                await call(request, timeout=TRACE_SECONDS, metadata=self._access.metadata)
        except grpc.aio.AioRpcError as error:
            log.warning("cannot send the trace of this shard to the lead at %s: %s", self._lead, reason_of(error))
            return False
        return True

    # -------------------------------------------------------------- rosters

    async def follow(self, job: Job) -> None:
        """Feed every roster of the lead to ``job``, until cancelled.

        Raises:
            Restarted: The lead was started anew without this shard, which can do nothing more.
        """
        lead, access = self._lead, self._access
        while True:
            asked = lead.address
            async with access.connect_aio(asked) as connection:
                alive = asyncio.create_task(_until_silent(Peer(asked, connection, access), self._lease / 2))
                watching = asyncio.create_task(self._watch(job, connection))
                try:
                    await asyncio.wait({alive, watching}, return_when=asyncio.FIRST_COMPLETED)
                    reason = watching.result() if watching.done() else "it is silent"
                finally:
                    alive.cancel()
                    watching.cancel()
                    await asyncio.gather(alive, watching, return_exceptions=True)  # before their channel is closed
            if self._stopped:
                log.info("the lead at %s has ended: %s", asked, self._stopped)
            elif self._heard and lead.several:
                log.warning("lost the lead at %s (%s); looking for the one that serves", asked, reason)
            elif self._heard:
                why = await asyncio.to_thread(tls_probe.explain_failure, lead.address, access.tls, PROBE_SECONDS)
                log.warning("lost the lead at %s (%s); trying again", lead, why or reason)
            self._lost = self._lost or (self._heard and not self._stopped)
            self._heard, self._stopped = False, ""
            if lead.several:
                lead.skip(asked)
            await asyncio.sleep(RETRY_SECONDS)

    async def _watch(self, job: Job, connection: grpc.aio.Channel) -> str:
        """Take rosters until the stream ends. Returns why it has ended.

        Raises:
            Restarted: See ``follow``.
        """
        watch = connection.unary_stream(
            channel.method("WatchRoster"), pb.WatchRequest.SerializeToString, pb.RosterView.FromString
        )
        request = pb.WatchRequest(incarnation=self._incarnation, shard=self._shard, secret=self._lead.secret)
        try:
            async for view in watch(request, metadata=self._access.metadata):
                self._heard = True
                if self._lost:
                    log.info("found the lead again, at %s", self._lead.address)
                    self._lost = False
                if view.stopped:
                    self._stopped = view.stopped
                    break
                self._lead.learn(view.lead)
                job.follow(_roster_of(view))
        except grpc.aio.AioRpcError as error:
            if isinstance(error_of(error, str(self._lead.address)), Restarted):
                where = self._lead.address
                raise Restarted(
                    f"the lead at {where} was started anew, without what this shard has trained; {TOGETHER}"
                ) from None
            return reason_of(error)
        return "it has ended the stream"


async def _until_silent(lead: Peer, seconds: float) -> None:
    """Return when the lead has not answered within ``seconds``."""
    while True:
        try:
            await lead.describe(seconds)
        except PsError:
            return
        await asyncio.sleep(seconds)


def _roster_of(view: pb.RosterView) -> Roster:
    members = [
        Member(m.worker, m.session, m.rank if m.HasField("rank") else None, m.first_step, m.digest, m.seeds)
        for m in view.member
    ]
    return Roster(view.epoch, tuple(members), view.open, view.cut)
