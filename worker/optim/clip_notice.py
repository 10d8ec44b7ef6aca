"""Notices a loop that clips each worker's own gradient where the mean of all workers is meant, and says so once.

``torch.nn.utils.clip_grad_norm_`` multiplies all gradients by one factor, which differs from step to step. So a few
values are noted when backward has computed them, and compared with those that ``step`` finds:

    hook: values of a few parameters --> step: the same factor for all? --> another one in another step? --> told

A GradScaler's factor is a power of two, and a loop that averages its own passes has the same factor in every step:
neither is told.
"""

import logging
import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

log = logging.getLogger("torch_ps.worker")

#: Parameters that are looked at, and values of each.
PARAMETERS, VALUES = 4, 4
#: Steps that are all looked at; of later ones every ``SELDOM``-th is.
FIRST_STEPS, SELDOM = 50, 16


class ClipNotice:
    """The gradients of a few parameters, as backward left them.

    Args:
        parameters: trained parameters.
        worker: name of the worker, for the log.
    """

    def __init__(self, parameters: Sequence[torch.Tensor], worker: str) -> None:
        self._worker, self._steps = worker, 0
        self._last_factor = 1.0  # the last one below 1
        self._noted: dict[int, torch.Tensor] = {}
        stride = max(len(parameters) // PARAMETERS, 1)
        self._watched = list(parameters[::stride][:PARAMETERS])
        self._handles = [
            each.register_post_accumulate_grad_hook(_hook(weakref.ref(self), index))  # type: ignore[no-untyped-call]
            for index, each in enumerate(self._watched)
        ]

    def note(self, index: int, parameter: torch.Tensor) -> None:
        """Note some values of a gradient that backward has computed."""
        if self._handles and (self._steps < FIRST_STEPS or self._steps % SELDOM == 0):
            values = _some_values(parameter.grad)
            if values is not None:
                self._noted[index] = values.clone()

    def check(self, num_workers: int) -> None:
        """Compare the gradients with what was noted. Call it when ``step`` begins.

        Args:
            num_workers: number of workers in the mean of the last step.
        """
        self._steps += 1
        factor = self._factor() if self._noted and num_workers > 1 else 1.0
        self._noted.clear()
        if factor >= 1 or math.frexp(factor)[0] == 0.5:
            return
        if self._last_factor < 1 and not math.isclose(factor, self._last_factor, rel_tol=1e-3):
            log.warning(
                "the gradients of worker %s are all multiplied by one factor between backward and step, as "
                "torch.nn.utils.clip_grad_norm_ does: that clips the gradient of each worker, not their mean, as DDP "
                "would; write optimizer.clip_grad_norm_(max_norm) in its place, or start ps-serve with --clip-norm",
                self._worker,
            )
            self.close()
        self._last_factor = factor

    def close(self) -> None:
        """Look at nothing any more."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._noted.clear()

    def _factor(self) -> float:
        """The factor between all noted values and those of now; 1.0 if it is not the same for all."""
        before, after = list[torch.Tensor](), list[torch.Tensor]()
        for index, noted in self._noted.items():
            values = _some_values(self._watched[index].grad)
            if values is None or values.shape != noted.shape or values.device != noted.device:
                return 1.0
            before.append(noted.double())
            after.append(values.double())
        old, new = torch.cat(before), torch.cat(after)
        ratios = (new / old)[old != 0].tolist()
        rounding = 8 * max(torch.finfo(noted.dtype).eps for noted in self._noted.values())
        if len(ratios) < 2 or not max(ratios) - min(ratios) <= rounding * abs(min(ratios)):
            return 1.0
        factor: float = sum(ratios) / len(ratios)
        return factor if 0 < factor < 1 - rounding else 1.0


def _some_values(gradient: torch.Tensor | None) -> torch.Tensor | None:
    """Some values of a gradient, a view where it is contiguous; None where it has none that can be compared."""
    if gradient is None or gradient.layout is not torch.strided or not gradient.is_floating_point():
        return None
    flat = gradient.detach().reshape(-1)
    return flat[:: max(len(flat) // VALUES, 1)][:VALUES]


def _hook(notice: "weakref.ref[ClipNotice]", index: int) -> Callable[[Any], None]:
    def hook(parameter: torch.Tensor) -> None:
        if (watching := notice()) is not None:
            watching.note(index, parameter)

    return hook
