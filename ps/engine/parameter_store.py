"""The tensors of one shard: fp32 master parameters and optimizer state, with one torch optimizer per bucket.

They are on the CPU or on one GPU; on a GPU each apply thread has a stream of its own (``gpu_staging.py``).

Rules of this file
  1. Methods run on apply threads, inside ``beside``. Calls for one bucket never overlap, calls for different buckets
     may.
  2. The resulting bits depend on the contributions and their order alone, not on arrival, threads, number of shards or
     other workers' codecs.
  3. Payloads were checked before; no call fails because of a peer.

The mean of a step is ``(g0 + g1 + ...) / n`` in rank order when all weights are equal, else
``(w0 g0 + w1 g1 + ...) / (w0 + w1 + ...)``; every product and sum is rounded to fp32 once. Where
finite gradients have a sum beyond fp32, each is scaled by its part of the weights first. Who has no gradient for a
parameter counts in it with 0, as with DDP; a parameter that nobody has one for is left alone. Of buffers, the mean is
of those who have them, or there is none: a copied one is that of the lowest rank.
"""

import contextlib
import math
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import numpy as np
import torch

from torch_ps.common.arena import Arena
from torch_ps.common.codecs import Codec
from torch_ps.common.codecs.pulled_copies import Copies
from torch_ps.common.optimizer_spec import Hyper
from torch_ps.common.plan import Bucket
from torch_ps.common.schema import Model
from torch_ps.common.wire.frames import Buffer
from torch_ps.ps.engine.bucket_optimizer import BucketOptimizer
from torch_ps.ps.engine.gpu_staging import Staging

P = ParamSpec("P")
R = TypeVar("R")
#: Codecs whose payloads are never views of the values.
_FRESH = ("fp16", "bf16")
CPU = torch.device("cpu")  # "cpu:0" stands for a GPU in tests: the same steps as on a GPU, on the CPU


@dataclass(frozen=True, slots=True)
class Gradient:
    """One worker's encoded gradient of one bucket.

    Attributes:
        worker, step: The push it belongs to.
        weight: Weight in the mean, >= 0.
        codec: Codec of the payload.
        payload: Encoded values, checked; empty where the weight is 0 or the gradient is missing.
        missing: The worker has no gradient for any piece of the bucket.
        absent: Positions of the bucket's pieces, increasing, that the worker has no gradient for. They count as 0
            whatever the payload holds, which a lossy codec may have made of 0.
    """

    worker: str
    step: int
    weight: float
    codec: Codec
    payload: memoryview
    missing: bool = False
    absent: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class NonFinite:
    """A gradient that the mean leaves out.

    Attributes:
        worker, step: The push it belongs to.
        tensor: Name of the bucket's first tensor in which it is not finite.
    """

    worker: str
    step: int
    tensor: str


@dataclass(frozen=True, slots=True)
class Mean:
    """What one bucket is stepped with.

    Attributes:
        values: Weighted mean of the gradients, fp32 of shape (numel,).
        absent: Positions of the pieces, increasing, that no gradient is for; the step leaves them alone.
    """

    values: torch.Tensor
    absent: tuple[int, ...] = ()


class _Slot:
    """Parameters of one bucket as a flat tensor, and the optimizer that steps them."""

    def __init__(self, bucket: Bucket, model: Model, arena: Arena | None, device: torch.device) -> None:
        self.bucket = bucket
        self.values = (
            torch.zeros(bucket.numel, device=device)
            if arena is None
            else torch.frombuffer(arena.values(bucket.index), dtype=torch.float32)
        )
        self.optimizer: BucketOptimizer | None = None
        if bucket.rule == "optimizer":
            hyper = model.groups[bucket.group].hyper
            self.optimizer = BucketOptimizer(model.optimizer, bucket, self.values, hyper)

    def update(self, mean: Mean, hyper: Hyper, lr_scale: float) -> None:
        if self.optimizer is None:
            self.values.copy_(mean.values)
        else:
            self.optimizer.step(mean.values, hyper, lr_scale, mean.absent)

    def export(self) -> dict[str, torch.Tensor]:
        kept = {} if self.optimizer is None else self.optimizer.export()
        return {"values": self.values.to("cpu", copy=True), **kept}

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        self.values.copy_(tensors["values"])
        if self.optimizer is not None:
            self.optimizer.restore(tensors)


class Store:
    """Parameters and optimizer state of one shard's buckets, and their updates.

    Memory: parameters, optimizer state, and two scratch buckets per apply thread.

    Args:
        model: Model of the job.
        buckets: Buckets of the shard.
        arena: Shared memory that holds the parameters; None: private memory, as always on a GPU.
        device: Device of all tensors.
    """

    def __init__(
        self, model: Model, buckets: Sequence[Bucket], arena: Arena | None = None, device: torch.device = CPU
    ) -> None:
        self.device, self._direct, self._arena = device, device == CPU, arena
        self._names = [tensor.name for tensor in model.tensors()]
        self._slots = {bucket.index: _Slot(bucket, model, arena, device) for bucket in buckets}
        self._scratch = threading.local()
        self._largest = max((bucket.numel for bucket in buckets), default=0)

    def beside(self, work: Callable[P, R]) -> Callable[P, R]:
        """``work`` as an apply thread has to call it: on a GPU, on the thread's own stream, which it then awaits."""
        if self._direct:
            return work

        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            side = self._staging.side
            with side.running():
                try:
                    return work(*args, **kwargs)
                finally:
                    side.synchronize()

        return run

    def changing(self, bucket: int, version: int) -> AbstractContextManager[None]:
        """Context in which one bucket's values become those of ``version``; readers of shared memory notice it."""
        return contextlib.nullcontext() if self._arena is None else self._arena.changing(bucket, version)

    def load(self, bucket: int, codec: Codec, payload: memoryview) -> None:
        """Set the parameters of one bucket, before the first step."""
        values = self._slots[bucket].values
        values.copy_(codec.decode(payload, torch.empty(values.shape)))

    def export(self, bucket: int) -> dict[str, torch.Tensor]:
        """Copies of one bucket's values and optimizer state on the CPU; ``shard_state.py`` describes the keys."""
        return self._slots[bucket].export()

    def restore(self, bucket: int, tensors: dict[str, torch.Tensor]) -> None:
        """The inverse of ``export``, before the first step."""
        self._slots[bucket].restore(tensors)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # once, before other streams use them

    def values(self, bucket: int) -> torch.Tensor:
        """The parameters of one bucket, fp32 of shape (numel,): the store's own tensor, valid during a call for it."""
        return self._slots[bucket].values

    def host(self, bucket: int) -> torch.Tensor:
        """The parameters of one bucket on the CPU, fp32 of shape (numel,), valid until this thread's next call."""
        values = self._slots[bucket].values
        return values if self._direct else self._staging.host(values)

    def encode(self, bucket: int, codec: Codec) -> tuple[Buffer, ...]:
        """The encoded parameters of one bucket, in parts that may be views valid until this thread's next call."""
        values = self._slots[bucket].values
        return codec.encode(values) if self._direct else self._staging.encode(codec, values)

    def keep(self, codec: Codec, parts: tuple[Buffer, ...]) -> tuple[Buffer, ...]:
        """The parts of what ``encode`` has made, or copies of them, which stay as they are until they are dropped."""
        return parts if self._direct and codec.name in _FRESH else tuple(map(copy_of, parts))

    def decode(self, codec: Codec, payload: memoryview, scratch: torch.Tensor) -> torch.Tensor:
        """The values of a checked payload, in the shape of ``scratch``, on the store's device."""
        if self._direct:
            return codec.decode(payload, scratch)
        return self._staging.decode(codec, payload, scratch)

    def encode_lacking(self, bucket: int, codec: Codec, copies: Copies, version: int) -> tuple[Buffer, ...] | None:
        """Difference between one bucket and ``copies``, by a coarse codec; None: the parameters have to go whole.

        That is so at a worker's first pull and where parameters are not finite.
        """
        return copies.encode(bucket, self.host(bucket), codec, seed=(version << 32) + bucket)

    def mean(self, bucket: int, gradients: Sequence[Gradient]) -> tuple[Mean | None, list[NonFinite]]:
        """Weighted mean of ``gradients``, which are in rank order. It leaves out those that are not finite.

        Returns:
            The mean, valid until this thread's next call, and the gradients left out. The mean is None, and the bucket
            keeps its values, if no weight remains or no gradient is for any piece.
        """
        slot = self._slots[bucket]
        if slot.optimizer is None:
            return self._of_buffers(slot, [g for g in gradients if g.weight > 0])
        left_out: list[NonFinite] = []
        mean = self._mean(slot, gradients)
        if mean is not None and not math.isfinite(mean.values.sum().item()):
            left_out = [found for g in gradients if g.weight > 0 and (found := self._nonfinite(slot, g))]
            bad = {found.worker for found in left_out}
            mean = self._finite_mean(slot, [g for g in gradients if g.worker not in bad])
        return mean, left_out

    def norm(self, bucket: int, gradients: Sequence[Gradient], power: float) -> float:
        """Norm of the weighted mean of ``gradients``, which are in rank order; finite or not, none is left out."""
        mean = self._mean(self._slots[bucket], gradients)
        return 0.0 if mean is None else float(torch.linalg.vector_norm(mean.values, power, dtype=torch.float64))

    def step(self, bucket: int, mean: Mean, hyper: Hyper, *, lr_scale: float = 1.0) -> None:
        """Make one optimizer step.

        Args:
            bucket: Index of the bucket.
            mean: Gradient.
            hyper: Hyperparameters of this and later steps.
            lr_scale: Factor on the learning rate of this step alone.
        """
        with torch.no_grad():
            self._slots[bucket].update(mean, hyper, lr_scale)

    def _mean(self, slot: _Slot, gradients: Sequence[Gradient]) -> Mean | None:
        gradients = [g for g in gradients if g.weight > 0]
        absent = _absent_in_all(gradients)
        if not gradients or len(absent) == len(slot.bucket.pieces):
            return None
        total, term = self._buffers(slot.bucket.numel)
        equal = len({g.weight for g in gradients}) == 1
        values = self._term(slot, gradients[0], total, equal)
        for gradient in gradients[1:]:
            values = torch.add(values, self._term(slot, gradient, term, equal), out=total)
        divisor = len(gradients) if equal else math.fsum(g.weight for g in gradients)
        return Mean(torch.div(values, divisor, out=total) if divisor != 1 else values, absent)

    def _finite_mean(self, slot: _Slot, gradients: Sequence[Gradient]) -> Mean | None:
        """Weighted mean of finite gradients, whose sum may be beyond fp32: their mean is not."""
        mean = self._mean(slot, gradients)
        if mean is None or mean.values.isfinite().all():
            return mean
        total, term = self._buffers(slot.bucket.numel)
        gradients = [g for g in gradients if g.weight > 0]
        weights, values = math.fsum(g.weight for g in gradients), torch.zeros_like(total)
        for gradient in gradients:
            values.add_(torch.mul(self._gradient(slot, gradient, term), gradient.weight / weights, out=term))
        largest = torch.finfo(values.dtype).max
        return Mean(total.copy_(values.clamp_(-largest, largest)), mean.absent)

    def _of_buffers(self, slot: _Slot, pushed: Sequence[Gradient]) -> tuple[Mean | None, list[NonFinite]]:
        """What the buffers of a bucket become, from pushes with a weight, and the pushes that are left out.

        An average is that of the finite pushes; where none is finite, it is what one worker alone would have.
        """
        if not pushed:
            return None, []
        if any(each.absent for each in pushed):
            return Mean(self._piece_by_piece(slot, pushed)), []
        if slot.bucket.rule == "copy":
            return Mean(self.decode(pushed[0].codec, pushed[0].payload, self._buffers(slot.bucket.numel)[0])), []
        mean = self._mean(slot, pushed)
        if mean is None or math.isfinite(mean.values.sum().item()):
            return mean, []
        left_out = [found for each in pushed if (found := self._nonfinite(slot, each))]
        bad = {found.worker for found in left_out}
        rest = [each for each in pushed if each.worker not in bad]
        return (self._finite_mean(slot, rest), left_out) if rest else (mean, [])

    def _piece_by_piece(self, slot: _Slot, pushed: Sequence[Gradient]) -> torch.Tensor:
        """What buffers become where some workers do not have all of them; what nobody has stays as it is."""
        values = slot.values.clone()
        decoded = [self.decode(g.codec, g.payload, torch.empty_like(values)) for g in pushed]
        for position in range(len(slot.bucket.pieces)):
            (span,) = slot.bucket.spans([position])
            having = [
                (g.weight, each[span]) for g, each in zip(pushed, decoded, strict=True) if position not in g.absent
            ]
            if having and slot.bucket.rule == "copy":
                values[span] = having[0][1]
            elif having:
                total = sum((weight * each for weight, each in having), torch.zeros_like(values[span]))
                values[span] = total / math.fsum(weight for weight, _ in having)
        return values

    def _term(self, slot: _Slot, gradient: Gradient, scratch: torch.Tensor, equal: bool) -> torch.Tensor:
        values = self._gradient(slot, gradient, scratch)
        return values if equal else torch.mul(values, gradient.weight, out=scratch)

    def _gradient(self, slot: _Slot, gradient: Gradient, scratch: torch.Tensor) -> torch.Tensor:
        """The values of a gradient, 0 where it has none; they may be views of its payload."""
        if not len(gradient.payload):
            return scratch.zero_()
        values = self.decode(gradient.codec, gradient.payload, scratch)
        if gradient.absent:
            if values.data_ptr() != scratch.data_ptr():
                values = scratch.copy_(values)
            for each in slot.bucket.spans(gradient.absent):
                values[each] = 0.0
        return values

    def _nonfinite(self, slot: _Slot, gradient: Gradient) -> NonFinite | None:
        values = self._gradient(slot, gradient, self._buffers(slot.bucket.numel)[0])
        finite = torch.isfinite(values)
        if finite.all():
            return None
        first = int(finite.logical_not().nonzero()[0])
        piece = next(p for p in reversed(slot.bucket.pieces) if p.offset <= first)
        return NonFinite(gradient.worker, gradient.step, self._names[piece.tensor])

    def _buffers(self, numel: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Two scratch tensors of this thread, cut to ``numel``."""
        if not hasattr(self._scratch, "pair"):
            self._scratch.pair = tuple(torch.empty(self._largest, device=self.device) for _ in range(2))
            self._scratch.cut = {}  # by size
        cut: tuple[torch.Tensor, torch.Tensor] | None = self._scratch.cut.get(numel)
        if cut is None:
            first, second = self._scratch.pair
            cut = self._scratch.cut[numel] = first[:numel], second[:numel]
        return cut

    @property
    def _staging(self) -> Staging:
        """This thread's."""
        if not hasattr(self._scratch, "staging"):
            self._scratch.staging = Staging(self.device, self._largest)
        staging: Staging = self._scratch.staging
        return staging


def copy_of(part: Buffer) -> memoryview:
    """A copy of a part of a payload, made with the interpreter's lock released."""
    return np.frombuffer(part, np.uint8).copy().data


def _absent_in_all(gradients: Sequence[Gradient]) -> tuple[int, ...]:
    """Pieces that no gradient is for."""
    if not all(g.absent for g in gradients):
        return ()
    return tuple(sorted(frozenset.intersection(*(frozenset(g.absent) for g in gradients)))) if gradients else ()
