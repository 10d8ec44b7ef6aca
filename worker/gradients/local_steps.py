"""Local steps: H steps of the worker's own optimizer, then one push of what they changed (DiLoCo).

    start   <-- fresh parameters, as the last push brought them
    H times     backward --> inner step: the optimizer that the user wrapped, on the model itself
    push        start - end, the pseudo-gradient, for the servers' outer optimizer: SGD with Nesterov momentum

A *round* is the steps between two pushes. With learning rate 1 and no momentum the outer step is the mean of the
workers' models.

Rules of this file
  1. The inner optimizer may be of any class: it runs here, on whole tensors, and keeps its state from round to round
     (but see ``curvature.py`` for LBFGS).
  2. An inner step whose gradients are not finite is not made and its samples do not count. A round in which none was
     made, or whose end is not finite, is pushed with weight 0: nobody waits for this worker, nothing is applied.
  3. After a push, also one that failed, the next round begins at what the model holds then: no change is pushed twice.

Memory on each worker: one more fp32 copy of the parameters (the start), and the state of the inner optimizer.

Source: Douillard et al., DiLoCo, arXiv:2311.08105; Liu et al., arXiv:2401.09135, for the asynchronous form.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from torch_ps.common.options.worker_config import DEFAULT_OUTER_LR, DEFAULT_OUTER_MOMENTUM, WorkerConfig
from torch_ps.common.plan import Bucket
from torch_ps.worker.gradients.curvature import CurvatureHistory
from torch_ps.worker.gradients.flat_tensors import FlatTensors, empty_fp32
from torch_ps.worker.gradients.gradients import Gradients

log = logging.getLogger("torch_ps.worker")

Closure = Callable[[], Any]


def outer_optimizer(inner: torch.optim.Optimizer, config: WorkerConfig) -> torch.optim.Optimizer:
    """The optimizer that the servers run over the parameters of ``inner``, in the same groups. It never steps here."""
    momentum = DEFAULT_OUTER_MOMENTUM if config.outer_momentum is None else config.outer_momentum
    return torch.optim.SGD(
        [{"params": list(group["params"])} for group in inner.param_groups],
        lr=DEFAULT_OUTER_LR if config.outer_lr is None else config.outer_lr,
        momentum=momentum,
        nesterov=momentum > 0,
    )


def reuse_first_loss(closure: Closure | None, loss: Any) -> Closure | None:
    """Wrap ``closure`` for the inner optimizer: the first result is ``loss``, whose gradients are there already."""
    if closure is None:
        return None
    results = [loss]
    return lambda: results.pop() if results else closure()


class LocalSteps:
    """The rounds of one worker: gives a push pseudo-gradients as ``Gradients`` gives it gradients.

    Args:
        steps: inner steps of a round.
        inner: optimizer that makes the inner steps.
        gradients: gradients of the inner steps.
        flat: tensors of the model.
        buckets: buckets with parameters.

    Attributes:
        left_out: reason why the coming push has weight 0; "" if it has its weight.
        num_left_out: inner steps, and rounds with an end that is not finite, that were left out so far.
        in_a_row: number of these since the last round that was pushed with a weight.
        applied: sum of the weights of this round's inner steps that were made.
        passed: sum of the weights of all inner steps of this round, also of those left out.
    """

    def __init__(
        self,
        steps: int,
        inner: torch.optim.Optimizer,
        gradients: Gradients,
        flat: FlatTensors,
        buckets: Sequence[Bucket],
    ) -> None:
        self._steps, self._inner, self._gradients = steps, inner, gradients
        self._parameters, self._flat, self._buckets = gradients.parameters, flat, buckets
        self._start = {bucket.index: empty_fp32(bucket.numel, device=flat.device) for bucket in buckets}
        self._curvature = CurvatureHistory(inner, self._parameters)
        self.num_left_out, self.in_a_row = 0, 0
        self.reset()

    def reset(self) -> None:
        """Begin a round at what the model holds."""
        self.left_out = ""
        self.applied, self.passed = 0.0, 0.0
        self._passes, self._made = 0, 0  # inner steps that were due so far, and those that were made
        self._stepped: set[int] = set()  # parameters that had a gradient in some inner step
        for bucket in self._buckets:
            self._flat.read(bucket, self._start[bucket.index])
        self._curvature.begin_round()

    @property
    def begun(self) -> bool:
        """Whether this round has an inner step already."""
        return self._passes > 0

    def step(self, weight: float, worker: str, closure: Closure | None) -> bool:
        """Make one inner step with the gradients that the parameters have.

        Args:
            weight: sum of the weights of the passes since the last inner step.
            worker: name of the worker, for the log.
            closure: function that evaluates the model, for an optimizer that calls it, such as LBFGS.

        Returns:
            Whether the round is complete, so that a push is due.
        """
        self._passes += 1
        self.passed += weight
        self._gradients.put_back()
        try:
            self._gradients.check()
            self._gradients.report(worker, f"inner step {self._passes} of {self._steps}")
            if self._gradients.left_out:
                self._count_left_out()
                return self._passes == self._steps
            for index, parameter in enumerate(self._parameters):
                if parameter.grad is not None:
                    self._gradients.average(parameter.grad.detach())
                    self._stepped.add(index)
        finally:
            self._gradients.reset()
        self._inner.step(*(() if closure is None else (closure,)))
        self._made += 1
        self.applied += weight
        return self._passes == self._steps

    def _count_left_out(self) -> None:
        self.num_left_out += 1
        self.in_a_row += 1

    # -------------------------------------------------------------- the push

    def check(self) -> None:
        """Leave the push out if the round has made no step, or ends not finite. Call it while no bucket has left."""
        self._curvature.end_round()
        self.left_out = self._gradients.finite.first_not_finite(self._parameters) if self._made else "every inner step"

    def report(self, worker: str, step: str) -> None:
        """Count and log a round that is left out; its inner steps were counted when they were left out."""
        if not self.left_out:
            self.in_a_row = 0
        elif self._made:
            self._count_left_out()
            log.warning("local steps of worker %s, %s end not finite in %s: not applied", worker, step, self.left_out)

    def missing(self, bucket: Bucket) -> bool:
        """Whether no parameter of a bucket had a gradient in any inner step."""
        return all(piece.tensor not in self._stepped for piece in bucket.pieces)

    def absent(self, bucket: Bucket) -> list[int]:
        """Positions of the pieces of a bucket whose parameter had no gradient in any inner step."""
        return [at for at, piece in enumerate(bucket.pieces) if piece.tensor not in self._stepped]

    def gather(self, bucket: Bucket, into: torch.Tensor) -> torch.Tensor:
        """Write the pseudo-gradient of one bucket to ``into``, shape (numel,), fp32; zeros if the push is left out."""
        if self.left_out:
            return into.zero_()
        start = self._start[bucket.index].to(into.device)  # which differs if the model has moved since
        return torch.sub(start, self._flat.read(bucket, into), out=into)
