"""Hyperparameters that are numbers of torch or numpy: ``lr=torch.tensor(0.01)``, ``lr=np.float32(0.01)``.

Computing with such a number rounds to its type, and so gives other bits than the Python number of the same value does.
A server therefore makes the same kind of number again before it steps.

    torch.tensor(0.01) --of()--> TypedNumber("torch.float32", 0.00999...) --wire--> live() --> torch.tensor(0.00999...)
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

#: Types by the name that travels. numpy's float64 and integers compute as Python's numbers do and become those.
TYPES: dict[str, Any] = {
    **{
        f"torch.{name}": getattr(torch, name)
        for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
    },
    "numpy.float32": np.float32,
    "numpy.float16": np.float16,
}


@dataclass(frozen=True, slots=True)
class TypedNumber:
    """A number and its type.

    Args:
        type: one of ``TYPES``.
        value: finite value, as a Python number.

    Raises:
        ValueError: the type is unknown, or does not have this value.
    """

    type: str
    value: float

    def __post_init__(self) -> None:
        if self.type not in TYPES:
            raise ValueError(f"{self.type[:40]!r} is no type of a hyperparameter")
        if not math.isfinite(self.value):
            raise ValueError(f"a hyperparameter is {self.value}; a finite number is needed")
        try:
            held = self.live().item()
        except (RuntimeError, OverflowError):  # beyond the range of the type
            held = math.nan
        if held != self.value:
            raise ValueError(f"a hyperparameter is {self.value}, which no {self.type} is")

    def live(self) -> Any:
        """The number as torch's optimizers take it: a tensor on the CPU, or a scalar of numpy."""
        kind = TYPES[self.type]
        return torch.tensor(self.value, dtype=kind, device="cpu") if isinstance(kind, torch.dtype) else kind(self.value)

    def __float__(self) -> float:
        return float(self.value)

    def __abs__(self) -> float:
        return abs(self.value)

    def __bool__(self) -> bool:
        return bool(self.value)


def plain_or_typed(value: object) -> object:
    """``value`` without what belongs to this process: Python's own number, a ``TypedNumber``, a tuple of either.

    Anything else is returned as it is.

    Raises:
        ValueError: a number is of a type that cannot be sent, or not finite.
    """
    if isinstance(value, torch.Tensor):
        if value.dim() == 1 and value.numel() > 1:
            return tuple(plain_or_typed(each) for each in value)
        if value.numel() != 1:
            raise ValueError(f"a tensor of shape {list(value.shape)} is no number")
        return TypedNumber(str(value.dtype), value.detach().item())
    if isinstance(value, np.bool_):
        return bool(value)
    if isinstance(value, np.integer):
        return int(value)
    if isinstance(value, np.generic) and not isinstance(value, np.float64):
        return TypedNumber(f"numpy.{value.dtype.name}", value.item())
    if isinstance(value, float):
        return float(value)  # of a float64 of numpy, too
    if isinstance(value, (list, tuple)):
        return tuple(plain_or_typed(each) for each in value)
    return value
