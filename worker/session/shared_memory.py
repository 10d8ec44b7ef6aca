"""The memory plane, worker's end: gradients written where the server reads them, parameters read where it writes them.

    share    --Share(offers: gradients, answers)--> server maps them; its answer offers the parameters --> mapped here
    push     payload into the bucket's place, its length into the frame
    answer   read from the server's parameters where nobody may change them before the next push, as in sync, else from
             the answers, where the server has put the version that it names

Nothing has to be copied where a tensor of the model lives in such a region itself: see ``views``.

Rules of this file
  1. A place is written again only when its push is answered. Until then the network carries what comes.
  2. Whatever cannot be shared is no error: the network carries it.
  3. The server's parameters are mapped ``private``: what the model's owner writes there reaches nobody else.

Source: see ``torch_ps.common.arena``.
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
from torch_ps.worker.transport.link import Link

log = logging.getLogger("torch_ps.worker")

#: Seconds in which a server has to map the memory that it is offered.
SHARE_SECONDS = 20.0


class SharedMemory:
    """The shards that share memory with one worker, and which places are free.

    Args:
        wanted: "auto" shares with the shards on this host, but not past a proxy or tunnel, through which somebody wants
            the bytes to go; "memory" insists on it; "network" shares with none.
    """

    def __init__(self, wanted: str) -> None:
        self._wanted = wanted
        self._of: dict[int, _Plane] = {}  # by shard
        self._busy: dict[int, int] = {}  # bucket -> step of the push that its place holds
        self._read: dict[int, Arena] = {}  # bucket -> where its parameters were read last

    def share(self, links: Sequence[Link], plan: Plan, worker: str, session: int) -> None:
        """Offer memory to every shard.

        Raises:
            Refused: memory was insisted on and a shard shares none; says why.
            PsError: a server does not answer.
        """
        if self._wanted == "network":
            return
        for shard, link in enumerate(links):
            try:
                dialled = 0 if self._wanted == "memory" else link.address.port
                self._of[shard] = _share(link, plan.of_shard(shard), worker, session, dialled)
            except NoSharedMemory as error:
                if self._wanted == "memory":
                    raise Refused(
                        f"worker {worker!r} shares no memory with {link.address}: {error}; use plane auto"
                    ) from None
                log.info("the network carries all to and from %s: %s", link.address, error)

    def has(self, shard: int) -> bool:
        """Whether this shard shares memory."""
        return shard in self._of

    def share_again(self, link: Link, shard: int, worker: str, session: int) -> None:
        """Offer a shard that may have been restarted the same regions; what they hold stays.

        Raises:
            NoSharedMemory: it shares none any more; says why.
            PsError: the server does not answer.
        """
        plane = self._of[shard]
        dialled = 0 if self._wanted == "memory" else link.address.port
        self._of[shard] = _offered(link, plane.gradients, plane.answers, worker, session, dialled)

    def forget(self, shard: int) -> None:
        """The network carries all to and from this shard from now on."""
        self._of.pop(shard, None)

    def place(self, bucket: Bucket) -> torch.Tensor | None:
        """Where the gradient of one bucket goes, shape (numel,), fp32; None: it has none, or the server reads it."""
        plane = self._of.get(bucket.shard)
        return None if plane is None or bucket.index in self._busy else plane.place(bucket.index)

    def put(self, bucket: Bucket, step: int, values: torch.Tensor, parts: Sequence[Buffer]) -> bool:
        """Bring the encoded gradient of one push to its place; False: the network has to carry it.

        Args:
            values: what was encoded, shape (numel,), fp32; where it is the place and its only encoding, it is there.
        """
        place, size = self.place(bucket), sum(map(len, parts))
        if place is None or size > 4 * bucket.numel:
            return False
        self._busy[bucket.index] = step
        if not (len(parts) == 1 and size == 4 * bucket.numel and values.data_ptr() == place.data_ptr()):
            into, at = self._of[bucket.shard].gradients.values(bucket.index), 0
            for part in parts:
                into[at : at + len(part)] = part
                at += len(part)
        return True

    def payload(self, bucket: Bucket, size: int) -> memoryview:
        """The encoded gradient that was put last."""
        return self._of[bucket.shard].gradients.values(bucket.index)[:size]

    def answered(self, bucket: Bucket, step: int) -> None:
        """The push of ``step`` has been answered, so the server needs none up to it any more."""
        if step >= self._busy.get(bucket.index, step + 1):
            del self._busy[bucket.index]

    def read(self, bucket: Bucket, place: pb.Place, take: Callable[[Bucket, torch.Tensor], None]) -> int:
        """Hand the parameters of one bucket to ``take``, again if they changed meanwhile; gives their version.

        Raises:
            CorruptFrame: the shard shares none.
            Unreachable: the server is stuck in the middle of a step, or has ended there.
        """
        plane, version = self._of.get(bucket.shard), 0
        if plane is None:
            raise CorruptFrame(
                f"bucket {bucket.index} is said to be in shared memory of shard {bucket.shard}: it has none"
            )
        arena = plane.answers if place == pb.ANSWERS else plane.parameters
        self._read[bucket.index] = arena
        if place == pb.PARAMETERS:
            arena.revert(bucket.index)
        values = arena.tensor(*arena.layout.span(bucket.index))
        for version in arena.attempts(bucket.index, plane.parameters.offer.pid):  # noqa: B007 - the last one counts
            take(bucket, values)
        return version

    # -------------------------------------------------------------- tensors that live here

    def gradient(self, pieces: Sequence[tuple[Bucket, Piece]]) -> torch.Tensor | None:
        """The place of one tensor's gradient, flat, fp32; None where it is not in one piece. See ``_one_piece``."""
        shard = {bucket.shard for bucket, _ in pieces}
        plane = self._of.get(shard.pop()) if len(shard) == 1 else None
        return None if plane is None else _one_piece(plane.gradients, pieces)

    def parameter(self, pieces: Sequence[tuple[Bucket, Piece]]) -> torch.Tensor | None:
        """Where one tensor's parameters were read last, flat, fp32; None where they are not in one piece."""
        arenas = [self._read.get(bucket.index) for bucket, _ in pieces]
        first = arenas[0]
        return None if first is None or any(each is not first for each in arenas) else _one_piece(first, pieces)


@dataclass(frozen=True, slots=True)
class _Plane:
    """What one worker and one shard share."""

    gradients: Arena
    answers: Arena
    parameters: Arena

    def place(self, bucket: int) -> torch.Tensor:
        return self.gradients.tensor(*self.gradients.layout.span(bucket))


def _one_piece(arena: Arena, pieces: Sequence[tuple[Bucket, Piece]]) -> torch.Tensor | None:
    """All pieces of one tensor as one; None unless they follow each other and begin on a cache line.

    Of values on another boundary a matrix product may round otherwise, and planes would differ in their bits.
    """
    spans = []
    for bucket, piece in pieces:
        begin = arena.layout.span(bucket.index)[0] + 4 * piece.offset
        spans.append((begin, begin + 4 * (piece.stop - piece.start)))
    follow = all(before[1] == after[0] for before, after in pairwise(spans))
    return arena.tensor(spans[0][0], spans[-1][1]) if follow and spans[0][0] % LINE == 0 else None


def _share(link: Link, buckets: Sequence[Bucket], worker: str, session: int, dialled: int) -> _Plane:
    layout = Layout(buckets)
    return _offered(link, Arena.create(layout), Arena.create(layout), worker, session, dialled)


def _offered(link: Link, gradients: Arena, answers: Arena, worker: str, session: int, dialled: int) -> _Plane:
    request = pb.ShareRequest(
        worker=worker,
        session=session,
        gradients=offer_to_proto(gradients.offer),
        answers=offer_to_proto(answers.offer),
        dialled_port=dialled,
    )
    reply = link.share(request, SHARE_SECONDS)
    if not reply.HasField("parameters"):
        raise NoSharedMemory(reply.reason)
    parameters = Arena.open(gradients.layout, offer_from_proto(reply.parameters), private=True)
    return _Plane(gradients, answers, parameters)
