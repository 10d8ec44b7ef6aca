r"""The gradients of one model as a push takes them: unscaled, dense, finite or left out.

Rules of this file
  1. Reads ``.grad`` and never changes it.
  2. A step whose gradients are not finite is pushed with weight 0: nobody waits for this worker, nothing is applied.

    torch.amp.GradScaler --grad_scale, found_inf--> at_step() --> gather(): times 1 / scale
                                                              \-> left_out: the first tensor that is not finite

What torch does with a parameter that has no gradient is to leave it alone, weight decay and momentum too. Here that
holds for a *bucket* none of whose parameters has a gradient on any worker; in a bucket that mixes them, or where
another worker has a gradient, one that is missing counts as zero, as it does in the mean of one large batch.

Source: torch/amp/grad_scaler.py, ``_step_supports_amp_scaling``; Micikevicius et al., ICLR 2018, arXiv:1710.03740.
"""

import logging
import warnings
from collections.abc import Callable, Sequence

import torch

from torch_ps.common.errors import PsError
from torch_ps.common.plan import Bucket
from torch_ps.worker.gradients.finite import FiniteCheck
from torch_ps.worker.gradients.flat_tensors import gather

log = logging.getLogger("torch_ps.worker")


class Gradients:
    """Of the parameters of one model, which are in the order of ``Model.tensors()``.

    Args:
        accumulate: backward passes whose sum ``.grad`` is; their mean is what counts.
        decays: whether weight decay moves a parameter of this group whose gradient is zero.

    Attributes:
        passes: of the coming push, where they are fewer than ``accumulate``; else 0.
        scaled: the coming push is one of a GradScaler's, so what left before ``at_step`` was scaled.
        left_out: why the coming push has weight 0, the name of a tensor; "" when it has its weight.
        num_left_out: pushes of weight 0 so far; ``in_a_row`` of them since the last that was not.
    """

    def __init__(
        self,
        parameters: Sequence[torch.Tensor],
        names: Sequence[str],
        accumulate: int = 1,
        decays: Callable[[int], bool] = lambda group: False,
    ) -> None:
        self.parameters, self.names, self._accumulate, self._decays = parameters, names, accumulate, decays
        self.finite = FiniteCheck(parameters, names)
        self._warned = self._warned_of_zeros = False
        self._had: set[int] = set()  # parameters that have had a gradient, in buckets where some lack theirs
        self.num_left_out, self.in_a_row = 0, 0
        self.reset()

    def reset(self) -> None:
        """Forget the push that is done."""
        self.passes, self.scaled, self.left_out = 0, False, ""
        self._scale: float | None = None
        self._scales_differ = False
        self._dense: dict[int, torch.Tensor] = {}

    def at_step(self, scale: torch.Tensor | None, overflow: torch.Tensor | None, *, last: bool) -> None:
        """Note what a GradScaler has set on the optimizer before it called ``step``.

        Args:
            scale: factor of the gradients; None when ``unscale_`` has taken it out, or where there is no GradScaler.
            overflow: above 0 when a gradient is not finite; None where there is no GradScaler.
            last: this ``step`` pushes; the others of ``accumulate`` do not.

        Raises:
            PsError: ``unscale_`` was called while gradients are still being accumulated.
        """
        if overflow is None:
            return
        if scale is None and not last:
            raise PsError(
                "scaler.unscale_ was called before the last backward pass of accumulate, so scaled and unscaled "
                "gradients would be added; call it in the last one only"
            )
        self.scaled = True
        value = None if scale is None else float(scale)
        self._scales_differ |= self._scale is not None and value != self._scale
        self._scale = value
        if last and (self._scales_differ or float(overflow) > 0):
            self.left_out = self._first_not_finite() or "a scale that changed while gradients were accumulated"

    def check(self) -> None:
        """Look whether every gradient is finite; only while none has left."""
        self.left_out = self.left_out or self._first_not_finite()

    def report(self, worker: str, step: str) -> None:
        """Count and say what is left out.

        Args:
            step: which one it is, in words.
        """
        self.in_a_row = self.in_a_row + 1 if self.left_out else 0
        if self.left_out:
            self.num_left_out += 1
            level = logging.INFO if self.scaled else logging.WARNING  # a GradScaler finds its scale in this way
            log.log(level, "gradient of worker %s, %s is not finite in %s: not applied", worker, step, self.left_out)

    def missing(self, bucket: Bucket) -> bool:
        """Whether no parameter of this bucket has a gradient."""
        found = [piece.tensor for piece in bucket.pieces if self.parameters[piece.tensor].grad is not None]
        if len(found) not in (0, len(bucket.pieces)):
            self._warn_of_zeros(bucket)
        self._had.update(found)
        return not found

    def _warn_of_zeros(self, bucket: Bucket) -> None:
        """Where a zero does what no gradient would not."""
        for index in () if self._warned_of_zeros else {piece.tensor for piece in bucket.pieces}:
            if self.parameters[index].grad is None and (index in self._had or self._decays(bucket.group)):
                self._warned_of_zeros = True
                log.warning(
                    "parameter %r has no gradient, which counts as zero beside parameters of its group that have one: "
                    "weight decay and momentum move it, where torch alone would not; give such parameters a group of "
                    "their own",
                    self.names[index],
                )
                return

    def gather(self, bucket: Bucket, into: torch.Tensor) -> torch.Tensor:
        """Copy the gradients of one bucket into ``into``, shape (numel,), fp32; zeros when they are left out."""
        if self.left_out:
            return into.zero_()
        gather(bucket, {piece.tensor: self._gradient(piece.tensor) for piece in bucket.pieces}, into)
        return self.averaged(into)

    def averaged(self, values: torch.Tensor) -> torch.Tensor:
        """What was read from a ``.grad`` without its scale, and as the mean of the accumulated passes; in place."""
        if self._scale is not None:
            values.mul_(1 / self._scale)
        passes = self.passes or self._accumulate
        return values.div_(passes) if passes > 1 else values

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
        return self.finite.first_not([parameter.grad for parameter in self.parameters])


class NoGradients:
    """What a push takes its buckets from where there is no gradient: as if no parameter had one."""

    left_out, num_left_out, in_a_row = "", 0, 0

    def check(self) -> None:
        """There is nothing that could be infinite."""

    def report(self, worker: str, step: str) -> None:
        """Nothing is left out."""

    def missing(self, bucket: Bucket) -> bool:
        return True

    def gather(self, bucket: Bucket, into: torch.Tensor) -> torch.Tensor:
        return into.zero_()

    def reset(self) -> None:
        """Nothing is kept."""
