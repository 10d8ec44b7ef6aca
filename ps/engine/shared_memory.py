"""Shared memory of one shard: its own parameters, and the gradients and responses of the workers on this host.

    Share(offers) -----------admit()--> the worker's regions are mapped; the reply offers the shard's parameters
    push with arena_bytes --payload()--> the gradient, in the worker's region
    stable response --------place()--> the worker reads the shard's parameters in place
    other response ---------place()--> copied to the worker's own region, so that it gets the version that it is told

Rules of this file
  1. Plain fp32 values are read in place. A payload that its codec has to check is copied first, so that it cannot
     change after the check.
  2. A worker rewrites a bucket's region only after the response to its push, so a held gradient does not change.

Source: see ``torch_ps.common.arena``.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from torch_ps.common.arena import Arena, Layout, Offer
from torch_ps.common.errors import CorruptFrame, NoSharedMemory
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.plan import Bucket
from torch_ps.ps.core.effects import Release
from torch_ps.ps.core.roster import Roster

log = logging.getLogger("torch_ps.ps")


@dataclass(frozen=True, slots=True)
class _Shared:
    """Regions of one worker: what it writes, and what this shard writes."""

    gradients: Arena
    answers: Arena


class Arenas:
    """Mapped regions of one shard.

    Args:
        buckets: Buckets of the shard.
        in_place: Whether the parameters live in the shard's region; if not (on a GPU) each worker gets copies.

    Attributes:
        parameters: The shard's own region; None: this system has no shared memory.
        workers: Regions by worker and session.
    """

    def __init__(self, buckets: Sequence[Bucket], *, in_place: bool = True) -> None:
        self._layout, self._in_place = Layout(buckets), in_place
        self.workers: dict[tuple[str | None, int], _Shared] = {}
        self.parameters: Arena | None = None
        try:
            self.parameters = Arena.create(self._layout)
        except NoSharedMemory as error:
            log.info("no shared memory here; all pushes and pulls use the network: %s", error)

    def admit(self, worker: str, session: int, gradients: Offer, answers: Offer) -> Offer:
        """Map a worker's regions; returns the offer of the shard's own region.

        Raises:
            NoSharedMemory: the offers are not of a process of this host and user, or there is no shared memory here.
        """
        if self.parameters is None:
            raise NoSharedMemory("the server has no shared memory")
        try:
            shared = _Shared(Arena.open(self._layout, gradients), Arena.open(self._layout, answers, writable=True))
        except NoSharedMemory:
            self.workers.pop((worker, session), None)  # the worker counts on none either
            raise
        self.workers[worker, session] = shared
        return self.parameters.offer

    def has(self, worker: str | None, session: int) -> bool:
        """Whether this worker shares memory with the shard."""
        return (worker, session) in self.workers

    def keep(self, roster: Roster) -> None:
        """Unmap the regions of sessions that have left the roster."""
        members = {(m.name, m.session) for m in roster.members}
        self.workers = {session: shared for session, shared in self.workers.items() if session in members}

    def unchanged(self, bucket: int) -> Callable[[], bool] | None:
        """A function that says whether one bucket's parameters are as they are now; None where they do not live here.

        Called while no step of the bucket is being made.
        """
        if self.parameters is None or not self._in_place:
            return None
        return self.parameters.unchanged(bucket)

    def payload(self, worker: str, session: int, bucket: int, size: int, *, in_place: bool) -> memoryview:
        """The encoded gradient of one push.

        Args:
            worker, session: Sender of the push.
            bucket: Index of the bucket.
            size: Number of encoded bytes.
            in_place: Return a view; else a copy.

        Raises:
            CorruptFrame: this worker shares no memory, or its bucket has fewer bytes.
        """
        shared = self.workers.get((worker, session))
        if shared is None:
            raise CorruptFrame(f"worker {worker!r} names a gradient in shared memory and shares none with this shard")
        values = shared.gradients.values(bucket)
        if size > len(values):
            raise CorruptFrame(f"worker {worker!r} names {size} bytes of bucket {bucket}, which has {len(values)}")
        return values[:size] if in_place else memoryview(bytes(values[:size]))

    def place(self, release: Release, bucket: int, read: Callable[[int], torch.Tensor]) -> pb.Place:
        """Put a response's parameters where the worker can read them; returns where. FRAME: it shares no memory.

        Args:
            release: The response.
            bucket: Index of the bucket.
            read: Returns the bucket's parameters, fp32 of shape (numel,), on the CPU.
        """
        shared = self.workers.get((release.worker, release.session))
        if shared is None:
            return pb.FRAME
        if release.stable and self._in_place:
            return pb.PARAMETERS
        values = read(bucket)
        with shared.answers.changing(bucket, release.version):
            torch.frombuffer(shared.answers.values(bucket), dtype=torch.float32).copy_(values)
        return pb.ANSWERS
