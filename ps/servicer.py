"""The methods of the contract: decode, ask the job, encode. No decision is made here.

Exchange, the hot one, reads and writes raw frames; see ``torch_ps.common.frames``.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
from typing import Any

import grpc

from torch_ps.common import codecs, schema
from torch_ps.common.arena import offer_from_proto, offer_to_proto
from torch_ps.common.channel import SERVICE
from torch_ps.common.errors import CorruptFrame, NoSharedMemory, ProtocolError, PsError, WaitTimeout
from torch_ps.common.frames import messages, unpack, unpack_all
from torch_ps.common.memory import give_back_freed_memory
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.ps.core.roster import Roster
from torch_ps.ps.guard import guarded
from torch_ps.ps.job import Job
from torch_ps.ps.status import status_of_job
from torch_ps.ps.streams import Stream

#: Seconds that a call without a deadline of its own may wait.
DEFAULT_DEADLINE = 300.0
#: Seconds that a stream may take to say who it is.
HELLO_DEADLINE = 20.0

Context = grpc.aio.ServicerContext[Any, Any]


class Servicer:
    def __init__(self, job: Job) -> None:
        self._job = job

    def handlers(self) -> grpc.GenericRpcHandler:
        """Every method under its name in the contract."""

        def unary(method: Any, request: Any) -> Any:
            return grpc.unary_unary_rpc_method_handler(
                guarded(method, self._job.metrics), request.FromString, lambda reply: reply.SerializeToString()
            )

        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Describe": unary(self.describe, pb.DescribeRequest),
                "Join": unary(self.join, pb.JoinRequest),
                "Share": unary(self.share, pb.ShareRequest),
                "Leave": unary(self.leave, pb.LeaveRequest),
                "Status": unary(self.status, pb.StatusRequest),
                "Norm": unary(self.norm, pb.NormRequest),
                "Seed": grpc.stream_unary_rpc_method_handler(
                    guarded(self.seed, self._job.metrics), None, lambda reply: reply.SerializeToString()
                ),
                "Exchange": grpc.stream_stream_rpc_method_handler(
                    guarded(self.exchange, self._job.metrics), None, None
                ),
                "WatchRoster": grpc.unary_stream_rpc_method_handler(
                    guarded(self.watch_roster, self._job.metrics),
                    pb.WatchRequest.FromString,
                    lambda view: view.SerializeToString(),
                ),
            },
        )

    async def describe(self, request: pb.DescribeRequest, context: Context) -> pb.JobDescription:
        job = self._job
        return pb.JobDescription(
            mode=job.mode.name,
            mode_details=str(job.mode),
            shard=job.index,
            num_shards=job.num_shards,
            bucket_bytes=job.bucket_bytes,
            lease_seconds=job.lease,
            quorum=job.quorum,
            clip_norm=job.clip_norm,
            initialised=job.initialised,
            model=schema.to_proto(job.model) if job.model is not None else None,
            codec=codecs.names(),
        )

    async def join(self, request: pb.JoinRequest, context: Context) -> pb.JoinReply:
        left = context.time_remaining()
        session, seed = await self._job.join(
            request.worker,
            request.rank if request.HasField("rank") else None,
            schema.from_proto(request.model),
            DEFAULT_DEADLINE if left is None else left * 0.95,  # so that our reason arrives before the deadline
        )
        return pb.JoinReply(session=session, seed=seed, epoch=self._job.roster.epoch)

    async def share(self, request: pb.ShareRequest, context: Context) -> pb.ShareReply:
        try:
            offers = offer_from_proto(request.gradients), offer_from_proto(request.answers)
            parameters = await self._job.share(request.worker, request.session, *offers, dialled=request.dialled_port)
        except NoSharedMemory as error:  # not a mistake of the worker's: it asks because it cannot know
            return pb.ShareReply(reason=str(error))
        return pb.ShareReply(parameters=offer_to_proto(parameters))

    async def leave(self, request: pb.LeaveRequest, context: Context) -> pb.LeaveReply:
        self._job.leave(request.worker, request.session)
        return pb.LeaveReply()

    async def status(self, request: pb.StatusRequest, context: Context) -> pb.StatusReply:
        return status_of_job(self._job, time.monotonic())

    async def norm(self, request: pb.NormRequest, context: Context) -> pb.NormReply:
        group = (request.worker, request.session, request.step)
        square = await self._job.norm(group, request.shard, request.square)
        return pb.NormReply(dropped=square is None, square=square)

    async def seed(self, frames: AsyncIterator[bytes], context: Context) -> pb.SeedReply:
        worker = ""
        async for frame in frames:
            header, payload = unpack(frame, pb.SeedHeader)
            if not worker:
                worker = header.worker
                await self._job.begin_seed(worker, header.session, schema.from_proto(header.model))
            else:
                self._job.seed(header.bucket, payload)
        self._job.end_seed(worker)
        give_back_freed_memory()  # the frames that brought the parameters
        return pb.SeedReply()

    async def exchange(self, frames: AsyncIterator[bytes], context: Context) -> None:
        incoming = aiter(frames)
        first = unpack_all(await _first(incoming), pb.UpHeader)
        header, _ = next(first)
        if header.WhichOneof("kind") != "hello":
            raise CorruptFrame("the first frame of an Exchange has to be Hello")
        stream = await self._job.open(header.hello)
        self._take(stream, first)
        reading = asyncio.create_task(self._read(stream, incoming))
        writing = asyncio.create_task(_write(stream, context))
        try:
            done, _ = await asyncio.wait({reading, writing}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            reading.cancel()
            writing.cancel()
            self._job.close(stream)

    async def watch_roster(self, request: pb.WatchRequest, context: Context) -> None:
        queue: asyncio.Queue[Roster | None] = asyncio.Queue()
        queue.put_nowait(self._job.roster)
        self._job.watchers.add(queue)
        try:
            while (roster := await queue.get()) is not None:
                await context.write(roster_view(roster))
        finally:
            self._job.watchers.discard(queue)

    async def _read(self, stream: Stream, messages: AsyncIterator[bytes]) -> None:
        async for message in messages:
            self._job.heard(stream)
            self._take(stream, unpack_all(message, pb.UpHeader))

    def _take(self, stream: Stream, frames: Iterable[tuple[pb.UpHeader, memoryview]]) -> None:
        for header, payload in frames:
            match header.WhichOneof("kind"):
                case "push" if stream.worker is not None:
                    self._job.working().push(stream, header.push, payload)
                case "pull":
                    self._job.working().pull(stream, header.pull.bucket)
                case "renew":
                    pass
                case kind:
                    who = "an observer" if stream.worker is None else f"worker {stream.worker!r}"
                    raise ProtocolError(f"{who} cannot send {kind} here")


async def _first(frames: AsyncIterator[bytes]) -> bytes:
    try:
        async with asyncio.timeout(HELLO_DEADLINE):
            return await anext(frames, b"")
    except TimeoutError:
        raise WaitTimeout(f"no Hello came within {HELLO_DEADLINE:g} s of opening the stream") from None


async def _write(stream: Stream, context: Context) -> None:
    while True:
        for message in messages(await _waiting(stream.outbox)):
            await context.write(message)


async def _waiting(outbox: asyncio.Queue[bytes | PsError]) -> list[bytes]:
    """All frames that are there, at least one.

    Raises:
        PsError: it is next.
    """
    item = await outbox.get()
    frames: list[bytes] = []
    while isinstance(item, bytes):
        frames.append(item)
        if outbox.empty():
            return frames
        item = outbox.get_nowait()
    if not frames:
        raise item
    outbox.put_nowait(item)  # nothing comes after it that anybody could use
    return frames


def roster_view(roster: Roster) -> pb.RosterView:
    return pb.RosterView(
        epoch=roster.epoch,
        open=roster.open,
        member=[
            pb.RosterMember(worker=m.name, session=m.session, rank=m.rank, first_step=m.first_step)
            for m in roster.members
        ],
    )
