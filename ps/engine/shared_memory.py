"""The shared memory of one shard: its own parameters, and gradients and answers of the workers on this host.

    worker: Share(offers) --admit()--> mapped here; answered with the offer of the parameters
    push with arena_bytes --payload()--> the gradient, where the worker has written it
    answer, stable -------> "read the parameters where they are"
            other ---place()--> copied for this worker alone, so that it gets the version that it is told

Rules of this file
  1. Values without structure (fp32) are read where they are. What a codec has to check first is copied first, so that
     it stays as it was checked.
  2. A worker writes a bucket's place again only after its push was answered, so what is held does not change.

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
    """The regions of one worker."""

    gradients: Arena
    answers: Arena


class Arenas:
    """``parameters`` is the shard's own region; None where this system has no shared memory.

    Args:
        in_place: the parameters live in that region. Those on a GPU do not: each worker gets a copy of them.
    """

    def __init__(self, buckets: Sequence[Bucket], *, in_place: bool = True) -> None:
        self._layout, self._in_place = Layout(buckets), in_place
        self.workers: dict[tuple[str | None, int], _Shared] = {}
        self.parameters: Arena | None = None
        try:
            self.parameters = Arena.create(self._layout)
        except NoSharedMemory as error:
            log.info("all pushes and pulls use the network: %s", error)

    def admit(self, worker: str, session: int, gradients: Offer, answers: Offer) -> Offer:
        """Map a worker's regions; gives the one to answer with.

        Raises:
            NoSharedMemory: it is not what a worker of this host and user would offer, or there is none here.
        """
        if self.parameters is None:
            raise NoSharedMemory("the server has no shared memory")
        self.workers[worker, session] = _Shared(
            Arena.open(self._layout, gradients), Arena.open(self._layout, answers, writable=True)
        )
        return self.parameters.offer

    def has(self, worker: str | None, session: int) -> bool:
        """Whether this worker reads parameters where they are."""
        return (worker, session) in self.workers

    def keep(self, roster: Roster) -> None:
        """Let go of the regions of sessions that are gone."""
        members = {(m.name, m.session) for m in roster.members}
        self.workers = {session: shared for session, shared in self.workers.items() if session in members}

    def payload(self, worker: str, session: int, bucket: int, size: int, *, in_place: bool) -> memoryview:
        """The encoded gradient of one push.

        Raises:
            CorruptFrame: this worker shares no memory, or the bucket has not as many bytes.
        """
        shared = self.workers.get((worker, session))
        if shared is None:
            raise CorruptFrame(f"worker {worker!r} names a gradient in shared memory and shares none with this shard")
        values = shared.gradients.values(bucket)
        if size > len(values):
            raise CorruptFrame(f"worker {worker!r} names {size} bytes of bucket {bucket}, which has {len(values)}")
        return values[:size] if in_place else memoryview(bytes(values[:size]))

    def place(self, release: Release, bucket: int, read: Callable[[int], torch.Tensor]) -> pb.Place:
        """Where the worker finds the parameters of one bucket now; FRAME: nowhere yet.

        Args:
            read: function that returns them, shape (numel,), fp32, on the CPU.
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
