"""Workers that are spoken for frame by frame, over plain gRPC: what travels, and when, is the test's to say.

with raw_workers(servers, params, ("w0", "w1"), hyper={"lr": 0.5}) as (w0, w1):
w0.ahead(0, 1, gradient); w0.push(0, ahead=1); answer = w0.answer()
"""

import contextlib
import queue
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import torch

from tests.support.jobs import Addresses
from tests.support.raw import Raw, described, raw, secret_of
from tests.support.threads import at_once
from torch_ps.common import codecs, schema
from torch_ps.common.arena import Arena, Layout, offer_from_proto, offer_to_proto
from torch_ps.common.optimizer_spec import Hyper
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.plan import Bucket, plan
from torch_ps.common.rpc.status import error_of
from torch_ps.common.wire.frames import pack, unpack_all


@dataclass(frozen=True)
class Answer:
    """An answer of a server; ``values`` are those of the bucket, shape (numel,), or the difference to a copy."""

    header: pb.DownHeader
    values: torch.Tensor


class RawWorker:
    """One worker, with one stream for each shard. Its pushes say the step and the base of the last answer."""

    def __init__(self, peers: Sequence[Raw], name: str, params: dict[str, torch.Tensor], model: pb.Model) -> None:
        self._peers, self.name, self._params, self._model = peers, name, params, model
        self.buckets: tuple[Bucket, ...] = ()
        self.session = 0
        self._steps: dict[int, tuple[int, int]] = {}  # by bucket: step and base of the next push
        self._frames: list[queue.SimpleQueue[bytes | None]] = []
        self._answers: list[Any] = []
        self._waiting: list[list[tuple[pb.DownHeader, memoryview]]] = []

    def join(self, *, pull_codec: str = "none") -> None:
        """Join, seed if that is asked for, open the streams."""
        description = self._peers[0].description
        reply = self._peers[0].join(pb.JoinRequest(worker=self.name, model=self._model))
        model = schema.from_proto(self._model)
        self.buckets = plan(model, description.bucket_bytes, description.num_shards).buckets
        self.session = reply.session
        for shard in reversed(range(len(self._peers))) if reply.seed else ():
            list(self._peers[shard].call("Seed", self._seeds(shard)))
        self.open(pull_codec)

    def open(self, pull_codec: str = "none") -> None:
        """Open a stream to each shard, the next one if there are some."""
        self.close()
        for peer in self._peers:
            frames: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
            frames.put(peer.hello(self.name, self.session, pull_codec))
            self._frames.append(frames)
            self._answers.append(peer.call("Exchange", iter(frames.get, None)))
            self._waiting.append([])

    def close(self) -> None:
        """End the streams, as a broken connection does."""
        for frames, answers in zip(self._frames, self._answers, strict=True):
            frames.put(None)
            answers.cancel()
        self._frames, self._answers, self._waiting = [], [], []

    def share(self) -> None:
        """Share memory with the lead."""
        layout = Layout([bucket for bucket in self.buckets if bucket.shard == 0])
        self._gradients, self._written_to = Arena.create(layout), Arena.create(layout, peer_writes=True)
        request = pb.ShareRequest(
            worker=self.name,
            session=self.session,
            secret=secret_of(self.name),
            gradients=offer_to_proto(self._gradients.offer),
            answers=offer_to_proto(self._written_to.offer),
        )
        reply = self._peers[0].share(request)
        assert not reply.reason
        self._parameters = Arena.open(layout, offer_from_proto(reply.parameters))

    def push_in_place(self, bucket: int, gradient: torch.Tensor, values: torch.Tensor, **fields: Any) -> None:
        """Push a gradient in shared memory; the frame carries the values that the loop has written."""
        place = self._gradients.values(bucket)
        torch.frombuffer(place, dtype=torch.float32).copy_(gradient)
        self.push(bucket, values, arena_bytes=len(place), **fields)

    def ahead(self, bucket: int, number: int, gradient: torch.Tensor, codec: str = "none") -> None:
        """Send a gradient ahead."""
        header = pb.Ahead(bucket=bucket, number=number, codec=codec)
        payload = codecs.codec(codec).encode(gradient.flatten())
        self.send(bucket, pack(pb.UpHeader(ahead=header), payload))

    def push(self, bucket: int, gradient: torch.Tensor | None = None, **fields: Any) -> None:
        """Push one bucket.

        Args:
            bucket: Index of the bucket.
            gradient: Payload of the frame: the gradient or, with ``written``, the values; None: there is none.
            fields: Fields of the header; step, base, weight and codec have defaults.
        """
        self.send(bucket, pack(pb.UpHeader(push=self.header(bucket, **fields)), _payload(gradient)))

    def copy(self, bucket: int, **fields: Any) -> None:
        """Send a copy of the next push over a call of its own, and wait until the server has taken it.

        Raises:
            PsError: the server refuses it.
        """
        peer = self._peers[self.buckets[bucket].shard]
        push = pack(pb.UpHeader(push=self.header(bucket, **fields)))
        try:
            list(peer.call("Commit", [peer.hello(self.name, self.session) + push]))
        except grpc.RpcError as failure:
            raise error_of(failure, peer.server) from None

    def header(self, bucket: int, **fields: Any) -> pb.Push:
        """The header of the next push."""
        step, base = self._steps.get(bucket, (0, 0))
        return pb.Push(bucket=bucket, **{"step": step, "base": base, "weight": 1.0, "codec": "none", **fields})

    def pull(self, bucket: int) -> Answer:
        """The parameters of one bucket."""
        self.send(bucket, pack(pb.UpHeader(pull=pb.Pull(bucket=bucket))))
        return self.answer(self.buckets[bucket].shard)

    def send(self, bucket: int, frame: bytes) -> None:
        """Send a frame to the shard of a bucket."""
        self._frames[self.buckets[bucket].shard].put(frame)

    def header_of_answer(self, shard: int = 0) -> tuple[pb.DownHeader, memoryview]:
        """Header and payload of the next answer of a shard.

        Raises:
            PsError: it has ended the stream instead.
        """
        waiting = self._waiting[shard]
        while not waiting:
            try:
                message = next(self._answers[shard])
            except grpc.RpcError as failure:
                raise error_of(failure, self._peers[shard].server) from None
            found = unpack_all(message, pb.DownHeader)
            waiting += [each for each in found if not each[0].HasField("ballot")]
        return waiting.pop(0)

    def answer(self, shard: int = 0) -> Answer:
        """The next answer of a shard about a bucket.

        Raises:
            PsError: it has ended the stream instead.
        """
        header, payload = self.header_of_answer(shard)
        self._steps[header.bucket] = header.next_step, header.version
        if header.place == pb.PARAMETERS:
            payload = self._parameters.values(header.bucket)
        elif header.place == pb.ANSWERS:
            payload = self._written_to.values(header.bucket)
        scratch = torch.empty(self.buckets[header.bucket].numel)
        return Answer(header, codecs.codec(header.codec).decode(payload, scratch).clone())

    def leave(self) -> None:
        self.close()
        self._peers[0].leave(self.name, self.session)

    def _seeds(self, shard: int) -> Iterator[bytes]:
        incarnation = self._peers[shard].incarnation
        header = pb.SeedHeader(worker=self.name, session=self.session, model=self._model, incarnation=incarnation)
        header.secret = secret_of(self.name)
        yield pack(header)
        flat = [each.flatten().float() for each in self._params.values()]
        for bucket in self.buckets:
            if bucket.shard == shard:
                values = torch.cat([flat[piece.tensor][piece.start : piece.stop] for piece in bucket.pieces])
                yield pack(pb.SeedHeader(bucket=bucket.index), _payload(values))


@contextlib.contextmanager
def raw_workers(
    servers: Addresses,
    params: dict[str, torch.Tensor],
    names: Sequence[str] = ("w0",),
    *,
    pull_codec: str = "none",
    hyper: Hyper,
) -> Iterator[list[RawWorker]]:
    """The workers of a job under SGD with these hyperparameters; they leave in the end."""
    model = described(params, hyper=hyper)
    with contextlib.ExitStack() as stack:
        found = []
        for name in names:
            peers = [stack.enter_context(raw(each)) for each in servers.addresses]
            found.append(RawWorker(peers, name, params, model))
        at_once(*(lambda w=worker: w.join(pull_codec=pull_codec) for worker in found))
        yield found
        for worker in found:
            worker.leave()


def _payload(values: torch.Tensor | None) -> tuple[memoryview, ...]:
    return () if values is None else (values.flatten().contiguous().numpy().data.cast("B"),)
