"""The memory plane on a worker: writes gradients where the server reads them, reads parameters where it writes them.

    share    --Share(offers: gradients, answers)--> server maps them; its reply offers the parameters --> mapped here
    push     the payload goes to the bucket's place, its length into the frame
    answer   read from the server's parameters where nothing changes them before the next push, as in sync mode; else
             from the answers, to which the server has copied the version that it names

Where a tensor of the model lives in such a region itself, nothing has to be copied: see ``optim/shared_views.py``. What
the network carries can come into a region of this worker alone, so that tensors live there in the same way.

Rules of this file
  1. A place is written again only when its push is answered. Until then the network carries further pushes.
  2. What cannot be shared is no error: the network carries it.
  3. Parameters are mapped twice: ``private``, where tensors of the model live, so that what the training loop writes
     stays in its process, and as the server has written them, so that such writes can be found.

Source: the regions and their locks are those of ``torch_ps.common.arena``.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from torch_ps.common.arena import LINE, Arena, Layout, offer_from_proto, offer_to_proto
from torch_ps.common.errors import CorruptFrame, NoSharedMemory, Refused
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.plan import Bucket, Piece, Plan
from torch_ps.common.wire.frames import Buffer
from torch_ps.worker.session.identity import Identity
from torch_ps.worker.transport.link import Link

log = logging.getLogger("torch_ps.worker")

#: Seconds in which a server has to map the memory that it is offered.
SHARE_SECONDS = 20.0


class SharedMemory:
    """The memory that one worker shares with shards, and which places in it are free.

    Args:
        wanted: "auto" shares with the shards on this host that are reached directly, not through a proxy or tunnel;
            "memory" insists on sharing with all; "network" and "grpc" share with none.

    Attributes:
        shards: memory that is shared with each shard; empty where the network carries everything.
    """

    def __init__(self, wanted: str) -> None:
        self._wanted = wanted
        self.shards: dict[int, _ShardMemory] = {}
        self._busy: dict[int, int] = {}  # bucket -> step of the push that its place holds
        self._read: dict[int, _Region] = {}  # bucket -> where its parameters were read last
        self._here: dict[int, _Region] = {}  # of shards that share none: where what they send comes

    def share(self, links: Sequence[Link], plan: Plan, who: Identity) -> None:
        """Offer memory to every shard.

        Raises:
            Refused: a shard shares none, and the plane is "memory"; says why.
            PsError: a server does not answer.
        """
        if self._wanted in ("network", "grpc"):
            return
        for shard, link in enumerate(links):
            try:
                dialled = 0 if self._wanted == "memory" else link.address.port
                self.shards[shard] = _create(link, plan.of_shard(shard), who, dialled)
            except NoSharedMemory as error:
                if self._wanted == "memory":
                    raise Refused(
                        f"worker {who.worker!r} shares no memory with {link.address}: {error}; use plane auto"
                    ) from None
                log.info("the network carries all payloads to and from %s: %s", link.address, error)

    def keep_here(self, plan: Plan, read: Callable[[Bucket, torch.Tensor], object]) -> None:
        """Make a region of this worker's own for what comes from each shard that shares none.

        Args:
            plan: buckets of the job.
            read: function that writes the values that a bucket has now into a tensor, shape (numel,), fp32.
        """
        for shard in {bucket.shard for bucket in plan.buckets} - self.shards.keys():
            buckets = plan.of_shard(shard)
            try:
                kept = Arena.create(Layout(buckets))
                region = _Region(kept, Arena.open(kept.layout, kept.offer, private=True))
            except NoSharedMemory as error:
                log.debug("parameters are copied into the model: %s", error)
                continue
            for bucket in buckets:
                read(bucket, kept.tensor(*kept.layout.span(bucket.index)))
                self._read[bucket.index] = region
            self._here[shard] = region

    @property
    def holds_parameters(self) -> bool:
        """Whether tensors of the model can live in a region."""
        return bool(self.shards or self._here)

    def expect(self, bucket: Bucket, step: int) -> None:
        """Note that the answer to a push will come into the region of its shard, if there is one."""
        if bucket.shard in self._here:
            self._busy[bucket.index] = step

    def place_here(self, bucket: Bucket) -> memoryview | None:
        """Where the fp32 values of a bucket are to be received, as bytes; None if there is no such region."""
        region = self._here.get(bucket.shard)
        return None if region is None or bucket.rule != "optimizer" else region.kept.values(bucket.index)

    def room_here(self, bucket: Bucket) -> torch.Tensor | None:
        """Where values of a bucket are to be decoded, shape (numel,), fp32; None if there is no such region."""
        region = self._here.get(bucket.shard)
        if region is None or bucket.rule != "optimizer":
            return None
        return region.kept.tensor(*region.kept.layout.span(bucket.index))

    def bring_here(self, bucket: Bucket, values: torch.Tensor) -> torch.Tensor:
        """Put what came for a bucket into the region of its shard, if there is one.

        Args:
            bucket: bucket of the values.
            values: what came, shape (numel,), fp32; nothing is copied if it was received or decoded there.

        Returns:
            The values where the model's tensors can live; ``values`` if there is no such region.
        """
        region = self._here.get(bucket.shard)
        if region is None or bucket.rule != "optimizer":
            return values
        region.view.revert(bucket.index)
        span = region.kept.layout.span(bucket.index)
        kept = region.kept.tensor(*span)
        if kept.data_ptr() != values.data_ptr():
            kept.copy_(values)
        return region.view.tensor(*span)

    def has(self, shard: int) -> bool:
        """Whether this shard shares memory."""
        return shard in self.shards

    @property
    def under_way(self) -> bool:
        """Whether a push that this memory carries, or whose answer comes into it, is not answered yet."""
        return bool(self._busy)

    def share_again(self, link: Link, shard: int, who: Identity) -> None:
        """Offer the same regions to a shard that may have been restarted; what they hold stays.

        Raises:
            NoSharedMemory: the shard shares none any more; says why.
            PsError: the server does not answer.
        """
        memory = self.shards[shard]
        dialled = 0 if self._wanted == "memory" else link.address.port
        self.shards[shard] = _offer(link, memory.gradients, memory.answers.kept, who, dialled)

    def forget(self, shard: int) -> None:
        """Let the network carry everything to and from this shard from now on."""
        self.shards.pop(shard, None)

    def place(self, bucket: Bucket) -> torch.Tensor | None:
        """Where the gradient of one bucket goes, shape (numel,), fp32.

        None if the shard shares no memory, or if the server still reads an earlier gradient there.
        """
        memory = self.shards.get(bucket.shard)
        return None if memory is None or bucket.index in self._busy else memory.place(bucket.index)

    def put(self, bucket: Bucket, step: int, values: torch.Tensor, parts: Sequence[Buffer]) -> bool:
        """Write the payload of one push to the bucket's place.

        Args:
            bucket: bucket of the gradient.
            step: step of the push.
            values: gradient that was encoded, shape (numel,), fp32. If it lies at the place and is its own encoding,
                nothing is copied.
            parts: payload.

        Returns:
            False if the place is not free or too small; the network has to carry the payload.
        """
        place, size = self.place(bucket), sum(map(len, parts))
        if place is None or size > 4 * bucket.numel:
            return False
        self._busy[bucket.index] = step
        if not (len(parts) == 1 and size == 4 * bucket.numel and values.data_ptr() == place.data_ptr()):
            into, at = self.shards[bucket.shard].gradients.values(bucket.index), 0
            for part in parts:
                into[at : at + len(part)] = part
                at += len(part)
        return True

    def payload(self, bucket: Bucket, size: int) -> memoryview:
        """The payload that ``put`` wrote last for a bucket, ``size`` bytes."""
        return self.shards[bucket.shard].gradients.values(bucket.index)[:size]

    def free(self, bucket: Bucket, step: int) -> None:
        """Free the place of a bucket, as the push of ``step`` is answered and the server has read it."""
        if step >= self._busy.get(bucket.index, step + 1):
            del self._busy[bucket.index]

    def read(self, bucket: Bucket, place: pb.Place, take: Callable[[Bucket, torch.Tensor], None]) -> int:
        """Hand the parameters of one bucket to ``take``, and again if they changed meanwhile.

        Args:
            bucket: bucket to read.
            place: region that the answer names.
            take: function that takes the bucket and its values, shape (numel,), fp32, which are valid during the call.

        Returns:
            Version of the values.

        Raises:
            CorruptFrame: the shard shares no memory.
            Unreachable: the server is stuck in the middle of a step, or has ended there.
        """
        memory, version = self.shards.get(bucket.shard), 0
        if memory is None:
            raise CorruptFrame(
                f"bucket {bucket.index} is said to be in shared memory of shard {bucket.shard}: it has none"
            )
        region = memory.answers if place == pb.ANSWERS else memory.parameters
        self._read[bucket.index] = region
        arena = region.view
        arena.revert(bucket.index)
        values = arena.tensor(*arena.layout.span(bucket.index))
        for version in arena.attempts(bucket.index, memory.parameters.kept.offer.pid):  # noqa: B007 - the last one counts
            take(bucket, values)
        return version

    # -------------------------------------------------------------- tensors of the model that live here

    def gradient(self, pieces: Sequence[tuple[Bucket, Piece]]) -> torch.Tensor | None:
        """The place of one tensor's gradient, flat, fp32; None if it is not in one piece (see ``_one_piece``)."""
        shard = {bucket.shard for bucket, _ in pieces}
        memory = self.shards.get(shard.pop()) if len(shard) == 1 else None
        return None if memory is None else _one_piece(memory.gradients, pieces)

    def parameter(self, pieces: Sequence[tuple[Bucket, Piece]]) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Where one tensor's values were read last, flat, fp32; None if they are not in one piece.

        Returns:
            Where the tensor can live, whose writes stay in this process, and the same values without these writes.
        """
        regions = [self._read.get(bucket.index) for bucket, _ in pieces]
        first = regions[0]
        if first is None or any(each is not first for each in regions):
            return None
        place, kept = _one_piece(first.view, pieces), _one_piece(first.kept, pieces)
        return None if place is None or kept is None else (place, kept)


@dataclass(frozen=True, slots=True)
class _Region:
    """A region with parameters: as the server has written it, and as the tensors that live here have it."""

    kept: Arena
    view: Arena  # the same memory, mapped ``private``


@dataclass(frozen=True, slots=True)
class _ShardMemory:
    """The regions that one worker and one shard share."""

    gradients: Arena
    answers: _Region
    parameters: _Region

    def place(self, bucket: int) -> torch.Tensor:
        return self.gradients.tensor(*self.gradients.layout.span(bucket))


def _one_piece(arena: Arena, pieces: Sequence[tuple[Bucket, Piece]]) -> torch.Tensor | None:
    """All pieces of one tensor as one tensor; None unless they follow each other and begin on a cache line.

    Off a cache line a matrix product may round differently, and the bits would depend on the plane.
    """
    spans = []
    for bucket, piece in pieces:
        begin = arena.layout.span(bucket.index)[0] + 4 * piece.offset
        spans.append((begin, begin + 4 * (piece.stop - piece.start)))
    follow = all(before[1] == after[0] for before, after in pairwise(spans))
    return arena.tensor(spans[0][0], spans[-1][1]) if follow and spans[0][0] % LINE == 0 else None


def _create(link: Link, buckets: Sequence[Bucket], who: Identity, dialled: int) -> _ShardMemory:
    layout = Layout(buckets)
    return _offer(link, Arena.create(layout), Arena.create(layout, peer_writes=True), who, dialled)


def _offer(link: Link, gradients: Arena, answers: Arena, who: Identity, dialled: int) -> _ShardMemory:
    request = pb.ShareRequest(
        worker=who.worker,
        session=who.session,
        secret=who.secret,
        gradients=offer_to_proto(gradients.offer),
        answers=offer_to_proto(answers.offer),
        dialled_port=dialled,
    )
    reply = link.share(request, SHARE_SECONDS)
    if not reply.HasField("parameters"):
        raise NoSharedMemory(reply.reason)
    offer = offer_from_proto(reply.parameters)
    try:
        parameters = _Region(Arena.open(gradients.layout, offer), Arena.open(gradients.layout, offer, private=True))
        own = _Region(answers, Arena.open(answers.layout, answers.offer, private=True))
    except NoSharedMemory:  # the shard, which could map its part, has to be told: an offer of nothing is refused
        request.ClearField("gradients")
        request.ClearField("answers")
        link.share(request, SHARE_SECONDS)
        raise
    return _ShardMemory(gradients, own, parameters)
