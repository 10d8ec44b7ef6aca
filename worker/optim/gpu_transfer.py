"""Between the GPU that a model is on and the session: gradients go out, parameters come in, and the GPU computes on.

    hook or step --staging()--> up side: pack, encode --copy--> pinned slot --mark--+
    thread "send"                                        waits for the mark <-------+--> session.push
    reader thread --write()--> pinned slot --copy--> down side: into the parameters
    step --wait()--> all is sent and answered --settle()--> what the GPU computes next waits for the down side

Rules of this file
  1. It stands in the place of a session where the model is on one GPU; other models talk to the session itself.
  2. Nobody waits for the whole GPU, nor for what the model computes beyond the gradient at hand: the sending thread
     waits for the mark of its slot, ``staging`` for a slot to get free, ``wait`` for the sending thread.
  3. A gradient is held here until the GPU has read it, so that its memory is not given to another tensor before.
  4. A parameter is written only when its push was answered, so after its gradient was copied from the GPU, which came
     after all that backward did with it. Nothing has to say so a second time.
  5. What fails in the sending thread is raised by ``wait``, where the loop expects errors of the job.

Source: DistributedDataParallel's reducer, Li et al., VLDB 2020, arXiv:2006.15704, for buckets on a side stream.
"""

import contextlib
import itertools
import queue
import threading
from collections.abc import Collection, Iterator
from concurrent import futures
from typing import Any

import torch

from torch_ps.common.codecs.on_gpu import DeviceCodec
from torch_ps.common.codecs.plain import bytes_of
from torch_ps.common.devices import PinnedBuffer, SideStream
from torch_ps.common.errors import WaitTimeout
from torch_ps.common.plan import Bucket
from torch_ps.worker.gradients.compressor import Compressor
from torch_ps.worker.gradients.flat_tensors import FlatTensors, empty_fp32
from torch_ps.worker.optim.backward_overlap import BackwardOverlap
from torch_ps.worker.session.session import Session, StepOutcome

#: Buckets that may be on their way from the GPU at once: one is sent while the next is copied, and one to spare.
UP_SLOTS = 3
#: Buckets that may be on their way to it, for each shard, whose answers a thread of its own takes.
DOWN_SLOTS = 2


class _Slot:
    """Memory for one bucket on both sides of the bus, and what was done with it last."""

    def __init__(self, side: SideStream, numel: int) -> None:
        self.pinned = PinnedBuffer(side, numel)
        self.values = empty_fp32(numel, device=side.device)
        self.sent: futures.Future[None] | None = None


class GpuTransfer:
    """What a session is to a model on the CPU, this is to one on a GPU: ``staging``, ``push`` and ``wait``.

    Memory: for each slot, a bucket on the GPU and one of pinned memory.

    Args:
        flat: the tensors of the model; its ``write`` is called with values on the GPU.
        device: device of all of them. The CPU works too, with needless copies.
    """

    def __init__(self, session: Session, compressor: Compressor, flat: FlatTensors, device: torch.device) -> None:
        self._session, self._compressor, self._flat, self._device = session, compressor, flat, device
        largest = max((bucket.numel for bucket in session.plan.buckets), default=0)
        self._up, self._down = SideStream(device), SideStream(device)
        self._ring = itertools.cycle([_Slot(self._up, largest) for _ in range(UP_SLOTS)])
        self._filling: _Slot | None = None
        self._streams: set[torch.cuda.Stream | None] = set()  # that gradients of this backward were computed on
        self._sender = futures.ThreadPoolExecutor(1, thread_name_prefix="send")
        self._sent: list[futures.Future[None]] = []  # since the last wait
        self._free: queue.SimpleQueue[_Slot] = queue.SimpleQueue()
        for _ in range(DOWN_SLOTS * (1 + max((bucket.shard for bucket in session.plan.buckets), default=0))):
            self._free.put(_Slot(self._down, largest))
        self._writing = threading.Lock()  # the down side is one, the reader threads are several
        self._down.follow([self._down.current()])  # what the model's first values are made by

    def ready(self) -> None:
        """A gradient has been computed, on the calling thread's stream; those of one bucket may be on several."""
        self._streams.add(self._up.current())

    @contextlib.contextmanager
    def staging(self, bucket: Bucket) -> Iterator[torch.Tensor]:
        """A tensor on the GPU to build the gradient of one bucket in, shape (numel,), fp32, and to push it from.

        Inside, the GPU works on the up side, after all that it was given to compute before.

        Raises:
            WaitTimeout: earlier buckets do not leave the GPU.
        """
        slot = self._filling = next(self._ring)
        if slot.sent is not None:
            self._until_sent([slot.sent])
        self._up.follow({*self._streams, self._up.current()})
        with self._up.running():
            yield slot.values[: bucket.numel]

    def push(self, bucket: Bucket, values: torch.Tensor, **facts: Any) -> None:
        """As the session's, for the ``values`` that ``staging`` gave, inside it; returns before they are sent."""
        slot = self._filling
        if slot is None or slot.values.data_ptr() != values.data_ptr():
            raise ValueError(f"bucket {bucket.index} is pushed from elsewhere than its staging")
        codec = self._compressor.on_device(bucket)
        size = slot.pinned.take((values.view(torch.uint8),) if codec is None else codec.to_bytes(values))
        read = self._flat.gradients(bucket)
        slot.sent = self._sender.submit(self._hand_over, bucket, slot, codec, size, read, facts)
        self._sent.append(slot.sent)

    def _hand_over(
        self,
        bucket: Bucket,
        slot: _Slot,
        codec: DeviceCodec | None,
        size: int,
        read: list[torch.Tensor],
        facts: dict[str, Any],
    ) -> None:
        """On the sending thread. ``read`` is what the GPU reads until the mark; only held."""
        slot.pinned.event.wait()
        read.clear()
        encoded = None if codec is None else (codec, (bytes_of(slot.pinned.bytes[:size]),))
        self._session.push(bucket, slot.pinned.values[: bucket.numel], encoded=encoded, **facts)

    def wait(self) -> StepOutcome:
        """As the session's. The parameters may be on their way still: ``Flat.settle`` is to follow, which sees to it.

        Raises:
            WaitTimeout: not within the session's ``timeout``; says who is waited for.
            PsError: what ended a stream, or what the sending thread met.
        """
        sent, self._sent = self._sent, []
        self._streams.clear()
        self._until_sent(sent)
        outcome = self._session.wait()  # also if one was not sent: what has left is answered
        for each in sent:
            each.result()
        return outcome

    def wait_for(self, buckets: Collection[int]) -> None:
        """As the session's, when everything has been sent; ``Flat.settle`` is to follow here too."""
        self._until_sent(self._sent)
        for each in self._sent:
            each.result()
        self._session.wait_for(buckets)

    @property
    def waiting(self) -> bool:
        return self._session.waiting

    def settle(self) -> None:
        """What this thread computes next, on its stream, begins after all that has been written; nobody waits here."""
        self._down.join()

    def _until_sent(self, sent: list[futures.Future[None]]) -> None:
        _, late = futures.wait(sent, self._session.timeout)
        if late:
            raise WaitTimeout(
                f"worker {self._session.name!r} has waited {self._session.timeout:g} s for {len(late)} buckets to "
                f"leave {self._device}, which computes for longer or hangs; give a longer timeout"
            )

    def write(self, bucket: Bucket, values: torch.Tensor) -> None:
        """Take the fresh ``values``, shape (numel,), fp32, on the CPU, of one bucket; they are copied at once."""
        slot = self._free.get(timeout=self._session.timeout)  # each thread has one at most, and there are more
        try:
            slot.pinned.event.wait()
            host, there = slot.pinned.values[: bucket.numel], slot.values[: bucket.numel]
            host.copy_(values)
            with self._writing, self._down.running():
                there.copy_(host, non_blocking=True)
                self._flat.write(bucket, there)
                slot.pinned.event.set()
        finally:
            self._free.put(slot)


def choose_pusher(
    session: Session, compressor: Compressor, flat: FlatTensors, overlap: BackwardOverlap
) -> Session | GpuTransfer:
    """What the model of ``flat`` pushes to: the session, or with all of it on one GPU what stands before the session.

    To be called when the session has joined, before it pulls.
    """
    device = flat.device
    if device.type == "cpu":
        return session
    return attach_transfer(session, compressor, flat, overlap, device)


def attach_transfer(
    session: Session, compressor: Compressor, flat: FlatTensors, overlap: BackwardOverlap, device: torch.device
) -> GpuTransfer:
    """A transfer that takes the answers of ``session`` and hears of gradients from ``overlap``."""
    transfer = GpuTransfer(session, compressor, flat, device)
    session.on_values, overlap.on_ready, flat.on_settle = transfer.write, transfer.ready, transfer.settle
    return transfer
