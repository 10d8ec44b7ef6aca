"""The tensors of one shard: fp32 master parameters and optimizer state, one torch optimizer per bucket.

On the CPU or on one GPU, then with a stream per executor thread (``staging``).

Rules of this file
  1. Runs on executor threads, inside ``beside``; calls for one bucket never overlap, calls for different buckets may.
  2. The bits depend on the contributions and their order alone: not on arrival, threads, shards or codec of others.
  3. Bytes were checked before they got here; nothing here can fail because of a peer.

The mean of a step is ``(g0 + g1 + ...) / n`` in rank order when all weights are equal, as written by hand, else
``(w0 g0 + w1 g1 + ...) / (w0 + w1 + ...)``; every product and sum is rounded to fp32 once.
"""

import contextlib
import math
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from typing import ParamSpec, TypeVar

import torch

from torch_ps.common import optimizer_spec as optim
from torch_ps.common.arena import Arena
from torch_ps.common.codecs import Codec
from torch_ps.common.codecs.pulled_copies import Copies
from torch_ps.common.optimizer_spec import Hyper
from torch_ps.common.plan import ALIGN, Bucket
from torch_ps.common.schema import Model
from torch_ps.common.wire.frames import Buffer
from torch_ps.ps.engine.gpu_staging import Staging

P = ParamSpec("P")
R = TypeVar("R")
CPU = torch.device("cpu")  # "cpu:0" is the CPU in the place of a GPU: the same steps, with copies that nobody needs


@dataclass(frozen=True, slots=True)
class Gradient:
    """One worker's encoded gradient of one bucket, with its part in the mean."""

    worker: str
    step: int
    weight: float
    codec: Codec
    payload: memoryview
    missing: bool = False  # a zero that stands for no gradient


@dataclass(frozen=True, slots=True)
class NonFinite:
    """A gradient that was left out, and the first tensor of the bucket in which it is not finite."""

    worker: str
    step: int
    tensor: str


class _Slot:
    """One bucket: its parameters as one flat tensor and the optimizer over it."""

    def __init__(self, bucket: Bucket, model: Model, arena: Arena | None, device: torch.device) -> None:
        self.bucket = bucket
        self.values = (
            torch.zeros(bucket.numel, device=device)
            if arena is None
            else torch.frombuffer(arena.values(bucket.index), dtype=torch.float32)
        )
        self.optimizer: torch.optim.Optimizer | None = None
        self._parts = [self.values]
        if bucket.rule == "optimizer":
            hyper = model.groups[bucket.group].hyper
            if hyper.get("fused"):
                self._parts = _whole_vectors(bucket, self.values)
            self.optimizer = optim.build(model.optimizer, self._parts, hyper)
        self._sizes = [part.numel() for part in self._parts]

    def update(self, mean: torch.Tensor, hyper: Hyper, lr_scale: float) -> None:
        if self.optimizer is None:
            self.values.copy_(mean)
            return
        group = self.optimizer.param_groups[0]
        group.update(hyper)
        rate = group["lr"]
        group["lr"] = rate * lr_scale
        for part, gradient in zip(self._parts, torch.split(mean, self._sizes), strict=True):
            part.grad = gradient
        self.optimizer.step()
        group["lr"] = rate
        for part in self._parts:
            part.grad = None

    def export(self) -> dict[str, torch.Tensor]:
        kept = {} if self.optimizer is None else optimizer_state(self.optimizer, self._parts)
        return {"values": self.values.to("cpu", copy=True), **kept}

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        self.values.copy_(tensors["values"])
        if self.optimizer is not None:
            restore_optimizer(self.optimizer, self._parts, tensors)


def _whole_vectors(bucket: Bucket, values: torch.Tensor) -> list[torch.Tensor]:
    """``values``, cut behind tensors that are no whole number of vectors: a fused kernel rounds the rest otherwise.

    Between other tensors a cut would change no bits, and cost 4 us a step.
    """
    ends = [p.offset + p.stop - p.start for p in bucket.pieces if (p.stop - p.start) % ALIGN]
    return [values[begin:end] for begin, end in pairwise(sorted({0, *ends, bucket.numel}))]


class Store:
    """Parameters, optimizer state and their updates, for the buckets of one shard.

    Memory: parameters + optimizer state + two scratch buckets per executor thread.

    Args:
        arena: shared memory for the parameters; None: they are private, as on a GPU they have to be.
        device: device of all tensors.
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
        """``work`` as an executor thread has to run it: on a GPU on the thread's own side, until that is done."""
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
        """Copies of what one bucket is: its values and optimizer state, see ``torch_ps.ps.engine.state``."""
        return self._slots[bucket].export()

    def restore(self, bucket: int, tensors: dict[str, torch.Tensor]) -> None:
        """The inverse of ``export``, before the first step."""
        self._slots[bucket].restore(tensors)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # once, before other streams use them

    def values(self, bucket: int) -> torch.Tensor:
        """The parameters of one bucket, shape (numel,), fp32: the store's own, to look at during a call for it."""
        return self._slots[bucket].values

    def host(self, bucket: int) -> torch.Tensor:
        """The parameters of one bucket on the CPU, shape (numel,), fp32; to be read until this thread's next call."""
        values = self._slots[bucket].values
        return values if self._direct else self._staging.host(values)

    def encode(self, bucket: int, codec: Codec) -> tuple[Buffer, ...]:
        """The parameters of one bucket. The parts may be views: join them before this thread's next call."""
        values = self._slots[bucket].values
        return codec.encode(values) if self._direct else self._staging.encode(codec, values)

    def decode(self, codec: Codec, payload: memoryview, scratch: torch.Tensor) -> torch.Tensor:
        """The values of a checked payload, shape of ``scratch``, where the store's tensors are."""
        if self._direct:
            return codec.decode(payload, scratch)
        return self._staging.decode(codec, payload, scratch)

    def encode_lacking(self, bucket: int, codec: Codec, copies: Copies, version: int) -> tuple[Buffer, ...] | None:
        """Difference between one bucket and ``copies``, by a coarse codec; None: the parameters have to go whole.

        That is so at a worker's first pull and where parameters are not finite.
        """
        return copies.encode(bucket, self.host(bucket), codec, seed=(version << 32) + bucket)

    def mean(self, bucket: int, gradients: Sequence[Gradient]) -> tuple[torch.Tensor | None, list[NonFinite]]:
        """The weighted mean of ``gradients``, which are in rank order, and what was left out of it.

        A gradient that is not finite joins with weight 0.

        Returns:
            The mean, shape (numel,), fp32, to be read until this thread's next call; None with no weight left, or where
            every gradient is missing: the bucket stays as it is. Then the gradients that are not finite.
        """
        slot = self._slots[bucket]
        left_out: list[NonFinite] = []
        mean = self._mean(slot, gradients)
        if mean is not None and not math.isfinite(mean.sum().item()):
            left_out = [found for g in gradients if (found := self._nonfinite(slot, g))]
            bad = {found.worker for found in left_out}
            mean = self._mean(slot, [g for g in gradients if g.worker not in bad])
        return mean, left_out

    def step(self, bucket: int, mean: torch.Tensor, hyper: Hyper, *, lr_scale: float = 1.0) -> None:
        """One optimizer step with ``mean``; ``lr_scale`` is a factor on the learning rate, for this step alone."""
        with torch.no_grad():
            self._slots[bucket].update(mean, hyper, lr_scale)

    def _mean(self, slot: _Slot, gradients: Sequence[Gradient]) -> torch.Tensor | None:
        gradients = [g for g in gradients if g.weight > 0]
        if all(g.missing for g in gradients):
            return None
        total, term = self._buffers(slot.bucket.numel)
        equal = len({g.weight for g in gradients}) == 1
        values = self._term(gradients[0], total, equal)
        for gradient in gradients[1:]:
            values = torch.add(values, self._term(gradient, term, equal), out=total)
        divisor = len(gradients) if equal else math.fsum(g.weight for g in gradients)
        return torch.div(values, divisor, out=total) if divisor != 1 else values

    def _term(self, gradient: Gradient, scratch: torch.Tensor, equal: bool) -> torch.Tensor:
        values = self.decode(gradient.codec, gradient.payload, scratch)
        return values if equal else torch.mul(values, gradient.weight, out=scratch)

    def _nonfinite(self, slot: _Slot, gradient: Gradient) -> NonFinite | None:
        values = self.decode(gradient.codec, gradient.payload, self._buffers(slot.bucket.numel)[0])
        finite = torch.isfinite(values)
        if slot.optimizer is None:
            finite |= values == slot.values  # -inf in a buffer may be meant, as in a mask of attention
        if finite.all():
            return None
        first = int(finite.logical_not().nonzero()[0])
        piece = next(p for p in reversed(slot.bucket.pieces) if p.offset <= first)
        return NonFinite(gradient.worker, gradient.step, self._names[piece.tensor])

    def _buffers(self, numel: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Two scratch tensors of this thread, cut to ``numel``."""
        if not hasattr(self._scratch, "pair"):
            self._scratch.pair = tuple(torch.empty(self._largest, device=self.device) for _ in range(2))
        first, second = self._scratch.pair
        return first[:numel], second[:numel]

    @property
    def _staging(self) -> Staging:
        """This thread's."""
        if not hasattr(self._scratch, "staging"):
            self._scratch.staging = Staging(self.device, self._largest)
        staging: Staging = self._scratch.staging
        return staging


def optimizer_state(optimizer: torch.optim.Optimizer, parts: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """What torch's optimizer keeps for ``parts``, which are the pieces of one bucket and step together.

    Elementwise tensors come joined, shape (numel,); counters, shape (), once.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, first in optimizer.state[parts[0]].items() if parts[0] in optimizer.state else ():
        if not isinstance(first, torch.Tensor):
            continue  # None: a buffer that these hyperparameters do not use
        several = [optimizer.state[part][name] for part in parts]
        tensors[f"state/{name}"] = (torch.cat(several) if first.dim() else first).to("cpu", copy=True)
    return tensors


def restore_optimizer(
    optimizer: torch.optim.Optimizer, parts: list[torch.Tensor], tensors: dict[str, torch.Tensor]
) -> None:
    """The inverse of ``optimizer_state``."""
    state: dict[str, torch.Tensor] = {
        key.partition("/")[2]: tensor for key, tensor in tensors.items() if key.startswith("state/")
    }
    # Where torch keeps them: beside the parameters for one kernel that steps all, else on the CPU.
    counters = parts[0].device if any(optimizer.defaults.get(each) for each in ("fused", "capturable")) else "cpu"
    at = 0
    for part in parts if state else ():
        end = at + part.numel()
        optimizer.state[part] = {
            name: tensor[at:end].to(part.device, copy=True) if tensor.dim() else tensor.to(counters, copy=True)
            for name, tensor in state.items()
        }
        at = end
