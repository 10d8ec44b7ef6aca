"""Streaming writer and reader of named tensors in one safetensors file.

    uint64 length of the header | header, JSON: name -> dtype, shape, begin, end | the tensors' bytes, one by one

The safetensors package writes from one buffer that holds everything; here a tensor is written from where it is and a
checkpoint needs no second copy of itself. What is written here is read with that package alone, which checks all of it.

Source: https://github.com/huggingface/safetensors#format
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open

from torch_ps.common.errors import CheckpointError
from torch_ps.common.wire.frames import Buffer

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
_ALIGN = 8

#: Name, dtype and shape.
Spec = tuple[str, torch.dtype, tuple[int, ...]]


def header(specs: Iterable[Spec], metadata: Mapping[str, str] | None = None) -> bytes:
    """Header of a file whose tensors follow in this order."""
    described: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, dtype, shape in specs:
        end = at + math.prod(shape) * dtype.itemsize
        described[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGN)
    return len(text).to_bytes(8, "little") + text


def bytes_of(tensor: torch.Tensor) -> Buffer:
    """The bytes of one tensor, without a copy if it is contiguous."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def in_order(names: Iterable[tuple[str, torch.Tensor]]) -> list[tuple[str, torch.Tensor]]:
    """Widest dtype first, so that every tensor begins on a multiple of its own size."""
    return sorted(names, key=lambda each: -each[1].dtype.itemsize)


def chunks(tensors: Sequence[tuple[str, torch.Tensor]]) -> Iterator[Buffer]:
    """The bytes of a whole file, in pieces."""
    yield header([(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors])
    for _, tensor in tensors:
        yield bytes_of(tensor)


class TensorFile:
    """The tensors of one file, memory-mapped and read on access. A context manager.

    Raises:
        CheckpointError: it is no safetensors file; says ``name`` and what is wrong.
    """

    def __init__(self, path: str, name: str) -> None:
        self._name = name
        try:
            self._file = cast(Any, safe_open(path, framework="pt"))  # its methods have no types
            self._file.__enter__()
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{name} is no safetensors file: {error}") from None
        self.keys: frozenset[str] = frozenset(self._file.keys())

    def get(self, key: str) -> torch.Tensor:
        """One tensor, valid while the file is open."""
        try:
            tensor: torch.Tensor = self._file.get_tensor(key)
        except SafetensorError as error:
            raise CheckpointError(f"{self._name}: tensor {key!r} cannot be read: {error}") from None
        return tensor

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.__exit__(None, None, None)
