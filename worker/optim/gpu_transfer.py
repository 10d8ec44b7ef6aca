"""Moves gradients from the GPU to the session, and parameters back, while the GPU goes on computing.

    hook or step --staging()--> up stream: pack, encode --copy--> pinned slot --event--+
    thread "send"                                          waits for the event <-------+--> session.push
    reader thread --write()--> pinned slot --copy--> down stream: into the parameters
    step --wait()--> all is sent and answered --settle()--> what the GPU computes next waits for the down stream

Rules of this file
  1. A ``GpuTransfer`` takes the place of the session if the whole model is on one GPU; any other model uses the session
     itself.
  2. No thread waits for the whole GPU, nor for what the model computes beyond the gradient at hand: the sending thread
     waits for the event of its slot, ``staging`` for a free slot, ``wait`` for the sending thread.
  3. A gradient is held here until the GPU has read it, so that its memory goes to no other tensor before.
  4. A parameter is written only when its push was answered, so after its gradient was copied from the GPU, which came
     after everything that backward did with it. No further event is needed for that order.
  5. An error of the sending thread is raised by ``wait``, where the loop expects errors of the job.

Source: DistributedDataParallel's reducer, Li et al., VLDB 2020, arXiv:2006.15704, for buckets on a side stream.
"""

import contextlib
import itertools
import queue
import threading
from collections.abc import Callable, Collection, Iterator
from concurrent import futures
from typing import Any, TypeAlias

import torch

from torch_ps.common.codecs.on_gpu import DeviceCodec
from torch_ps.common.codecs.plain import bytes_of
from torch_ps.common.devices import PinnedBuffer, SideStream
from torch_ps.common.errors import WaitTimeout
from torch_ps.common.plan import Bucket
from torch_ps.worker.gradients.compressor import Compressor
from torch_ps.worker.gradients.flat_tensors import FlatTensors, empty_fp32
from torch_ps.worker.optim.backward_overlap import BackwardOverlap
from torch_ps.worker.runtime.lifetime import Part
from torch_ps.worker.session.answers import StepOutcome
from torch_ps.worker.session.session import Session

#: Buckets that may leave the GPU at once: one is sent while the next is copied, and one to spare.
UP_SLOTS = 3
#: Buckets per shard that may come to the GPU at once; each shard has a reader thread.
DOWN_SLOTS = 2


class _Slot:
    """Memory for one bucket on both sides of the bus, and the last task that sent it."""

    def __init__(self, side: SideStream, numel: int) -> None:
        self.pinned = PinnedBuffer(side, numel)
        self.values = empty_fp32(numel, device=side.device)
        self.sent: futures.Future[None] | None = None


class GpuTransfer(Part):
    """Takes the place of a session for a model on a GPU: ``staging``, ``push``, ``wait`` and ``wait_for``.

    Memory: for each slot, a bucket on the GPU and one of pinned memory.

    Args:
        session: session that sends what has left the GPU.
        compressor: encoder of the gradients, which knows the codecs that a GPU can compute.
        flat: tensors of the model; its ``write`` gets values on the GPU.
        device: device of all tensors. The CPU works, too, with copies that nobody needs; tests do so.
    """

    def __init__(self, session: Session, compressor: Compressor, flat: FlatTensors, device: torch.device) -> None:
        self._session, self._compressor, self._flat, self._device = session, compressor, flat, device
        largest = max((bucket.numel for bucket in session.plan.buckets), default=0)
        self._up, self._down = SideStream(device), SideStream(device)
        self._ring = itertools.cycle([_Slot(self._up, largest) for _ in range(UP_SLOTS)])
        self._filling: _Slot | None = None
        self._streams: set[torch.cuda.Stream | None] = set()  # that gradients of this backward were computed on
        self._sender = futures.ThreadPoolExecutor(1, thread_name_prefix="send")
        self._sent: list[futures.Future[None]] = []  # since the last wait, without those that are known to have left
        self._counting = threading.Lock()  # of _sent: a tensor may be waited for on any thread
        self._free: queue.SimpleQueue[_Slot] = queue.SimpleQueue()
        for _ in range(DOWN_SLOTS * (1 + max((bucket.shard for bucket in session.plan.buckets), default=0))):
            self._free.put(_Slot(self._down, largest))
        self._writing = threading.Lock()  # the down side is one, the reader threads are several
        self._down.follow([self._down.current()])  # the model's first values are computed there

    def ready(self) -> None:
        """Note that a gradient was computed on the calling thread's stream; a bucket may have several."""
        self._streams.add(self._up.current())

    @contextlib.contextmanager
    def staging(self, bucket: Bucket) -> Iterator[torch.Tensor]:
        """A tensor on the GPU to build the gradient of one bucket in, shape (numel,), fp32, and to push it from.

        Inside the context the GPU works on the up stream, after everything that it was given to compute before.

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
        """Send the gradient of one bucket as ``Session.push`` does; returns before it is sent.

        Args:
            bucket: bucket of the gradient.
            values: tensor that ``staging`` gave; the call has to be inside its context.
            **facts: further arguments of ``Session.push``.

        Raises:
            ValueError: ``values`` is another tensor.
        """
        self._leave(bucket, values, self._session.push, facts)

    def send_ahead(self, bucket: Bucket, values: torch.Tensor, *, step: int) -> None:
        """Send the gradient of one bucket as ``Session.send_ahead`` does; returns before it is sent.

        Args:
            bucket: bucket of the gradient.
            values: tensor that ``staging`` gave; the call has to be inside its context.
            step: step of the push that is to come.

        Raises:
            ValueError: ``values`` is another tensor.
        """
        self._leave(bucket, values, self._session.send_ahead, {"step": step})

    def _leave(self, bucket: Bucket, values: torch.Tensor, send: Callable[..., None], facts: dict[str, Any]) -> None:
        slot = self._filling
        if slot is None or slot.values.data_ptr() != values.data_ptr():
            raise ValueError(f"bucket {bucket.index} is pushed from elsewhere than its staging")
        codec = self._compressor.on_device(bucket)
        size = slot.pinned.take((values.view(torch.uint8),) if codec is None else codec.to_bytes(values))
        read = self._flat.gradients(bucket)
        slot.sent = self._sender.submit(self._hand_over, bucket, slot, codec, size, read, send, facts)
        with self._counting:
            self._sent.append(slot.sent)

    def _hand_over(
        self,
        bucket: Bucket,
        slot: _Slot,
        codec: DeviceCodec | None,
        size: int,
        read: list[torch.Tensor],
        send: Callable[..., None],
        facts: dict[str, Any],
    ) -> None:
        """Send a bucket once it has left the GPU, on the sending thread; until then ``read`` holds the gradients."""
        slot.pinned.event.wait()
        read.clear()
        encoded = None if codec is None else (codec, (bytes_of(slot.pinned.bytes[:size]),))
        send(bucket, slot.pinned.values[: bucket.numel], encoded=encoded, reused=True, **facts)

    def wait(self) -> StepOutcome:
        """Wait until everything is sent and answered. Call ``FlatTensors.settle`` next: copies may be under way.

        Raises:
            WaitTimeout: an answer has not come within the session's ``timeout``; says who is waited for.
            PsError: the error that ended a stream, or that the sending thread met.
        """
        with self._counting:
            sent, self._sent = self._sent, []
        self._streams.clear()
        self._until_sent(sent)
        outcome = self._session.wait()  # also if sending has failed: what has left is answered
        for each in sent:
            each.result()
        return outcome

    def wait_for(self, buckets: Collection[int]) -> None:
        """Wait until some buckets are answered, all being sent by ``push``. Call ``FlatTensors.settle`` next.

        Raises:
            WaitTimeout, PsError: as ``wait``.
        """
        with self._counting:
            sent = tuple(self._sent)
        self._until_sent(sent)
        for each in sent:
            each.result()
        if sent:  # all have left without an error, so the next call need not look at them again
            left = set(sent)
            with self._counting:
                self._sent = [each for each in self._sent if each not in left]
        self._session.wait_for(buckets)

    @property
    def waiting(self) -> bool:
        """Whether an answer may still come."""
        return self._session.waiting

    def settle(self) -> None:
        """Let what this thread computes next, on its stream, begin after all that has been written. Does not wait."""
        self._down.join()

    def close(self) -> None:
        """End the sending thread, and let go of the tensors. Nothing is under way."""
        self._sender.shutdown(wait=False)
        self._flat.on_settle = lambda: None

    def after_fork_in_child(self) -> None:
        """Let go of the tensors, in a forked child, which cannot use the GPU."""
        self._flat.on_settle = lambda: None

    def _until_sent(self, sent: Collection[futures.Future[None]]) -> None:
        _, late = futures.wait(sent, self._session.timeout)
        if late:
            raise WaitTimeout(
                f"worker {self._session.name!r} has waited {self._session.timeout:g} s for {len(late)} buckets to "
                f"leave {self._device}, which computes for longer or hangs; give a longer timeout"
            )

    def write(self, bucket: Bucket, values: torch.Tensor) -> None:
        """Copy the fresh ``values`` of one bucket, shape (numel,), fp32, on the CPU, into the model."""
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


#: Sends the gradients of a model and waits for the answers.
Pusher: TypeAlias = Session | GpuTransfer


def choose_pusher(session: Session, compressor: Compressor, flat: FlatTensors, overlap: BackwardOverlap) -> Pusher:
    """Choose what the model of ``flat`` pushes to: a ``GpuTransfer`` if all of it is on one GPU, else the session.

    Call it when the session has joined, before it pulls.
    """
    device = flat.device
    if device.type == "cpu":
        return session
    return attach_transfer(session, compressor, flat, overlap, device)


def attach_transfer(
    session: Session, compressor: Compressor, flat: FlatTensors, overlap: BackwardOverlap, device: torch.device
) -> GpuTransfer:
    """Make a transfer that takes the answers of ``session`` and learns of gradients from ``overlap``."""
    transfer = GpuTransfer(session, compressor, flat, device)
    session.on_values, overlap.on_ready, flat.on_settle = transfer.write, transfer.ready, transfer.settle
    return transfer
