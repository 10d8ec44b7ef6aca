"""Looks whether the tensors of a model are finite, before anything of them leaves.

Source: a sum is finite only if every value is; torch.amp.GradScaler looks at each value, for it scales each anyway.
"""

import math
from collections.abc import Sequence

import torch
from torch._utils import _flatten_dense_tensors

#: Elements of a tensor that is looked at together with others: one call for all of them, and a copy that stays in the
#: cache, in place of a call for each.
SMALL = 16384


class FiniteCheck:
    """For tensors, or their gradients, that are those of ``parameters`` in this order."""

    def __init__(self, parameters: Sequence[torch.Tensor], names: Sequence[str]) -> None:
        self._names = names
        self._small = [parameter.numel() <= SMALL for parameter in parameters]

    def first_not(self, tensors: Sequence[torch.Tensor | None]) -> str:
        """The first of ``tensors`` with a value that is not finite, in words; "" if there is none.

        Cost: one sum per large tensor and one of all small ones, one synchronisation with a GPU.
        """
        if math.isfinite(self._sum(tensors)):
            return ""
        # A sum of finite values may overflow, too, so look closely.
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
