"""What LBFGS has learnt of the curvature, given up where a push has moved the model.

    inner steps --> end of the round --push--> fresh parameters, elsewhere --> LBFGS begins anew

LBFGS compares each gradient with the one before, and takes the difference for that of its own last step. Where the
servers have moved the model in between, by other workers' changes or by outer momentum, it is not: with an outer
momentum of 0.9 the loss of a small network went from 0.004 to 2e9 in the second round; with a new beginning, to 0.0008.
Other optimizers of torch keep averages, which a jump does not spoil.
"""

from collections.abc import Sequence

import torch

#: Part of a round's change that the push may add and count as rounding: fp32 gives start - (start - end), not end.
ROUNDING = 1e-3


class CurvatureHistory:
    """The history of the inner optimizer of local steps; nothing unless that is LBFGS.

    Args:
        inner: inner optimizer.
        parameters: tensors that it steps.

    Memory: with LBFGS two more copies of the parameters, fewer than its history has.
    """

    def __init__(self, inner: torch.optim.Optimizer, parameters: Sequence[torch.Tensor]) -> None:
        self._inner = inner
        self._parameters = parameters if isinstance(inner, torch.optim.LBFGS) else ()
        self._start: list[torch.Tensor] = []
        self._end: list[torch.Tensor] = []

    def end_round(self) -> None:
        """Note where the inner steps of a round have led."""
        self._end = self._now()

    def begin_round(self) -> None:
        """Note where a round begins; give the history up if that is not where the last one ended."""
        now = self._now()
        if self._end:
            moved = sum((a - b).norm().square() for a, b in zip(now, self._end, strict=True))
            made = sum((a - b).norm().square() for a, b in zip(self._start, self._end, strict=True))
            if not moved <= ROUNDING**2 * made:  # also where one is NaN
                for state in self._inner.state.values():
                    state.clear()
        self._start, self._end = now, []

    def _now(self) -> list[torch.Tensor]:
        return [parameter.detach().float().clone() for parameter in self._parameters]
