"""The methods of the gRPC contract: decode the request, call the job, encode the reply. They decide nothing.

    unary call --admission--> request --> job --> reply
    Exchange   --admission--> Hello --> Stream;  carrier --frames--> engine --frames--> outbox --> carrier

Exchange carries the gradients and parameters; it reads and writes raw frames (``torch_ps.common.wire.frames``).
"""

import functools
import time
from collections.abc import AsyncIterable, Iterator
from contextlib import aclosing
from typing import Any

import grpc

from torch_ps.common import codecs, schema, version
from torch_ps.common.allocator import give_back_freed_memory
from torch_ps.common.arena import offer_to_proto
from torch_ps.common.errors import (
    CorruptFrame,
    NoSharedMemory,
    NotServing,
    Overloaded,
    ProtocolError,
)
from torch_ps.common.memory_limit import memory
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.rpc.channel import SERVICE
from torch_ps.common.trace import clock, clock_name, steps_to_proto
from torch_ps.common.wire import ballots
from torch_ps.common.wire.frames import Frame
from torch_ps.ps.engine.engine import Engine
from torch_ps.ps.engine.shard_state import Kept
from torch_ps.ps.job.sample_requests import data_set
from torch_ps.ps.job.status import roster_view
from torch_ps.ps.server.parts import Parts
from torch_ps.ps.transport import limits
from torch_ps.ps.transport.boundary import read_frames, read_request, read_seed_frame
from torch_ps.ps.transport.carrier import Carrier
from torch_ps.ps.transport.error_mapping import map_errors, serve_exchange
from torch_ps.ps.transport.first_messages import Admission, host_of
from torch_ps.ps.transport.grpc_carrier import GrpcCarrier, messages_of
from torch_ps.ps.transport.limits import Rate
from torch_ps.ps.transport.socket_listeners import DataPort, UnixListener
from torch_ps.ps.transport.streams import Stream

#: Seconds that a call without a deadline of its own may wait.
DEFAULT_DEADLINE = 300.0
#: Seconds from the opening of an Exchange to its Hello.
HELLO_DEADLINE = 10.0
#: Seconds from the opening of a call to its one request.
REQUEST_DEADLINE = 20.0
#: Traffic renews a lease at most this many times in the lease's length, so a lease ends at most 1/64 early.
RENEWALS = 64

#: Requests that a server accepts although it does not serve the shard.
OPEN_TO_ALL = ("DescribeRequest", "StatusRequest", "BallotRequest")

Context = grpc.aio.ServicerContext[Any, Any]
Frames = Iterator[tuple[pb.UpHeader, memoryview]]


class Servicer:
    """The methods of one shard.

    Args:
        parts: The shard.
        port: Port at which it listens.
        data_port: Its data port; None: it has none.
        max_model: Largest size of parameters and optimizer state of this shard, in bytes.
        options: Options of this server for a standby, as JSON.
    """

    def __init__(
        self, parts: Parts, *, port: int, max_model: int, data_port: DataPort | None = None, options: str = "{}"
    ) -> None:
        self._parts, self._job, self._driver = parts, parts.job, parts.driver
        self._port, self._max_model, self._options = port, max_model, options
        self._max_workers = parts.job.settings.max_workers
        self._hellos, self._requests = Admission(), Admission()  # two, so that silent streams do not block ps-status
        self._joins = Rate(limits.JOIN_BURST, limits.JOINS_PER_SECOND)
        self._joining = self._observing = 0
        self._most_streams = 4 * self._max_workers
        self._unix = UnixListener(self._serve_exchange, self._most_streams)
        self._data_port = data_port

    def listen(self) -> None:
        """Accept streams on sockets from now on."""
        self._unix.listen()
        if self._data_port is not None:
            self._data_port.listen(self._serve_exchange, self._most_streams)

    def stop_listening(self) -> None:
        """Accept none any more; those that are open go on."""
        self._unix.close()
        if self._data_port is not None:
            self._data_port.close()

    def handlers(self) -> grpc.GenericRpcHandler:
        """Handlers of all methods, by their names in the contract."""
        metrics = self._job.metrics

        def unary(method: Any, request: Any) -> Any:
            return grpc.stream_unary_rpc_method_handler(
                map_errors(self._read_request(method, request), metrics), None, lambda reply: reply.SerializeToString()
            )

        async def exchange(frames: AsyncIterable[bytes], context: Context) -> None:
            await self._serve_exchange(GrpcCarrier(frames, context))

        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Describe": unary(self.describe, pb.DescribeRequest),
                "Enter": unary(self.enter, pb.EnterRequest),
                "Join": unary(self.join, pb.JoinRequest),
                "Share": unary(self.share, pb.ShareRequest),
                "Renew": unary(self.renew, pb.RenewRequest),
                "Leave": unary(self.leave, pb.LeaveRequest),
                "Data": unary(self.data, pb.DataRequest),
                "Status": unary(self.status, pb.StatusRequest),
                "Norm": unary(self.norm, pb.NormRequest),
                "Kept": unary(self.kept, pb.KeptRequest),
                "Ballot": unary(self.ballot, pb.BallotRequest),
                "Trace": unary(self.trace, pb.TraceRequest),
                "Replicate": grpc.stream_stream_rpc_method_handler(map_errors(self.replicate, metrics), None, None),
                "Seed": grpc.stream_unary_rpc_method_handler(
                    map_errors(self.seed, metrics), None, lambda reply: reply.SerializeToString()
                ),
                "Commit": grpc.stream_unary_rpc_method_handler(
                    map_errors(self.commit, metrics), None, lambda reply: reply.SerializeToString()
                ),
                "Exchange": grpc.stream_stream_rpc_method_handler(exchange, None, None),
                "WatchRoster": grpc.stream_stream_rpc_method_handler(
                    map_errors(self._read_request(self.watch_roster, pb.WatchRequest), metrics),
                    None,
                    lambda view: view.SerializeToString(),
                ),
            },
        )

    def _read_request(self, method: Any, request: Any) -> Any:
        """Handler of a stream of one message, which reads the request and calls ``method`` with it."""

        @functools.wraps(method)
        async def call(frames: AsyncIterable[bytes], context: Context) -> Any:
            name = request.DESCRIPTOR.name
            async with aclosing(messages_of(frames)) as incoming:  # closed, as it holds its last message
                message = await self._requests.read_first(
                    lambda: anext(incoming, b""), context.peer(), REQUEST_DEADLINE, name
                )
            asked = read_request(message, request)
            del message
            if name not in OPEN_TO_ALL:
                self._check_serving()
            return await method(asked, context)

        return call

    async def describe(self, request: pb.DescribeRequest, context: Context) -> pb.JobDescription:
        job, settings = self._job, self._job.settings
        return pb.JobDescription(
            mode=settings.mode.name,
            mode_details=str(settings.mode),
            shard=settings.index,
            num_shards=settings.num_shards,
            bucket_bytes=settings.bucket_bytes,
            lease_seconds=settings.lease,
            quorum=settings.quorum,
            clip_norm=job.clipping.norm,
            averages=not settings.mode.stale,
            initialised=job.seeding.initialised,
            resumed_version=job.resumed_version,
            options=self._options,
            configuration=ballots.configuration_to_proto(self._driver.seat.configuration),
            closed=self._parts.replication_status.closed,
            version=version.current(),
            incarnation=job.incarnation.number,
            trace=steps_to_proto(job.trace.steps),
            model=schema.to_proto(job.model) if request.model and job.model is not None else None,
            codec=codecs.names(),
            socket=self._unix.offer(self._port),
            data_port=self._data_port.offer(self._port) if self._data_port is not None else None,
        )

    async def enter(self, request: pb.EnterRequest, context: Context) -> pb.EnterReply:
        job = self._job
        version.check(f"shard {request.shard}", request.version, "the lead")
        host = host_of(context.peer())
        self._parts.registrar.register(request.shard, request.num_shards, request.secret, host)
        steps = steps_to_proto(job.trace.steps)
        return pb.EnterReply(
            incarnation=job.incarnation.number,
            resumed_version=job.resumed_version,
            trace=steps,
            version=version.current(),
        )

    async def join(self, request: pb.JoinRequest, context: Context) -> pb.JoinReply:
        self._joins.take(host_of(context.peer()), time.monotonic())
        if self._joining >= self._max_workers:
            raise Overloaded(f"{self._joining} workers wait for the first parameters, as many as --max-workers allows")
        seconds, who = _seconds(context), f"worker {request.worker!r}"
        self._joining += 1
        try:
            with version.naming_the_unversioned(who, request.version, f"shard {self._job.settings.index}"):
                self._job.incarnation.check(request.incarnation, who)
                model = self._model(request.model)
                request.ClearField("model")
                rank = request.rank if request.HasField("rank") else None
                session, seed = await self._job.join(request.worker, rank, model, request.secret, seconds)
            self._job.incarnation.close()
        finally:
            self._joining -= 1
        return pb.JoinReply(session=session, seed=seed, epoch=self._job.roster.epoch)

    async def share(self, request: pb.ShareRequest, context: Context) -> pb.ShareReply:
        try:
            parameters = await self._parts.connections.share(request)
        except NoSharedMemory as error:  # no mistake of the worker, which cannot know before it tries
            return pb.ShareReply(reason=str(error))
        return pb.ShareReply(parameters=offer_to_proto(parameters))

    async def renew(self, request: pb.RenewRequest, context: Context) -> pb.RenewReply:
        if request.incarnation:
            self._job.incarnation.check(request.incarnation, f"worker {request.worker!r}")
        if request.worker and self._job.membership is not None:  # another shard only shows that it lives
            self._job.speakers.check(request.worker, request.session, request.secret)
        self._parts.connections.renew(request.worker or None, request.session)
        return pb.RenewReply()

    async def leave(self, request: pb.LeaveRequest, context: Context) -> pb.LeaveReply:
        if self._job.lead.roster.member(request.worker) is not None:
            self._job.speakers.check(request.worker, request.session, request.secret)
        self._job.leave(request.worker, request.session)
        return pb.LeaveReply()

    async def data(self, request: pb.DataRequest, context: Context) -> pb.DataReply:
        core = self._job.working().core
        self._job.speakers.check(request.worker, request.session, request.secret)
        if request.give_back:
            core.return_samples(request.worker, request.session, data_set(request.data), request.received)
            self._job.sample_requests.wake()
            await self._job.until_samples_recorded()
            return pb.DataReply()
        reply = await self._job.sample_requests.ask(core, request, _seconds(context))
        await self._job.until_samples_recorded()
        return reply

    async def status(self, request: pb.StatusRequest, context: Context) -> pb.StatusReply:
        return self._parts.status.reply(time.monotonic())

    async def norm(self, request: pb.NormRequest, context: Context) -> pb.NormReply:
        self._job.incarnation.check(request.incarnation, f"shard {request.shard}")
        self._parts.registrar.check(request.shard, request.secret)
        group = (request.worker, request.session, request.step)
        square = await self._job.clipping.report(group, request.shard, request.square)
        return pb.NormReply(dropped=square is None, square=square)

    async def kept(self, request: pb.KeptRequest, context: Context) -> pb.KeptReply:
        self._job.incarnation.check(request.incarnation, f"shard {request.shard}")
        self._parts.registrar.check(request.shard, request.secret)
        checkpointer = self._parts.checkpointer
        if checkpointer is None:
            raise ProtocolError(
                f"shard {request.shard} keeps checkpoints, the lead does not; give all the same --checkpoint"
            )
        checkpointer.take_report(Kept(request.shard, request.version, request.size, request.sha256, request.error))
        return pb.KeptReply()

    async def ballot(self, request: pb.BallotRequest, context: Context) -> pb.BallotReply:
        driver = self._driver
        self._job.speakers.check(request.worker, request.session, request.secret)
        return pb.BallotReply(
            ballot=driver.ballot(request),
            closed=self._parts.replication_status.closed,
            configuration=ballots.configuration_to_proto(driver.seat.configuration),
        )

    async def trace(self, request: pb.TraceRequest, context: Context) -> pb.TraceReply:
        job, who = self._job, f"worker {request.worker!r}" if request.worker else f"shard {request.shard}"
        job.incarnation.check(request.incarnation, who)
        if request.HasField("part"):
            if request.worker:
                job.speakers.check(request.worker, request.session, request.secret)
            else:
                self._parts.registrar.check(request.shard, request.secret)
            job.trace.take(request)
        return pb.TraceReply(clock=clock_name(), now=clock())

    async def replicate(self, frames: AsyncIterable[bytes], context: Context) -> None:
        self._check_serving()
        async with aclosing(messages_of(frames)) as messages:
            hello = await self._hellos.read_first(
                lambda: anext(messages, b""), context.peer(), HELLO_DEADLINE, "ReplicaHello"
            )
            await self._parts.replication.serve(hello, messages, context.write)

    def _check_serving(self) -> None:
        if closed := self._parts.replication_status.closed:
            raise NotServing(closed)

    async def seed(self, frames: AsyncIterable[bytes], context: Context) -> pb.SeedReply:
        self._check_serving()
        async with aclosing(messages_of(frames)) as incoming:
            first = await self._requests.read_first(
                lambda: anext(incoming, b""), context.peer(), REQUEST_DEADLINE, "Seed"
            )
            if not first:
                raise CorruptFrame(f"a Seed to shard {self._job.settings.index} has no frame")
            header, _ = read_seed_frame(first)
            del first
            self._job.incarnation.check(header.incarnation, f"worker {header.worker!r}")
            model = self._model(header.model)
            seed = await self._parts.seeds.begin(header.worker, header.session, header.secret, model)
            async for frame in incoming:
                header, payload = read_seed_frame(frame)
                seed.take(header.bucket, payload)
        self._parts.seeds.end(seed)
        give_back_freed_memory()  # the frames that brought the parameters
        return pb.SeedReply()

    async def commit(self, frames: AsyncIterable[bytes], context: Context) -> pb.CommitReply:
        async with aclosing(messages_of(frames)) as incoming:
            message = await self._requests.read_first(
                lambda: anext(incoming, b""), context.peer(), REQUEST_DEADLINE, "Commit"
            )
        self._check_serving()
        copies = read_frames(message, "a copy of a push")
        hello = next(copies)[0].hello
        self._job.incarnation.check(hello.incarnation, f"worker {hello.worker!r}")
        stream = self._parts.connections.find(hello.worker, hello.session)
        if stream is None:  # not open yet, or broken: the pushes come with it
            return pb.CommitReply()
        self._job.speakers.check(hello.worker, hello.session, hello.secret)
        for header, payload in copies:
            if not (header.HasField("push") and header.push.HasField("ahead")):
                raise ProtocolError("Commit takes Hello, then pushes of gradients that were sent ahead")
            self._working(stream).push(stream, header.push, payload, copy=True)
        return pb.CommitReply()

    async def exchange(self, carrier: Carrier) -> None:
        """Serve one Exchange until the peer ends it.

        Raises:
            PsError: the reason why this server ends it.
        """
        self._check_serving()
        stream, rest = await self._open_stream(carrier)
        stream.carrier, stream.carrier_reason = carrier.kind, carrier.reason
        carrier.speaker = "an observer" if stream.worker is None else f"worker {stream.worker!r}"
        stream.by_reference = carrier.by_reference
        self._observing += stream.worker is None
        try:
            self._handle(stream, rest)
            await carrier.carry(stream, functools.partial(self._on_message, stream))
        finally:
            self._observing -= stream.worker is None
            self._parts.connections.close(stream)

    async def _serve_exchange(self, carrier: Carrier) -> None:
        await serve_exchange(self.exchange, carrier, self._job.metrics)

    async def _open_stream(self, carrier: Carrier) -> tuple[Stream, Frames]:
        """Read the Hello; returns its stream and the frames that share its message."""
        message = await self._hellos.read_first(carrier.receive, carrier.peer, HELLO_DEADLINE, "Hello")
        frames = read_frames(message)
        header, _ = next(frames)
        if header.WhichOneof("kind") != "hello":
            raise CorruptFrame("the first frame of an Exchange has to be Hello")
        worker = header.hello.worker
        who = f"worker {worker!r}" if worker else "an observer"
        if not worker and self._observing >= limits.MAX_OBSERVERS:
            raise Overloaded(f"{self._observing} observers look on already, as many as may; try again later")
        with version.naming_the_unversioned(who, header.hello.version, f"shard {self._job.settings.index}"):
            self._job.incarnation.check(header.hello.incarnation, who)
            stream = await self._parts.connections.open(header.hello)
        if worker:
            self._job.incarnation.close()
        return stream, frames

    async def watch_roster(self, request: pb.WatchRequest, context: Context) -> None:
        if request.incarnation:
            self._job.incarnation.check(request.incarnation, "a shard")
        registrar = self._parts.registrar
        with self._job.rosters.watch() as queue, registrar.following(request.shard, request.secret):
            while (roster := await queue.get()) is not None:
                view = roster_view(roster)
                view.lead.extend(self._driver.addresses)
                await context.write(view)
        rosters = self._job.rosters
        if rosters.end is not None and rosters.ended_well:
            await context.write(pb.RosterView(stopped=f"shard {self._job.settings.index} was stopped"))
        elif rosters.end is not None:
            raise rosters.end

    def _model(self, message: pb.Model) -> schema.Model:
        """Decode a model and check that this shard has room for it."""
        model, settings = schema.from_proto(message), self._job.settings
        limits.check_model(
            model, num_shards=settings.num_shards, bucket_bytes=settings.bucket_bytes, most_bytes=self._max_model
        )
        limits.check_room(model, memory(), num_shards=settings.num_shards, is_held=self._job.engine is not None)
        return model

    def _on_message(self, stream: Stream, message: Frame) -> None:
        """Handle one message of an open stream, which also renews the worker's lease."""
        now = time.monotonic()
        if now >= stream.renew_at:
            stream.renew_at = now + self._job.settings.lease / RENEWALS
            self._parts.connections.renew(stream.worker, stream.session)
        self._handle(stream, read_frames(message, f"worker {stream.worker!r}" if stream.worker else "an observer"))

    def _handle(self, stream: Stream, frames: Frames) -> None:
        job = self._job
        for header, payload in frames:
            match header.WhichOneof("kind"):
                case "push" if stream.worker is not None:
                    with job.trace.span("receive", header.push.step, header.push.bucket, stream.worker):
                        self._working(stream).push(stream, header.push, payload)
                    if job.sample_requests.pending:
                        job.sample_requests.wake()
                case "ahead" if stream.worker is not None:
                    self._working(stream).gradient_ahead(stream, header.ahead, payload)
                    if job.sample_requests.pending:
                        job.sample_requests.wake()
                case "measure" if stream.worker is not None:
                    self._working(stream).measure(stream, header.measure, payload)
                case "pull":
                    stream.note_pull()
                    self._working(stream).pull(stream, header.pull.bucket)
                case "renew":
                    pass
                case "ballot" if stream.worker is not None:
                    self._driver.take_paper((stream.worker, stream.session), header.ballot)
                case kind:
                    who = "an observer" if stream.worker is None else f"worker {stream.worker!r}"
                    raise ProtocolError(f"{who} cannot send {kind} here")

    def _working(self, stream: Stream) -> Engine:
        """The engine, once it has the parameters; ``stream`` may then hold each bucket's response twice.

        Twice, as a worker may repeat a request after a timeout.

        Raises:
            NotInitialised: It has none yet.
        """
        engine = self._job.engine
        if engine is None or not self._job.seeding.initialised:
            engine = self._job.working()  # raises; asked only here, as this runs once per push
        stream.outbox.most = 2 * len(engine.buckets) * self._job.settings.bucket_bytes + limits.WORKER_BYTES
        return engine


def _seconds(context: Context) -> float:
    """Seconds that a call may wait: up to a second less than its deadline, so that the error arrives before it."""
    left = context.time_remaining()
    return DEFAULT_DEADLINE if left is None else left - min(left / 4, 1.0)
