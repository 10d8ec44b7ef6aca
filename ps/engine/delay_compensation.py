"""--delay-compensation: corrects a stale gradient to the current parameters by a first-order Taylor term.

    gradient + strength * gradient * gradient * (current parameters - parameters that the worker had pulled)

The square of the gradient approximates the diagonal of the Hessian. The adaptive form divides the strength, element by
element, by the root of a running mean of squares, which adapts it to the scale of each gradient.

Rules of this file
  1. The values that a worker pulled are kept as the worker decoded them, with their version. A gradient computed from
     another version (a caller of the low-level client may hold an older one) is applied unchanged.
  2. Where a push has no gradient nothing is corrected, and the mean of squares stays.
  3. A correction that is beyond fp32 corrects nothing: the gradient is applied as it is.
  4. ``pulled``, ``wrote`` and ``correct`` run on apply threads; calls for one bucket never overlap. ``keep`` runs on
     the event loop and may drop a copy that a GPU stream still reads, hence ``keep_for_stream``.

Memory: one fp32 copy of the shard's parameters per worker; one more in the adaptive form.

Source: Zheng et al., ICML 2017, arXiv:1609.08326 (DC-ASGD-c and DC-ASGD-a).
"""

import math
from dataclasses import replace
from typing import Self

import torch

from torch_ps.common.devices import keep_for_stream
from torch_ps.common.plan import Bucket
from torch_ps.ps.core.effects import Apply
from torch_ps.ps.core.modes import Mode
from torch_ps.ps.core.roster import Roster
from torch_ps.ps.engine.parameter_store import Mean

#: Decay of the running mean of squares at each push, and the term that keeps its root above 0.
_DECAY, _EPSILON = 0.95, 1e-7

_Session = tuple[str, int]


class Compensator:
    """Delay compensation of one shard.

    Args:
        strength: Lambda of the paper, > 0.
        adaptive: Whether to divide the strength by the root of the running mean of squares.
    """

    def __init__(self, strength: float, *, adaptive: bool) -> None:
        self._strength, self._adaptive = strength, adaptive
        self._members: frozenset[_Session] = frozenset()
        self._pulled: dict[int, dict[_Session, tuple[int, torch.Tensor]]] = {}
        self._squares: dict[int, torch.Tensor] = {}

    @classmethod
    def of(cls, mode: Mode) -> Self | None:
        """The compensator that ``mode`` asks for; None: none."""
        if not mode.compensates:
            return None
        return cls(mode.compensation_strength, adaptive=mode.delay_compensation == "adaptive")

    def keep(self, roster: Roster) -> None:
        """Drop the copies of sessions that have left the roster."""
        self._members = frozenset((m.name, m.session) for m in roster.members)
        for of_bucket in tuple(self._pulled.values()):
            for session in [s for s in tuple(of_bucket) if s not in self._members]:
                of_bucket.pop(session, None)

    def squares(self, bucket: int) -> torch.Tensor | None:
        """The running mean of squares of one bucket, fp32 of shape (numel,), valid during a call for it; None: none."""
        return self._squares.get(bucket)

    def restore(self, bucket: int, squares: torch.Tensor) -> None:
        """Set the running mean of squares of one bucket, before the first step."""
        if self._adaptive:
            self._squares[bucket] = squares.clone()

    def pulled(self, bucket: int, worker: str, session: int, version: int, values: torch.Tensor) -> None:
        """Keep a copy of ``values``, fp32 of shape (numel,), which a worker gets for one bucket."""
        if (worker, session) not in self._members:
            return
        of_bucket = self._pulled.setdefault(bucket, {})
        _, copy = of_bucket.get((worker, session), (0, None))
        of_bucket[worker, session] = version, values.clone() if copy is None else keep_for_stream(copy).copy_(values)

    def wrote(self, bucket: int, worker: str, session: int, start: int, values: torch.Tensor) -> None:
        """Note that a worker computes from ``values`` of its own, fp32, instead of what it pulled from ``start`` on."""
        _, copy = self._pulled.get(bucket, {}).get((worker, session), (0, None))
        if copy is not None:
            keep_for_stream(copy)[start : start + values.numel()].copy_(values)

    def correct(self, bucket: Bucket, apply: Apply, mean: Mean, values: torch.Tensor) -> Mean:
        """The corrected gradient; ``values`` are fp32 of shape (numel,), and ``mean`` stays unchanged."""
        pushed, gradient = apply.contributions[0], mean.values
        version, before = self._pulled.get(bucket.index, {}).get((pushed.worker, pushed.session), (-1, None))
        if self._adaptive:
            squares = self._squares.setdefault(bucket.index, torch.zeros_like(values))
            for span in bucket.others(frozenset(mean.absent)):
                squares[span].mul_(_DECAY).addcmul_(gradient[span], gradient[span], value=1 - _DECAY)
        if before is None or version != apply.version - 1 - pushed.staleness:
            return mean
        change = torch.sub(values, keep_for_stream(before)).mul_(gradient)
        if self._adaptive:
            change.div_((squares + _EPSILON).sqrt_())
        corrected = torch.addcmul(gradient, change, gradient, value=self._strength)
        if not math.isfinite(corrected.sum().item()) and not corrected.isfinite().all():
            return mean
        return replace(mean, values=corrected)
