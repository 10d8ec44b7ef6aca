r"""The gradients of one model as a push takes them: unscaled, dense, finite or left out.

Rules of this file
  1. Reads ``.grad`` and changes it only where passes are accumulated: each pass is taken out of it at its own ``step``,
     whatever the loop zeroes in between, and the last ``step`` puts the sum back.
  2. A step whose gradients are not finite is pushed with weight 0: nobody waits for this worker, nothing is applied.
  3. A parameter without a gradient is named as absent, so that the servers leave it alone as torch does, weight decay
     and momentum included.

    torch.amp.GradScaler --grad_scale, found_inf--> begin_step() --> gather(): times 1 / scale
                                                                 \-> left_out: the first tensor that is not finite

Source: torch/amp/grad_scaler.py, ``_step_supports_amp_scaling``; Micikevicius et al., ICLR 2018, arXiv:1710.03740.
"""

import logging
import math
import warnings
from collections.abc import Iterable, Sequence

import torch
from torch._utils import _flatten_dense_tensors

from torch_ps.common.errors import PsError
from torch_ps.common.plan import Bucket
from torch_ps.worker.gradients.flat_tensors import gather, in_place
from torch_ps.worker.gradients.passes import Passes

log = logging.getLogger("torch_ps.worker")

#: Elements up to which tensors are checked together: one call for all of them, and a copy that stays in the cache, in
#: place of a call for each.
SMALL = 16384


class Gradients:
    """The gradients of one model.

    Args:
        parameters: trained parameters, in the order of ``Model.tensors()``.
        names: names of the parameters.
        passes: backward passes of the coming push, whose mean is pushed.

    Attributes:
        passes: backward passes of the coming push.
        scaled: whether a GradScaler scales the coming push, so that what left before ``begin_step`` was scaled.
        left_out: reason why the coming push has weight 0, such as the name of a tensor; "" if it has its weight.
        num_left_out: pushes of weight 0 so far.
        in_a_row: pushes of weight 0 since the last one that had its weight.
        finite: finds values that are not finite in tensors like ``parameters``.
    """

    def __init__(
        self,
        parameters: Sequence[torch.Tensor],
        names: Sequence[str],
        passes: Passes,
    ) -> None:
        self.parameters, self.names, self.passes = parameters, names, passes
        self.finite = FiniteCheck(parameters, names)
        self._warned = False
        self.num_left_out, self.in_a_row = 0, 0
        self.reset()

    def reset(self) -> None:
        """Begin a new push; the last one is done."""
        self.scaled, self.left_out = False, ""
        self._scale: float | None = None
        self._overflow = False
        self._dense: dict[int, torch.Tensor] = {}
        self._earlier: dict[int, torch.Tensor] = {}  # by parameter: sum of the earlier passes
        self._earlier_scaled = False  # whether these have the scale of the last pass, if that has one

    def begin_step(self, scale: torch.Tensor | None, overflow: torch.Tensor | None, *, last: bool) -> None:
        """Note what a GradScaler has set on the optimizer before it called ``step``.

        Args:
            scale: factor of the gradients; None if ``unscale_`` has removed it, or without a GradScaler.
            overflow: above 0 if a gradient is not finite; None without a GradScaler.
            last: whether this pass is the last one of the push.
        """
        self._dense.clear()
        if overflow is not None:
            self.scaled = True
            self._scale = None if scale is None else float(scale)
            self._overflow |= float(overflow) > 0
        if not last:
            self._take_pass(told=overflow is not None)
        elif self._overflow:
            self.left_out = self._first_not_finite() or "an earlier pass"

    def _take_pass(self, *, told: bool) -> None:
        """Take the gradients of one pass out of ``.grad``, so that no way to zero them there loses it."""
        if told:
            self._unscale(parameter.grad for parameter in self.parameters)
            self._unscale(self._earlier.values() if self._earlier_scaled else ())
            self._scale, self._earlier_scaled = None, False
        else:
            self._earlier_scaled |= not self._earlier
        for index, parameter in enumerate(self.parameters):
            if parameter.grad is not None:
                earlier, gradient = self._earlier.get(index), parameter.grad.detach()
                self._earlier[index] = gradient if earlier is None else _add(earlier, gradient)
                parameter.grad = None

    def put_back(self) -> None:
        """Add the earlier passes to ``.grad``. Call it once a push begins.

        Raises:
            PsError: the last pass was unscaled by a GradScaler that has not seen the earlier ones.
        """
        if not self._earlier:
            return
        if self._earlier_scaled and self.scaled and self._scale is None:
            raise PsError(
                "scaler.unscale_ was called in the last backward pass of accumulate, and the earlier ones are still "
                "scaled: their step was optimizer.step(); call scaler.step(optimizer) and scaler.update() in each pass"
            )
        if not self._earlier_scaled:
            self._unscale(parameter.grad for parameter in self.parameters)
            self._scale = None
        for index, earlier in self._earlier.items():
            parameter = self.parameters[index]
            total = earlier if parameter.grad is None else _add(parameter.grad.detach(), earlier)
            if parameter.grad is None or total.layout is not torch.strided or total.layout is not parameter.grad.layout:
                parameter.grad = total
        self._earlier.clear()

    def _unscale(self, gradients: Iterable[torch.Tensor | None]) -> None:
        for gradient in gradients if self._scale is not None else ():
            if gradient is not None:
                gradient.detach().mul_(1 / self._scale)  # type: ignore[operator]

    def check(self) -> None:
        """Leave the push out if a gradient is not finite. Call it while no bucket has left."""
        self.left_out = self.left_out or self._first_not_finite()

    def report(self, worker: str, step: str) -> None:
        """Count and log a push that is left out.

        Args:
            worker: name of the worker.
            step: number of the step, in words.
        """
        self.in_a_row = self.in_a_row + 1 if self.left_out else 0
        if self.left_out:
            self.num_left_out += 1
            level = logging.INFO if self.scaled else logging.WARNING  # a GradScaler finds its scale in this way
            log.log(level, "gradient of worker %s, %s is not finite in %s: not applied", worker, step, self.left_out)

    def missing(self, bucket: Bucket) -> bool:
        """Whether no parameter of a bucket has a gradient."""
        return all(
            self.parameters[piece.tensor].grad is None and piece.tensor not in self._earlier for piece in bucket.pieces
        )

    def absent(self, bucket: Bucket) -> list[int]:
        """Positions of the pieces of a bucket whose parameter has no gradient."""
        return [at for at, piece in enumerate(bucket.pieces) if self.parameters[piece.tensor].grad is None]

    def so_far(self, order: Iterable[torch.Tensor] = ()) -> list[torch.Tensor]:
        """The gradients that there are, each with the sum of its earlier passes.

        Args:
            order: parameters whose gradients come first, in this order; the others follow in their own.
        """
        found, place = [], {id(parameter): index for index, parameter in enumerate(self.parameters)}
        first = dict.fromkeys(place[id(each)] for each in order if id(each) in place)
        for index in first | dict.fromkeys(place.values()):
            passes = [each for each in (self._earlier.get(index), self.parameters[index].grad) if each is not None]
            if passes:
                found.append(passes[0] if len(passes) == 1 else passes[0] + passes[1])
        return found

    def scale(self, factor: torch.Tensor) -> None:
        """Multiply every gradient and the sums of the earlier passes, in place."""
        for gradient in (*(each.grad for each in self.parameters), *self._earlier.values()):
            if gradient is not None:
                gradient.detach().mul_(factor.to(gradient.device))

    def forget_dense(self) -> None:
        """Forget the dense copies of sparse gradients, which the loop may have changed since."""
        self._dense.clear()

    def gather(self, bucket: Bucket, into: torch.Tensor) -> torch.Tensor:
        """Copy the gradients of one bucket into ``into``, shape (numel,), fp32; zeros if the push is left out."""
        if self.left_out:
            return into.zero_()
        gather(bucket, {piece.tensor: self._gradient(piece.tensor) for piece in bucket.pieces}, into)
        for piece in bucket.pieces if self._earlier else ():  # during the backward of the last pass
            if (earlier := self._earlier.get(piece.tensor)) is not None:
                dense = earlier if earlier.layout is torch.strided else earlier.to_dense()
                into[piece.offset : piece.offset + piece.stop - piece.start].add_(
                    dense.reshape(-1)[piece.start : piece.stop]
                )
        return self.average(into)

    def in_place(self, bucket: Bucket) -> list[torch.Tensor] | None:
        """The gradients of one bucket as flat fp32 tensors, one after the other, the large ones where they are.

        Returns:
            None if ``gather`` has to change the values, or nothing would be saved.
        """
        if self.left_out or self._earlier or self._scale is not None or self.passes.in_mean > 1:
            return None
        return in_place(bucket, {piece.tensor: self.parameters[piece.tensor].grad for piece in bucket.pieces})

    def average(self, values: torch.Tensor) -> torch.Tensor:
        """Turn values of ``.grad`` into the mean of the accumulated passes, without the scale; in place."""
        if self._scale is not None:
            values.mul_(1 / self._scale)
        return values.div_(self.passes.in_mean) if self.passes.in_mean > 1 else values

    def _gradient(self, index: int) -> torch.Tensor | None:
        gradient = self.parameters[index].grad
        if gradient is None or gradient.layout is torch.strided:
            return gradient
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"the gradient of {self.names[index]!r} is sparse; it is pushed as a dense one of all "
                f"{self.parameters[index].numel():,} elements, and the optimizer steps all of them",
                stacklevel=2,
            )
        if index not in self._dense:  # once for all buckets of a large embedding
            self._dense[index] = gradient.to_dense()
        return self._dense[index]

    def _first_not_finite(self) -> str:
        return self.finite.first_not_finite([parameter.grad for parameter in self.parameters])


def _add(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The sum of two gradients, in place of ``one`` unless only ``other`` is dense."""
    return other.add(one) if one.layout is not torch.strided and other.layout is torch.strided else one.add_(other)


class NoGradients:
    """Stands in for ``Gradients`` in a push of weight 0: no parameter has a gradient."""

    left_out, num_left_out, in_a_row = "", 0, 0

    def check(self) -> None:
        """Every gradient is finite, as there is none."""

    def report(self, worker: str, step: str) -> None:
        """Nothing is left out, so nothing is logged."""

    def missing(self, bucket: Bucket) -> bool:
        return True

    def absent(self, bucket: Bucket) -> list[int]:
        return list(range(len(bucket.pieces)))

    def gather(self, bucket: Bucket, into: torch.Tensor) -> torch.Tensor:
        return into.zero_()

    def reset(self) -> None:
        """Nothing is kept from push to push."""


class FiniteCheck:
    """Finds values that are not finite in tensors, or their gradients, before anything of them leaves.

    Args:
        parameters: tensors that give the sizes, in the order of those that are checked.
        names: names of the tensors.

    Source: a sum is finite only if every value is. torch.amp.GradScaler checks each value, for it scales each anyway.
    """

    def __init__(self, parameters: Sequence[torch.Tensor], names: Sequence[str]) -> None:
        self._names = names
        self._small = [parameter.numel() <= SMALL for parameter in parameters]

    def first_not_finite(self, tensors: Sequence[torch.Tensor | None]) -> str:
        """The first of ``tensors`` with a value that is not finite, in words; "" if there is none.

        Cost: one sum per large tensor and one of all small ones, one synchronisation with a GPU.
        """
        if math.isfinite(self._sum(tensors)):
            return ""
        # A sum of finite values may overflow, so each value is checked now.
        for tensor, name in zip(tensors, self._names, strict=True):
            if tensor is not None and not _values(tensor).float().isfinite().all().item():
                return f"tensor {name!r}"
        return ""

    def _sum(self, tensors: Sequence[torch.Tensor | None]) -> float:
        together, sums = [], []
        for tensor, small in zip(tensors, self._small, strict=True):
            if tensor is None:
                continue
            if small and tensor.is_cpu and tensor.layout is torch.strided:
                together.append(tensor)
            else:
                sums.append(_sum_of(tensor))
        if together:
            sums.append(_sum_of(_flatten_dense_tensors(together)))  # type: ignore[no-untyped-call]
        if len({each.device for each in sums}) > 1:
            sums = [each.cpu() for each in sums]
        return torch.stack(sums).sum().item() if len(sums) > 1 else sum(each.item() for each in sums)


def _sum_of(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype is torch.float32 and tensor.layout is torch.strided:
        return tensor.detach().sum()  # the usual case, without what the others need
    return _values(tensor).sum(dtype=torch.float32)


def _values(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach() if tensor.layout is torch.strided else tensor.detach().coalesce().values()
