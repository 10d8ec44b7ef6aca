"""How the other shards follow the lead: one WatchRoster stream, opened again whenever it breaks.

Until the stream is back the shard goes on with the roster it has; pushes of a newer epoch are parked by the core. Every
try is a new channel, made with the certificates and the token as they are then.
"""

import asyncio
import logging
import time
from dataclasses import dataclass

import grpc

from torch_ps.common.errors import NotServing, Restarted, Unreachable, WaitTimeout
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.rpc import channel
from torch_ps.common.rpc.credentials import Access
from torch_ps.common.rpc.status import error_of
from torch_ps.common.security import tls_probe as probe
from torch_ps.common.trace import TRIPS, RoundTrip, Trace, clock, clock_name, estimate_offset
from torch_ps.common.wire.address import Address
from torch_ps.ps.cluster.describe import describe
from torch_ps.ps.core.effects import Group
from torch_ps.ps.core.incarnation import TOGETHER
from torch_ps.ps.core.roster import Member, Roster
from torch_ps.ps.engine.grad_clip import RequestNorm
from torch_ps.ps.engine.state import Kept, ReportKept
from torch_ps.ps.job.job import Job
from torch_ps.ps.job.lead_address import LeadAddress
from torch_ps.ps.observability.trace_collector import Send

log = logging.getLogger("torch_ps.ps")

RETRY_SECONDS = 0.5
#: Seconds after which a question that the lead has not answered is asked again.
ASK_SECONDS = 30.0
#: Seconds, and the lease twice, in which the lead has to answer with the norm over all shards.
NORM_SECONDS = 300.0
#: Seconds in which the lead's port has to show why a connection fails.
PROBE_SECONDS = 3.0
#: Seconds in which the lead has to say what its clock says, and to take a part of a trace.
TRACE_SECONDS = 10.0


@dataclass(eq=False, slots=True)
class _Line:
    """A connection to the lead, and how many questions are under way on it."""

    address: Address
    connection: grpc.aio.Channel
    questions: int = 0


def norms_of(
    lead: LeadAddress, shard: int, incarnation: int, access: Access, seconds: float, lease: float
) -> RequestNorm:
    """How ``shard`` asks the lead for the norm of an update. The lead answers when all shards have reported.

    Args:
        seconds: in which it has to; then the shard cannot go on.
        lease: seconds after which another one may be the lead.
    """
    lines: list[_Line] = []  # the one that new questions use, if there is one

    async def ask(group: Group, square: float) -> float | None:
        worker, session, step = group
        request = pb.NormRequest(
            shard=shard, worker=worker, session=session, step=step, square=square, incarnation=incarnation
        )
        begin = time.monotonic()
        while True:
            if not lines:
                lines.append(_Line(lead.address, access.connect_aio(lead.address)))
            line = lines[0]
            call = line.connection.unary_unary(
                channel.method("Norm"), pb.NormRequest.SerializeToString, pb.NormReply.FromString
            )
            line.questions += 1
            try:
                patience = min(ASK_SECONDS, lease) if lead.several else ASK_SECONDS
                reply = await call(request, timeout=patience, metadata=access.metadata)
            except grpc.aio.AioRpcError as error:
                if not isinstance(failed := error_of(error, str(lead)), Unreachable | NotServing | WaitTimeout):
                    raise failed from None
                waited = time.monotonic() - begin
                if waited > seconds:
                    raise WaitTimeout(
                        f"shard {shard} has waited for {waited:.1f} s for the lead at {lead} to say the norm of "
                        f"{f'step {step} of worker {worker}' if worker else f'step {step}'} ({error.details()})"
                    ) from None
                if line in lines:
                    lines.remove(line)
                if not isinstance(failed, WaitTimeout):  # whether it is silent ``follow`` finds out
                    lead.elsewhere(line.address)
                await asyncio.sleep(RETRY_SECONDS)
            else:
                return None if reply.dropped else reply.square
            finally:
                line.questions -= 1
                if line not in lines and not line.questions:  # to close it would end those of others without an answer
                    await line.connection.close()

    return ask


def report_to(lead: LeadAddress, incarnation: int, access: Access) -> ReportKept:
    """How a shard tells the lead what has become of its part of a checkpoint."""

    async def tell(kept: Kept, seconds: float) -> bool:
        request = pb.KeptRequest(
            shard=kept.shard,
            version=kept.version,
            size=kept.size,
            sha256=kept.sha256,
            error=kept.error,
            incarnation=incarnation,
        )
        try:
            async with access.connect_aio(lead.address) as connection:
                call = connection.unary_unary(
                    channel.method("Kept"), pb.KeptRequest.SerializeToString, pb.KeptReply.FromString
                )
                await call(request, timeout=seconds, wait_for_ready=True, metadata=access.metadata)
        except grpc.aio.AioRpcError as error:
            log.debug("the lead at %s does not hear of a checkpoint: %s", lead, error.details())
            return False
        return True

    return tell


def trace_to(lead: LeadAddress, shard: int, incarnation: int, access: Access) -> Send:
    """How a shard sends the lead its part of the trace."""

    async def send(trace: Trace) -> bool:
        request = pb.TraceRequest(shard=shard, incarnation=incarnation)
        try:
            async with access.connect_aio(lead.address) as connection:
                call = connection.unary_unary(
                    channel.method("Trace"), pb.TraceRequest.SerializeToString, pb.TraceReply.FromString
                )
                offset, trips = (0, 0), list[RoundTrip]()
                while len(trips) < TRIPS:
                    sent = clock()
                    reply = await call(request, timeout=TRACE_SECONDS, metadata=access.metadata)
                    if reply.clock and reply.clock == clock_name():
                        break
                    trips.append(RoundTrip(sent, reply.now, clock()))
                else:
                    offset = estimate_offset(trips)
                request.part.CopyFrom(trace.part(*offset))
                await call(request, timeout=TRACE_SECONDS, metadata=access.metadata)
        except grpc.aio.AioRpcError as error:
            log.warning("the lead at %s does not get the trace of this shard: %s", lead, error.details())
            return False
        return True

    return send


async def follow(job: Job, lead: LeadAddress, access: Access) -> None:
    """Feed every roster of the lead to ``job``, until cancelled.

    Raises:
        Restarted: the lead that answers was started without this shard, which can do nothing more.
    """
    connected = True
    while True:
        asked = lead.address
        async with access.connect_aio(asked) as connection:
            alive = asyncio.create_task(_until_silent(connection, access, job.lease / 2))
            watching = asyncio.create_task(_watch(job, lead, connection, access))
            try:
                await asyncio.wait({alive, watching}, return_when=asyncio.FIRST_COMPLETED)
                reason = watching.result() if watching.done() else "it is silent"
            finally:
                alive.cancel()
                watching.cancel()
                await asyncio.gather(alive, watching, return_exceptions=True)  # before their channel is closed
        if lead.several:
            log.warning("lost the lead at %s (%s); looking for the one that serves", asked, reason)
            lead.elsewhere(asked)
        elif connected:
            why = await asyncio.to_thread(probe.explain_failure, lead.address, access.tls, PROBE_SECONDS)
            log.warning("lost the lead at %s (%s); trying again", lead, why or reason)
        connected = False
        await asyncio.sleep(RETRY_SECONDS)


async def _watch(job: Job, lead: LeadAddress, connection: grpc.aio.Channel, access: Access) -> str:
    """Take rosters until the stream ends; says why.

    Raises:
        Restarted: see ``follow``.
    """
    watch = connection.unary_stream(
        channel.method("WatchRoster"), pb.WatchRequest.SerializeToString, pb.RosterView.FromString
    )
    request = pb.WatchRequest(incarnation=job.incarnation.number)
    try:
        async for view in watch(request, metadata=access.metadata):
            lead.told(view.lead)
            job.follow(_roster(view))
    except grpc.aio.AioRpcError as error:
        if isinstance(error_of(error, str(lead.address)), Restarted):
            raise Restarted(
                f"the lead at {lead.address} was started anew, without what this shard has trained; {TOGETHER}"
            ) from None
        return str(error.details())
    return "it has ended the stream"


async def _until_silent(connection: grpc.aio.Channel, access: Access, seconds: float) -> None:
    """Return when the lead has not answered within ``seconds``."""
    while True:
        try:
            await describe(connection, access, seconds)
        except grpc.aio.AioRpcError:
            return
        await asyncio.sleep(seconds)


def _roster(view: pb.RosterView) -> Roster:
    members = (Member(m.worker, m.session, m.rank if m.HasField("rank") else None, m.first_step) for m in view.member)
    return Roster(view.epoch, tuple(members), view.open, view.cut)
