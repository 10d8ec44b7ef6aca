r"""One session of a worker in a job: connect, join, seed if asked to, exchange buckets, leave.

    connect --> join --(seed)--> pull --> push, wait, push, wait, ... --> close
            \\-> observe --> pull, pull, ...

    push --compressor--> frame --> shard_streams.py --> server
    on_values <-- values <-- decompressor, or shared memory <-- answer <-- server

Rules of this file
  1. It knows buckets, versions and steps; it knows neither models nor training loops (``client.py`` and ``optim/`` do).
  2. It never asks for the mode: the servers say which step comes next and when it may go on.
  3. Shared memory carries a bucket if the shard shares some and the bucket's place is free, else the network does.
  4. Every wait has a deadline, and its error says who is waited for.
"""

import contextlib
import functools
import logging
import secrets
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

from torch_ps.common import codecs, schema
from torch_ps.common.allocator import keep_freed_memory
from torch_ps.common.codecs import Codec
from torch_ps.common.codecs.plain import bytes_of
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
from torch_ps.common.trace import NOTHING, Trace, steps_of
from torch_ps.common.wire.address import Address
from torch_ps.common.wire.field_ranges import SECRET_BYTES
from torch_ps.common.wire.frames import Buffer, Frame, pack, split, unpack, unpack_all
from torch_ps.worker.gradients.compressor import Compressor, Decompressor
from torch_ps.worker.gradients.flat_tensors import empty_fp32
from torch_ps.worker.runtime.lifetime import Part, check_process, immortalise
from torch_ps.worker.session.ahead_match import number_if_same
from torch_ps.worker.session.answers import Progress, StepOutcome
from torch_ps.worker.session.dropped_pushes import DroppedPushes
from torch_ps.worker.session.handshake import (
    check_arguments,
    describe_all,
    join_with_retry,
    retry_join,
    wait_for_quorum,
)
from torch_ps.worker.session.heartbeat import start_heartbeat
from torch_ps.worker.session.identity import Identity
from torch_ps.worker.session.norm_questions import MeanNorm, NormQuestions
from torch_ps.worker.session.restore_memory import check_incarnation, restore_shared_memory
from torch_ps.worker.session.sample_counts import SampleCounts
from torch_ps.worker.session.shard_streams import ShardStreams
from torch_ps.worker.session.shared_memory import SharedMemory
from torch_ps.worker.session.trace_upload import upload_trace
from torch_ps.worker.transport.call_retry import call_with_retry
from torch_ps.worker.transport.link import Link
from torch_ps.worker.transport.shard_servers import ShardServers
from torch_ps.worker.transport.wait_reasons import advise_timeout, explain_wait, waited_for

log = logging.getLogger("torch_ps.worker")

#: Seconds in which the lead has to say whom workers wait for.
STATUS_SECONDS = 20.0
#: Bytes of an answer from which on it is worth while to receive it where it stays.
LARGE = 1 << 16
#: Seconds of a wait after which a worker of several models looks whether it is itself waited for.
LONG_WAIT_SECONDS = 1.0
#: Seconds in which the lead has to answer that the worker leaves.
LEAVE_SECONDS = 5.0

#: Takes the fresh fp32 values of one bucket, shape (numel,), which are valid during the call; on a reader thread,
#: or on the one that waits.
OnValues = Callable[[Bucket, torch.Tensor], None]


@dataclass(frozen=True, slots=True)
class Written:
    """What a training loop has written to parameters of one bucket.

    Attributes:
        pieces: positions of the pieces in the bucket, increasing.
        payload: their values, fp32, one piece after the other.
    """

    pieces: Sequence[int]
    payload: Buffer


class Session(Part):
    """The connection of one worker, or of an observer, to all shards of a job.

    Args:
        servers: addresses of the servers of each shard, shard 0 first.
        name: name of the worker.
        compressor: encodes what is pushed.
        compress_pull: codec of pulls.
        plane: "auto" shares memory with the shards that can; "memory" insists on it; "network" shares none; "grpc"
            shares none and uses no socket either.
        connections: number of connections to each server's data port that a stream goes over.
        timeout: seconds that a wait for the servers or for other workers may take.
        access: TLS and token settings.

    Attributes:
        number: number of this session; 0 if the worker is not in the job.
        job: what the servers say of the job.
        job_model: the job's model with the job's hyperparameters, once joined.
        first: whether this worker has given the job its first parameters.
        plan: buckets of the job, once joined or observing.
        shared_memory: memory shared with shards, once joined.
        sample_counts: samples that pushes cover.
        trace: spans of the steps that are traced; ``span`` adds one, as ``Trace.span``.
        on_values: function that takes the values of every answer; set it before the first ``pull``.
        on_long_wait: called every ``LONG_WAIT_SECONDS`` of a wait, without a lock; None for nothing to do meanwhile.
        answers_meanwhile: whether answers are to be taken while no thread waits for them; False where ``wait`` follows
            the pushes at once, which then reads small answers itself.
        on_leave: called before the session ends, while shared memory is still mapped.
        wait_seconds: seconds spent in ``wait`` so far.
        pushed_bytes: encoded gradients sent so far.
        pulled_bytes: encoded parameters received so far.
        ahead_bytes: encoded gradients sent ahead so far.
        used_bytes: those of them that a push has named.

    Raises:
        ConfigError: a codec does not exist, or the addresses are not those of one job's shards in order.
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
        connections: int = 1,
        access: Access = OPEN,
    ) -> None:
        check_arguments(timeout, plane, connections)
        check_process()
        self.name, self.timeout, self._plane = name, timeout, plane
        self._compressor, self._pull_codec = compressor, codecs.make_codec(compress_pull)
        self._shard_streams: ShardStreams | None = None
        self.number, self.first, self._secret = 0, False, b""
        self._progress = Progress(0, epoch=0)
        self.sample_counts = SampleCounts()
        self._norms = NormQuestions()
        self.shared_memory = SharedMemory(plane)
        self.wait_seconds, self.pushed_bytes, self.pulled_bytes = 0.0, 0, 0
        self.ahead_bytes, self.used_bytes, self._ahead_number = 0, 0, 0
        self._step = 0  # of the last push
        self._ended = ""  # why this session can do nothing any more
        self._wait_failed = False  # the last wait was interrupted or has failed, so answers may be under way
        self._abandoned = False  # they are ignored
        self.on_values: OnValues = lambda bucket, values: None
        self.answers_meanwhile = False
        self.on_leave: Callable[[], None] = lambda: None
        self.on_long_wait: Callable[[], None] | None = None
        keep_freed_memory()
        self._links = [Link(addresses[0], access, plane, connections) for addresses in servers]
        self._shards = [ShardServers(link, addresses) for link, addresses in zip(self._links, servers, strict=True)]
        with contextlib.ExitStack() as stack:
            stack.callback(self._close_links)
            self.job = self._describe()
            self._dropped = DroppedPushes(name, averages=self.job.averages)
            self.trace = Trace(steps_of(self.job.trace))
            self.span = self.trace.span if self.trace.steps else _no_span
            stack.pop_all()

    def _describe(self) -> pb.JobDescription:
        """Ask what the job is now; raises ServerStopped if it is not the one that this session has taken part in."""
        self.check_member()
        used = (self._compressor.codec.name, self._pull_codec.name)
        return describe_all(self._shards, used, self.timeout, self.job if self._shard_streams is not None else None)

    # -------------------------------------------------------------- joining

    def observe(self) -> Model:
        """Open the streams to pull only; returns the job's model.

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
            model: tensors and optimizer of this worker.
            rank: place of the worker in sums; None for the order of names.
            values: function that returns the fp32 values of one bucket, shape (numel,), to seed the job with.

        Raises:
            ModelMismatch: the job trains another model.
            NameTaken: another worker has this name or rank.
            WaitTimeout: the first worker has not sent the parameters.
        """
        self._secret = secrets.token_bytes(SECRET_BYTES)  # of one session, so the same where its Join is repeated
        retry_join(lambda: self._join(model, rank, values), self._shards, self.job.lease_seconds)

    def _join(self, model: Model, rank: int | None, values: Callable[[Bucket], torch.Tensor]) -> None:
        if self._shard_streams is not None:
            self._shard_streams.close()  # the earlier session's streams would hold the name
        self.job = self._describe()
        reply = join_with_retry(self._links[0], self.identity.join(model, rank), self.timeout)
        self.number, self.first = reply.session, reply.seed
        for shard in self._shards:
            shard.identity = self.name, self.number, self._secret
        self.sample_counts.clear()
        self._start(model, reply.epoch)
        self.job_model = model
        if not reply.seed:
            self.job_model = schema.from_proto(self._links[0].model(self.timeout))
        else:
            for index in reversed(range(len(self._links))):  # the lead last: when it is ready, all are
                frames = functools.partial(self.identity.seeds, model, self.plan.of_shard(index), values)
                self._links[index].seed(frames, self.timeout)
        self.shared_memory.share(self._links, self.plan, self.identity)

    def roster(self, *, seconds: float | None = None) -> pb.RosterView:
        """The roster of the lead, once the first quorum is complete.

        Args:
            seconds: longest time to wait; None for the session's ``timeout``.

        Raises:
            WaitTimeout: workers are missing after ``seconds``; says how many, and who is there.
        """
        self.check_member()
        return wait_for_quorum(self._shards[0], self.job, self.timeout if seconds is None else seconds)

    def _start(self, model: Model, epoch: int = 0) -> None:
        if self._shard_streams is not None:
            self._shard_streams.close()
        self.plan: Plan = plan(model, self.job.bucket_bytes, len(self._links))
        buckets = self.plan.buckets
        self._progress = Progress(len(buckets), epoch)
        self.shared_memory = SharedMemory(self._plane)
        self._decompressor = Decompressor(self._pull_codec, buckets)
        self._shard_streams = ShardStreams(
            self._shards,
            self.identity.hello(self._pull_codec.name),
            [bucket.shard for bucket in buckets],
            self.job.lease_seconds,
            self._receive,
            self._restore,
            self._place,
        )
        self._wait_failed = self._abandoned = False  # nothing that was under way comes on these streams
        self._shard_streams.open()  # known by then: a server may ask for a vote in its first message
        start_heartbeat(self._shard_streams, self._shards, self.identity, self.job.lease_seconds)

    @property
    def identity(self) -> Identity:
        """Who this session is to the servers, with the secret that shows it."""
        return Identity(self.name, self.number, self.job.incarnation, self._secret)

    def _restore(self, shard: int, now: pb.JobDescription) -> None:
        """Prepare a shard that answers again, and says what it is now, for its stream to be opened."""
        links = self._links  # there are none any more once it is closed, perhaps while a server comes back
        self.check_member()
        link, buckets = links[shard], self.plan.of_shard(shard)
        check_incarnation(link, now, self.job)
        restore_shared_memory(self.shared_memory, self._streams, link, buckets, self.identity)

    # -------------------------------------------------------------- buckets

    @property
    def version(self) -> int:
        """Optimizer steps that every bucket of this worker's copy has had."""
        return self._progress.versions.value

    def version_of(self, bucket: Bucket) -> int:
        """Optimizer steps that one bucket of this worker's copy has had."""
        return self._progress.versions[bucket.index]

    def staging(self, bucket: Bucket) -> contextlib.AbstractContextManager[torch.Tensor]:
        """A tensor to build the gradient of one bucket in, shape (numel,), fp32, and to push it from.

        If shared memory carries the bucket as it is, the tensor is the place from which the server reads. Else it is a
        tensor of its own, for it may be sent from there, again too, until it is answered.
        """
        memory, place = self.shared_memory, None
        if memory.shards and self._compressor.leaves_alone(bucket):
            place = memory.place(bucket)
        return contextlib.nullcontext(empty_fp32(bucket.numel) if place is None else place)

    def encode_in_place(self, bucket: Bucket, parts: Sequence[torch.Tensor]) -> tuple[Codec, Sequence[Buffer]] | None:
        """Codec and payload of a gradient that lies in ``parts``, flat fp32 tensors one after the other.

        If the payload is their memory, they must not change until the push is answered, or ``abandon`` was called.

        Returns:
            None if the values have to be copied, to ``staging``, before they are pushed.
        """
        return None if self.shared_memory.has(bucket.shard) else self._compressor.encode_parts(bucket, parts)

    def sends_ahead(self, bucket: Bucket) -> bool:
        """Whether the gradient of a bucket can travel ahead of its push.

        Shared memory has nothing to send, and error feedback, whose payloads are small, changes with every encoding.
        """
        return not self.shared_memory.has(bucket.shard) and self._compressor.repeats(bucket)

    def send_ahead(
        self,
        bucket: Bucket,
        values: torch.Tensor,
        *,
        step: int,
        encoded: tuple[Codec, Sequence[Buffer]] | None = None,
        reused: bool = False,
    ) -> None:
        """Send the gradient of one bucket for the server to hold. Only a ``push`` of the same bytes makes it count.

        Args:
            bucket: bucket of the gradient, one for which ``sends_ahead`` holds.
            values: gradient, shape (numel,), fp32; overwritten.
            step: step of the push that is to come.
            encoded: codec and payload if a GPU has made them; None if the compressor makes them here.
            reused: whether the caller changes ``values`` or the payload after the call.
        """
        with self.span("send ahead", step, bucket.index):
            codec, parts = encoded or self._compressor.encode(bucket, values, step=step, weight=1.0)
            self._ahead_number += 1
            header = pb.Ahead(bucket=bucket.index, number=self._ahead_number, codec=codec.name)
            size = sum(map(len, parts))
            self.pushed_bytes += size
            self.ahead_bytes += size
            self._streams.send_ahead(bucket.index, (pack if reused else split)(pb.UpHeader(ahead=header), parts))

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
        absent: Sequence[int] = (),
        written: Written | None = None,
        nonfinite: bool = False,
        encoded: tuple[Codec, Sequence[Buffer]] | None = None,
        reused: bool = False,
    ) -> None:
        """Send the gradient of one bucket; ``wait`` waits for the answer.

        What has been sent ahead and still is the same is not sent again: the push names it, and overtakes what waits.

        Args:
            bucket: bucket of the gradient.
            values: gradient, shape (numel,), fp32; overwritten. With ``encoded`` nothing of it is read.
            step: step of the push.
            base: version of the parameters that the gradient was computed from.
            weight: part of the gradient in the mean, finite and >= 0.
            hyper: hyperparameters that differ from the job's.
            momentum: hyperparameters of SGD's momentum if the compressor computes it.
            missing: whether the gradient is zero because there is none; the server steps the bucket only if another
                worker has one.
            absent: positions of the bucket's pieces whose parameter has no gradient; ``values`` are 0 there.
            written: what the training loop has written to parameters of the bucket since the last step.
            nonfinite: whether the weight is 0 because a gradient of this step is not finite; the server counts it.
            encoded: codec and payload if they are made already; None if the compressor makes them here.
            reused: whether the caller changes ``values`` or the payload after the call.
        """
        # A push without a gradient may not be applied, so nothing of the residual goes with it.
        part, self._step = 0.0 if missing else weight, step
        self._dropped.pushed(weight, nonfinite=nonfinite, idle=self.sample_counts.used)
        with self.span("encode", step, bucket.index):
            codec, parts = encoded or self._compressor.encode(
                bucket, values, step=step, weight=part, momentum=momentum, absent=absent
            )
        header = pb.Push(
            step=step,
            bucket=bucket.index,
            base=base,
            weight=weight,
            codec=codec.name,
            epoch=self._progress.epoch,
            hyper=hyper_to_proto(hyper) if hyper else None,
            missing=missing,
            absent=absent,
            nonfinite=nonfinite,
        )
        if bucket.index == 0 and self.sample_counts.used:
            header.covers.extend(self.sample_counts.cover())
        size, number = sum(map(len, parts)), self._number_ahead(bucket, codec, parts)
        self.shared_memory.expect(bucket, step)
        with self.span("send", step, bucket.index):
            if number is None:
                self.pushed_bytes += size
                if self.shared_memory.shards and self.shared_memory.put(bucket, step, values, parts):
                    header.arena_bytes, parts = size, ()
                elif written is not None:  # a message has room for one of the two
                    self.send_ahead(bucket, values, step=step, encoded=(codec, parts), reused=reused)
                    self.pushed_bytes -= size
                    number = self._ahead_number
            if number is not None:
                header.ahead, parts = number, ()
                self.used_bytes += size
            if written is not None:
                header.written.extend(written.pieces)
                parts, reused = (written.payload,), True
            frame = (pack if reused else split)(pb.UpHeader(push=header), parts)
            self._streams.send(bucket.index, frame, overtake=number is not None and not parts)

    def _number_ahead(self, bucket: Bucket, codec: Codec, parts: Sequence[Buffer]) -> int | None:
        """The number of what was sent ahead for a bucket if it is ``parts``; else it is forgotten."""
        frame = self._streams.ahead(bucket.index)
        number = number_if_same(frame, codec.name, parts)
        if frame is not None and number is None:
            self._streams.drop_ahead(bucket.index)
        return number

    def pull(self, bucket: Bucket) -> None:
        """Ask for the parameters of one bucket; ``wait`` waits for the answer."""
        self._streams.send(bucket.index, pack(pb.UpHeader(pull=pb.Pull(bucket=bucket.index))))

    def discard_unanswered(self) -> None:
        """Forget what a wait that failed or was interrupted has left. Call it before a push or pull of all buckets.

        Otherwise an answer under way would count as the answer to what is sent next, and each later step would end one
        answer too early.
        """
        if self._wait_failed or self._abandoned:  # the latter alone if this was interrupted
            self._streams.reset(self.identity.hello(self._pull_codec.name))
            self._wait_failed = self._abandoned = False

    def abandon(self) -> None:
        """Ignore the answers that a wait that failed or was interrupted has left, until ``discard_unanswered``.

        What was pushed may change from now on: what is not answered is sent from copies.
        """
        self._abandoned = self._wait_failed
        self._streams.own_unanswered()

    @property
    def next_step(self) -> int:
        """The step that this worker pushes next."""
        return self._progress.next_steps.value

    def wait(self) -> StepOutcome:
        """Wait until everything that was sent is answered.

        Raises:
            WaitTimeout: an answer has not come within ``timeout``; says who is waited for.
            PsError: the error that ended a stream, such as ``StepConflict``. The session can go on with another pull.
        """
        self.wait_for(None)
        outcome = self._progress.take_outcome()
        self._dropped.answered(applied=outcome.applied)
        return outcome

    def wait_for(self, buckets: Collection[int] | None) -> None:
        """Wait until some buckets are answered, as far as they were sent; ``wait`` returns what the answers said.

        Args:
            buckets: buckets to wait for; None: all.

        Raises:
            WaitTimeout, PsError: as in ``wait``.
        """
        begin, self._wait_failed = time.monotonic(), True
        try:
            with self.span("wait", self._step):
                done = self._wait_until(begin + self.timeout, buckets)
        except StepConflict as error:
            if isinstance(error, Restarted):
                self.job = self._describe()
                for shard in range(len(self._links)):
                    self._restore(shard, self.job)
            self.discard_unanswered()
            raise
        finally:
            self.wait_seconds += time.monotonic() - begin
        self._wait_failed = not done
        if not done:
            raise WaitTimeout(
                f"worker {self.name!r} has waited {self.timeout:g} s for step {self.version}: "
                + explain_wait(self.name, self._links)
                + advise_timeout(self.timeout)
            )

    def _wait_until(self, deadline: float, buckets: Collection[int] | None) -> bool:
        """Wait as ``ShardStreams.wait`` does, and call ``on_long_wait`` from time to time."""
        while True:
            begin = time.monotonic()
            longest = deadline - begin if self.on_long_wait is None else min(deadline - begin, LONG_WAIT_SECONDS)
            if buckets is None:
                self._streams.read(longest)
            with self._streams.changed:
                if self._streams.wait(begin + longest - time.monotonic(), buckets):
                    return True
            if self.on_long_wait is None or time.monotonic() >= deadline:
                return False
            self.on_long_wait()

    @property
    def waiting(self) -> bool:
        """Whether an answer may still come; after an error that ended a stream none is waited for."""
        return self._streams.waiting

    def check_member(self) -> None:
        """Check that the session has neither been closed nor been left behind in a forked process.

        Raises:
            PsError: it has; says what to do.
        """
        if self._ended:
            raise PsError(self._ended)

    @property
    def _streams(self) -> ShardStreams:
        self.check_member()
        if self._shard_streams is None:
            raise NotInitialised(f"worker {self.name!r} has not joined the job")
        return self._shard_streams

    # -------------------------------------------------------------- answers, on the reader thread of a shard or in wait

    def _receive(self, shard: int, message: Frame) -> bool:
        for header, payload in unpack_all(message, pb.DownHeader):
            if header.HasField("measured"):
                self._take_norms(shard, header.measured)
            elif not header.HasField("ballot"):
                if not self._abandoned:
                    self._take_answer(shard, header, payload)
            elif (frame := self._shards[shard].answer_ballot(header.ballot)) is not None:
                self._streams.send_unkept(shard, frame)
        return self.answers_meanwhile

    def _place(self, shard: int, head: bytes, size: int) -> memoryview | None:
        """Where the payload of an answer is received, if the model's tensors can live there."""
        if size < LARGE or self._abandoned or not self.shared_memory.holds_parameters:
            return None
        header, _ = unpack(head, pb.DownHeader)
        if header.codec != "none" or header.delta or header.bucket >= len(self.plan.buckets):
            return None
        bucket = self.plan.buckets[header.bucket]
        return self.shared_memory.place_here(bucket) if (bucket.shard, 4 * bucket.numel) == (shard, size) else None

    def _take_norms(self, shard: int, measured: pb.Measured) -> None:
        with self._streams.changed:
            if self._norms.take(shard, measured):
                for bucket in self.plan.of_shard(shard):
                    if bucket.rule == "optimizer":
                        self._streams.mark_answered(bucket.index, keep_ahead=True)

    def _take_answer(self, shard: int, header: pb.DownHeader, payload: memoryview) -> None:
        if header.bucket >= len(self.plan.buckets):
            raise CorruptFrame(f"server {self._links[shard].address} sent bucket {header.bucket}, which does not exist")
        bucket, step = self.plan.buckets[header.bucket], header.step if header.HasField("step") else -1
        with self.span("receive", step, bucket.index):
            version, size = self._take_values(bucket, header, payload, step)
        if header.HasField("step") and not header.applied:
            self._put_back(bucket, header.step)
        with self._streams.changed:
            self._progress.add(header, version)
            self.pulled_bytes += size
            if header.HasField("step") and self.shared_memory.holds_parameters:
                self.shared_memory.free(bucket, header.step)
            self._streams.mark_answered(bucket.index)

    def _take_values(self, bucket: Bucket, header: pb.DownHeader, payload: memoryview, step: int) -> tuple[int, int]:
        """Hand the values of an answer to ``on_values``; returns their version, and the bytes that they were."""

        def write(bucket: Bucket, values: torch.Tensor) -> None:
            with self.span("write", step, bucket.index):
                self.on_values(bucket, values)

        if header.place:
            return self.shared_memory.read(bucket, header.place, write), 4 * bucket.numel
        with self.span("decode", step, bucket.index):
            room = self.shared_memory.room_here(bucket)
            values = self._decompressor.decode(bucket, header.codec, payload, delta=header.delta, room=room)
            values = self.shared_memory.bring_here(bucket, values)
        write(bucket, values)
        return header.version, len(payload)

    def _put_back(self, bucket: Bucket, step: int) -> None:
        """Give the compressor back what the dropped push of ``step`` held; once, as its answer is taken once."""
        frame = self._streams.unanswered(bucket.index)
        header, payload = unpack(frame, pb.UpHeader) if frame else (pb.UpHeader(), memoryview(b""))
        if header.HasField("push") and header.push.step == step and header.push.weight:
            if header.push.HasField("arena_bytes"):
                payload = self.shared_memory.payload(bucket, header.push.arena_bytes)
            absent = range(len(bucket.pieces)) if header.push.missing else header.push.absent
            self._compressor.put_back(bucket, codecs.codec(header.push.codec), payload, absent)

    # -------------------------------------------------------------- norms

    def measure(
        self,
        gather: Callable[[Bucket, torch.Tensor], object],
        missing: Callable[[Bucket], bool],
        *,
        weight: float,
        power: float,
    ) -> MeanNorm:
        """Ask for the norm of the mean gradient of the next step, over all workers that ask; nothing is applied.

        Args:
            gather: function that writes the gradient of one bucket into a tensor on the CPU, shape (numel,), fp32.
            missing: function that says whether no parameter of a bucket has a gradient.
            weight: part of the gradient in the mean, finite and >= 0.
            power: type of the norm, > 0; inf for the largest absolute value.

        Raises:
            WaitTimeout: another worker has neither asked nor pushed the step within ``timeout``; says who.
            PsError: as in ``wait``.
        """
        self.discard_unanswered()
        step = self.next_step
        turn = self._norms.begin(step)
        for bucket in self.plan.buckets:
            if bucket.rule != "optimizer":
                continue
            header = pb.Measure(
                step=step, bucket=bucket.index, round=turn, power=power, weight=weight, epoch=self._progress.epoch
            )
            header.missing = missing(bucket)
            parts: Sequence[Buffer] = ()
            if not header.missing:
                place = self.shared_memory.place(bucket) if self.shared_memory.shards else None
                values = empty_fp32(bucket.numel) if place is None else place
                gather(bucket, values)
                if place is not None:
                    header.arena_bytes = 4 * bucket.numel
                elif (number := self._number_measured(bucket, parts := (bytes_of(values),))) is not None:
                    header.ahead, parts = number, ()
            self._streams.send(bucket.index, split(pb.UpHeader(measure=header), parts))
        try:
            self.wait_for(None)
        except WaitTimeout:
            self.discard_unanswered()  # the servers forget the question: the loop may change the gradient now
            raise
        return self._norms.finish(power)

    def _number_measured(self, bucket: Bucket, parts: Sequence[Buffer]) -> int | None:
        """The number of what was sent ahead for a bucket if it is ``parts``, for the norm and perhaps for the push."""
        if not self._compressor.leaves_alone(bucket):
            return None
        number = self._number_ahead(bucket, codecs.codec("none"), parts)
        if number is not None:
            self.used_bytes += 4 * bucket.numel
        return number

    # -------------------------------------------------------------- samples

    def waits(self) -> dict[str, tuple[str, ...]]:
        """Whom each worker of the job waits for, as the lead says; empty where it does not answer."""
        try:
            reply = self._links[0].status(STATUS_SECONDS)
        except PsError:
            return {}
        return {each.worker: waited_for(each, reply) for each in reply.worker}

    def request_samples(self, request: pb.DataRequest, seconds: float | None = None) -> pb.DataReply:
        """Ask the lead for samples, again while the connection is broken.

        Args:
            request: request, whose worker, session and secret are filled in here.
            seconds: longest time to wait; None for the session's ``timeout``.

        Raises:
            WaitTimeout: says who has the samples that are left.
        """
        self.check_member()
        request.worker, request.session, request.secret = self.name, self.number, self._secret
        lead, lease, longest = self._shards[0], self.job.lease_seconds, self.timeout if seconds is None else seconds
        try:
            return call_with_retry(lambda: lead.link.data(request, longest), lead.patience(lease))
        except WaitTimeout as error:
            raise WaitTimeout(f"{error}{advise_timeout(self.timeout)}") from None

    # -------------------------------------------------------------- the end

    def close(self) -> None:
        """Leave the roster and close all connections. Never raises for a server that is gone."""
        if self._ended:
            return
        self.on_leave()
        if self._shard_streams is not None:
            self._shard_streams.close()
        if self.number:
            self.upload_trace()
            try:
                request = pb.LeaveRequest(worker=self.name, session=self.number, secret=self._secret)
                self._links[0].leave(request, LEAVE_SECONDS)
            except PsError as error:
                log.info("worker %s could not tell the lead that it leaves: %s", self.name, error)
            self.number = 0
        self._close_links()
        self._let_go(f"worker {self.name!r} has left the job, as it was closed; make another optimizer or client")

    def after_fork_in_child(self) -> None:
        """Forget the job. gRPC's objects stay: their destructors would wait for threads that are the parent's."""
        immortalise(self._links, self._shards, self._shard_streams)
        self.number = 0
        self._let_go(
            f"this process was forked from that of worker {self.name!r}, which alone takes part in the job: here the "
            "model can be used and saved, and no more; start a process that is to be a worker with spawn, not with "
            "fork, and make its optimizer there"
        )

    def _let_go(self, why: str) -> None:
        """Let go of the memory that is shared, and of the callbacks, which refer to the model."""
        self._ended = why
        self._links, self._shards, self._shard_streams = [], [], None
        self.shared_memory = SharedMemory("network")
        self.on_values, self.on_leave = lambda bucket, values: None, lambda: None

    def upload_trace(self) -> None:
        """Send the lead what was traced so far, if anything was. Never raises for a server that is gone."""
        if len(self.trace.spans) > self.trace.given and not self._ended:
            upload_trace(self.trace, self._links[0], self.identity)

    def _close_links(self) -> None:
        for link in self._links:
            link.close()


def _no_span(name: str, step: int, bucket: int = -1, worker: str = "") -> contextlib.AbstractContextManager[object]:
    """The span of a session that traces no step."""
    return NOTHING
