"""Detects in-place changes to parameters that cannot reach the servers and would be lost.

    written to in place     with overlap="eager", and with local steps before the first step, the next step brings the
                            servers' values, without the change (elsewhere ``weight_writes.py`` finds what was
                            written, and it counts)
    unfrozen                a parameter that was frozen when the optimizer was made is not on the servers

A write is an error before anything of the step leaves. Torch's count of writes leaves out ``p.data.clamp_()`` and the
like.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from torch_ps.common.errors import PsError


class FrozenParameters:
    """The parameters of the optimizer that were frozen when it was wrapped, so that the servers do not have them.

    Args:
        model: module that names the parameters.
        parameters: parameters that the servers have.
        groups: groups of the optimizer.
    """

    def __init__(
        self, model: nn.Module, parameters: Sequence[torch.Tensor], groups: Sequence[Mapping[str, Any]]
    ) -> None:
        served = {id(parameter) for parameter in parameters}
        called = {id(parameter): name for name, parameter in model.named_parameters()}
        left = [parameter for group in groups for parameter in group["params"] if id(parameter) not in served]
        self._frozen = [(called.get(id(parameter), str(list(parameter.shape))), parameter) for parameter in left]

    def check(self) -> None:
        """Refuse to train one of them. Call it before anything of a step leaves.

        Raises:
            PsError: a parameter was unfrozen; says which, and what to do.
        """
        for name, parameter in self._frozen:
            if parameter.requires_grad:
                raise PsError(
                    f"parameter {name!r} was frozen when the optimizer was made, so the servers do not have it, and is "
                    "to be trained now; make the optimizer while all that will be trained requires a gradient, and "
                    "freeze with requires_grad_(False) afterwards"
                )


class UntrackedWrites:
    """Watches torch's count of the writes to each tensor.

    Args:
        parameters: parameters that the servers have, in the order of ``Model.tensors()``.
        names: names of the tensors, in the same order.
        always: whether to watch after the first step, too. False where values come while the loop goes on.
    """

    def __init__(self, parameters: Sequence[torch.Tensor], names: Sequence[str], *, always: bool) -> None:
        self._parameters, self._names, self._always = parameters, names, always
        self._watches = True
        self._writes: list[int] = []
        self.settle()

    def settle(self) -> None:
        """Note that the servers' values are in: what is written from now on is the loop's."""
        if self._watches:
            self._writes = [parameter._version for parameter in self._parameters]

    def lose_count(self) -> None:
        """Stop watching until ``settle``: some of the servers' values may come late."""
        self._writes = []

    def check(self, version: int) -> None:
        """Look for writes. Call it before anything of a step leaves.

        Args:
            version: version of the parameters.

        Raises:
            PsError: something would be lost; says what, and what to do.
        """
        if not self._watches or not self._writes:
            return
        self._watches = self._always
        for name, parameter, writes in zip(self._names, self._parameters, self._writes, strict=False):
            if parameter._version == writes:
                continue
            if not version:
                raise PsError(
                    f"parameter {name!r} was written to after the optimizer was made, which the servers know nothing "
                    "of: load or initialise the model first, for these values may become the job's; and what "
                    "changes weights beside the optimizer, such as nn.Embedding(max_norm=...), cannot be served"
                )
            raise PsError(
                f"parameter {name!r} was written to between two steps, which overlap='eager' promises not to do: the "
                "servers would go on without what was written; leave overlap out, and it counts"
            )
