r"""A worker's life in a job: connect, join, seed if asked to, exchange buckets, leave.

    connect --> join --(seed)--> pull --> push, wait, push, wait, ... --> close
            \\-> observe --> pull, pull, ...

Rules of this file
  1. Knows buckets, versions and steps; knows neither models nor training loops (``client`` and ``optimizer`` do).
  2. Never asks for the mode: the servers say which step comes next and when it may go on.
  3. Which plane carries a bucket is decided here: memory where the shard shares some and the bucket's place is free.
  4. No wait without a deadline, and the error of a wait says who is waited for.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence

import torch

from torch_ps.common import codecs, schema
from torch_ps.common.allocator import keep_freed_memory
from torch_ps.common.codecs import Codec
from torch_ps.common.errors import (
    CorruptFrame,
    NotInitialised,
    PsError,
    Restarted,
    StepConflict,
    WaitTimeout,
)
from torch_ps.common.optimizer_spec import HyperValue, hyper_to_proto
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.plan import Bucket, Plan, plan
from torch_ps.common.rpc.credentials import OPEN, Access
from torch_ps.common.schema import Model
from torch_ps.common.trace import Trace, steps_of
from torch_ps.common.wire.address import Address
from torch_ps.common.wire.frames import Buffer, pack, unpack
from torch_ps.worker.gradients.compressor import Compressor
from torch_ps.worker.session.handshake import (
    check_arguments,
    describe_all,
    join_with_retry,
    retry_join,
    wait_for_quorum,
)
from torch_ps.worker.session.heartbeat import start_heartbeat
from torch_ps.worker.session.identity import Identity
from torch_ps.worker.session.outcome import BucketVersions, StepOutcome
from torch_ps.worker.session.reconnect import check, prepare
from torch_ps.worker.session.responses import OnValues, ResponseDecoder
from torch_ps.worker.session.sample_counts import SampleCounts
from torch_ps.worker.session.shard_streams import ShardStreams
from torch_ps.worker.session.shared_memory import SharedMemory
from torch_ps.worker.session.trace_upload import report
from torch_ps.worker.transport.link import Link
from torch_ps.worker.transport.retry import call_with_retry
from torch_ps.worker.transport.shard_servers import ShardServers
from torch_ps.worker.transport.wait_reasons import explain_wait

log = logging.getLogger("torch_ps.worker")

#: Seconds in which a server has to answer the first call.
CONNECT_SECONDS = 20.0


class Session:
    """The connection of one worker, or of an observer, to all shards of a job.

    Args:
        servers: for all shards, shard 0 first, the addresses of their servers.
        name: of the worker.
        compressor: of pushes.
        compress_pull: codec of pulls.
        plane: "auto" shares memory with the shards that can; "memory" insists on it; "network" shares none.
        timeout: seconds that a wait for other workers may take.
        access: how the servers are spoken to.

    Raises:
        ConfigError: an unknown codec, or the addresses are not those of one job's shards in order.
        Unreachable: a server does not answer.
    """

    def __init__(
        self,
        servers: Sequence[Sequence[Address]],
        name: str,
        *,
        compressor: Compressor,
        compress_pull: str,
        timeout: float,
        plane: str = "auto",
        access: Access = OPEN,
    ) -> None:
        check_arguments(timeout, plane)
        self.name, self.timeout, self._plane = name, timeout, plane
        self._compressor, self._pull_codec = compressor, codecs.make_codec(compress_pull)
        self._exchange: ShardStreams | None = None
        self.number = 0  # names this life of the worker; 0: it is not in the job
        self._versions = BucketVersions(0, epoch=0)
        self.sample_counts = SampleCounts()  # the samples that pushes are of
        self.wait_seconds, self.pushed_bytes, self.pulled_bytes = 0.0, 0, 0
        self._step = 0  # that was pushed last
        self._wait_failed = False  # the last wait has not come to its end
        self.on_values: OnValues = lambda bucket, values: None
        self.on_leave: Callable[[], None] = lambda: None
        keep_freed_memory()
        self._links = [Link(addresses[0], access, plane) for addresses in servers]
        self._shards = [ShardServers(link, addresses) for link, addresses in zip(self._links, servers, strict=True)]
        with contextlib.ExitStack() as stack:
            stack.callback(self._close_links)
            self.job = self._describe()
            self.trace = Trace(steps_of(self.job.trace))
            stack.pop_all()

    def _describe(self) -> pb.JobDescription:
        """What the job is; ServerStopped: it is not the one that this session has taken part in."""
        used = (self._compressor.codec.name, self._pull_codec.name)
        return describe_all(self._shards, used, CONNECT_SECONDS, self.job if self._exchange is not None else None)

    # -------------------------------------------------------------- joining

    def observe(self) -> Model:
        """Open the streams to pull only. Returns the job's model.

        Raises:
            NotInitialised: no worker has called init yet.
        """
        self.job = self._describe()
        if not self.job.initialised:
            at = self._links[0].address
            raise NotInitialised(f"the job at {at} has no parameters yet; a worker has to call init")
        model = schema.from_proto(self._links[0].model(self.timeout))
        self._start(model)
        return model

    def join(self, model: Model, rank: int | None, values: Callable[[Bucket], torch.Tensor]) -> None:
        """Become a worker of the job; sends the first parameters if the job has none yet.

        Args:
            values: gives the fp32 values of one bucket, shape (numel,), to seed the job with.

        Raises:
            ModelMismatch: the job trains another model.
            NameTaken: another worker has this name or rank.
            WaitTimeout: the first worker has not sent the parameters.
        """
        retry_join(lambda: self._join(model, rank, values), self._shards, self.job.lease_seconds)

    def _join(self, model: Model, rank: int | None, values: Callable[[Bucket], torch.Tensor]) -> None:
        if self._exchange is not None:
            self._exchange.close()  # of an earlier life, whose streams would have the name
        self.job = self._describe()
        reply = join_with_retry(self._links[0], self._identity.join(model, rank), self.timeout)
        self.number, self.first = reply.session, reply.seed
        for shard_servers in self._shards:
            shard_servers.life = self.name, self.number
        self.sample_counts.clear()
        self._start(model, reply.epoch)
        self.job_model = model
        if not reply.seed:
            self.job_model = schema.from_proto(self._links[0].model(self.timeout))
        else:
            for index in reversed(range(len(self._links))):  # the lead last: when it is ready, all are
                frames = self._identity.seeds(model, self.plan.of_shard(index), values)
                self._links[index].seed(frames, self.timeout)
        self.shared_memory.share(self._links, self.plan, self.name, self.number)

    def roster(self, *, seconds: float | None = None) -> pb.RosterView:
        """The roster of the lead, once the first quorum is complete.

        Raises:
            WaitTimeout: workers are missing after ``seconds``; says how many, and who is there.
        """
        return wait_for_quorum(self._shards[0], self.job, self.timeout if seconds is None else seconds)

    def _start(self, model: Model, epoch: int = 0) -> None:
        if self._exchange is not None:
            self._exchange.close()
        self.plan: Plan = plan(model, self.job.bucket_bytes, len(self._links))
        buckets = self.plan.buckets
        largest = max((b.numel for b in buckets), default=0)
        self._staging = torch.empty(largest, dtype=torch.float32, device="cpu")
        self._versions = BucketVersions(len(buckets), epoch)
        self.shared_memory = SharedMemory(self._plane)
        self._decoder = ResponseDecoder(buckets, len(self._links), self.shared_memory, self._pull_codec)
        self._exchange = ShardStreams(
            self._links,
            self._identity.hello(self._pull_codec.name),
            [bucket.shard for bucket in buckets],
            self.job.lease_seconds,
            self._receive,
            self._back,
            self._shards,
        )
        start_heartbeat(self._exchange, self._shards, self.name, self.number, self.job.lease_seconds)

    @property
    def _identity(self) -> Identity:
        return Identity(self.name, self.number, self.job.incarnation)

    def _back(self, shard: int, now: pb.JobDescription) -> None:
        """One shard answers again, and says what it is now."""
        link, buckets = self._links[shard], self.plan.of_shard(shard)
        check(link, now, self.job)
        prepare(self.shared_memory, self._streams, link, buckets, self.name, self.number)

    # -------------------------------------------------------------- buckets

    @property
    def version(self) -> int:
        """Optimizer steps that every bucket of this worker's copy has had."""
        return self._versions.version

    @property
    def versions(self) -> tuple[int, ...]:
        return tuple(self._versions.versions)

    def staging(self, bucket: Bucket) -> contextlib.AbstractContextManager[torch.Tensor]:
        """A tensor to build the gradient of one bucket in, shape (numel,), fp32, and to push it from.

        Where the bucket travels as it is through shared memory, this is the place from which the server reads it.
        """
        place = self.shared_memory.place(bucket) if self._compressor.leaves_alone(bucket) else None
        return contextlib.nullcontext(self._staging[: bucket.numel] if place is None else place)

    def push(
        self,
        bucket: Bucket,
        values: torch.Tensor,
        *,
        step: int,
        base: int,
        weight: float,
        hyper: Mapping[str, HyperValue] | None = None,
        momentum: Mapping[str, HyperValue] | None = None,
        missing: bool = False,
        nonfinite: bool = False,
        encoded: tuple[Codec, Sequence[Buffer]] | None = None,
    ) -> None:
        """Send one bucket's gradient, shape (numel,), which is overwritten. The answer comes in ``wait``.

        Args:
            encoded: its payload where a GPU has made it; None: the compressor makes it here.
            momentum: hyperparameters of SGD's momentum, where the compressor computes it.
            missing: the gradient is zero because there is none; the server steps the bucket only if another has one.
            nonfinite: the weight is 0 because a gradient of this step is not finite; the server counts it.
        """
        # What is missing may not be applied, so nothing of the residual goes with it.
        part, trace, self._step = 0.0 if missing else weight, self.trace, step
        with trace.span("encode", step, bucket.index):
            codec, parts = encoded or self._compressor.encode(bucket, values, step=step, weight=part, momentum=momentum)
        header = pb.Push(
            step=step,
            bucket=bucket.index,
            base=base,
            weight=weight,
            codec=codec.name,
            epoch=self._versions.epoch,
            hyper=hyper_to_proto(hyper) if hyper else None,
            missing=missing,
            nonfinite=nonfinite,
        )
        if bucket.index == 0:
            header.covers.extend(self.sample_counts.taken())
        size = sum(map(len, parts))
        self.pushed_bytes += size
        with trace.span("send", step, bucket.index):
            if self.shared_memory.put(bucket, step, values, parts):
                header.arena_bytes, parts = size, ()
            self._streams.send(bucket.index, pack(pb.UpHeader(push=header), parts))

    def pull(self, bucket: Bucket) -> None:
        """Ask for one bucket's parameters. The answer comes in ``wait``."""
        self._streams.send(bucket.index, pack(pb.UpHeader(pull=pb.Pull(bucket=bucket.index))))

    def discard_unanswered(self) -> None:
        """Before a push or pull of all buckets: forget what a wait that failed or was interrupted has left.

        An answer on its way would be taken for one to what is sent next, and every later step end one too early.
        """
        if self._wait_failed:
            self._streams.reset(self._identity.hello(self._pull_codec.name))
            self._wait_failed = False

    @property
    def next_step(self) -> int:
        """The step that this worker pushes next."""
        return self._versions.next_step

    def wait(self) -> StepOutcome:
        """Wait until everything that was sent is answered.

        Raises:
            WaitTimeout: not within ``timeout``; says who is waited for.
            PsError: what ended a stream, such as ``StepConflict``. The session can go on with another pull.
        """
        self.wait_for(None)
        return self._versions.outcome()

    def wait_for(self, buckets: Collection[int] | None) -> None:
        """Wait until these buckets, None: all, are answered, if they were sent; ``wait`` says what the answers were.

        Raises:
            WaitTimeout, PsError: as in ``wait``.
        """
        begin, self._wait_failed = time.monotonic(), True
        try:
            with self.trace.span("wait", self._step), self._streams.changed:
                done = self._streams.wait(self.timeout, buckets)
        except StepConflict as error:
            if isinstance(error, Restarted):
                self.job = self._describe()
                for shard in range(len(self._links)):
                    self._back(shard, self.job)
            self.discard_unanswered()
            raise
        finally:
            self.wait_seconds += time.monotonic() - begin
        self._wait_failed = not done
        if not done:
            raise WaitTimeout(
                f"worker {self.name!r} has waited {self.timeout:g} s for step {self.version}: "
                + explain_wait(self.name, self._links)
            )

    @property
    def waiting(self) -> bool:
        """Whether an answer may still come; after an error that ended a stream none is waited for."""
        return self._streams.waiting

    @property
    def _streams(self) -> ShardStreams:
        if self._exchange is None:
            raise NotInitialised(f"worker {self.name!r} has not joined the job")
        return self._exchange

    def _receive(self, shard: int, header: pb.DownHeader, payload: memoryview) -> None:
        """On the reader thread of one shard."""
        if header.bucket >= len(self.plan.buckets):
            raise CorruptFrame(f"server {self._links[shard].address} sent bucket {header.bucket}, which does not exist")
        bucket, step = self.plan.buckets[header.bucket], header.step if header.HasField("step") else -1
        with self.trace.span("receive", step, bucket.index):
            version, size = self._decoder.take(header, payload, self.on_values, self.trace, step)
        if header.HasField("step") and not header.applied:
            self._put_back(bucket, header.step)
        with self._streams.changed:
            self._versions.take(header, version)
            self.pulled_bytes += size
            if header.HasField("step"):
                self.shared_memory.answered(bucket, header.step)
            self._streams.answered(bucket.index)

    def _put_back(self, bucket: Bucket, step: int) -> None:
        """The push of ``step`` was dropped; its answer is taken once, so it goes back once."""
        frame = self._streams.unanswered(bucket.index)
        header, payload = unpack(frame, pb.UpHeader) if frame else (pb.UpHeader(), memoryview(b""))
        if header.HasField("push") and header.push.step == step and header.push.weight:
            if header.push.HasField("arena_bytes"):
                payload = self.shared_memory.payload(bucket, header.push.arena_bytes)
            self._compressor.dropped(bucket, codecs.codec(header.push.codec), payload)

    def request_samples(self, request: pb.DataRequest) -> pb.DataReply:
        """Ask the lead, again while the connection is broken; its WaitTimeout says who has what is left."""
        request.worker, request.session = self.name, self.number
        lead, lease = self._shards[0], self.job.lease_seconds
        return call_with_retry(lambda: lead.link.data(request, self.timeout), lead.patience(lease))

    # -------------------------------------------------------------- the end

    def close(self) -> None:
        """Leave the roster and close all connections. Never raises for a server that is gone."""
        self.on_leave()
        if self._exchange is not None:
            self._exchange.close()
        if self.number:
            self.report()
            try:
                self._links[0].leave(pb.LeaveRequest(worker=self.name, session=self.number), 5.0)
            except PsError as error:
                log.info("could not take leave of the job: %s", error)
            self.number = 0
        self._close_links()

    def report(self) -> None:
        """Send the lead what was traced so far, if anything was. Never raises for a server that is gone."""
        if len(self.trace.spans) > self.trace.given:
            report(self.trace, self._links[0], self._identity)

    def _close_links(self) -> None:
        for link in self._links:
            link.close()
