"""Whether one optimizer of a process takes the place of another, as when the cell of a notebook is run again.

    the same parameters          the former optimizer of this model
    all its modules are gone     the former optimizer of a model that the script has thrown away

Either is closed before the new one joins the same job; see ``worker/runtime/jobs_here.py``. Any other optimizer in the
same job trains a model that is still there, so the new one is refused.
"""

import weakref
from collections.abc import Iterable

import torch
from torch import nn


class TrainedModules:
    """The modules that hold the parameters of one optimizer. They are not kept alive.

    Args:
        model: module that was given to the optimizer.
        groups: groups of the optimizer.
    """

    def __init__(self, model: nn.Module, groups: Iterable[dict[str, list[torch.Tensor]]]) -> None:
        self._parameters = {id(parameter) for group in groups for parameter in group["params"]}
        self._modules = [
            weakref.ref(module)
            for module in model.modules()
            if any(id(parameter) in self._parameters for parameter in module.parameters(recurse=False))
        ]

    def replaced_by(self, other: "TrainedModules") -> bool:
        """Whether an optimizer of ``other`` takes the place of that of these modules."""
        gone = all(module() is None for module in self._modules)
        return gone or not self._parameters.isdisjoint(other._parameters)
