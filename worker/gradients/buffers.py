"""The buffers of a model as buckets: what of them is sent, and where what comes is written.

    running mean, running variance of a normalisation layer --> averaged over the workers, as fp32
    any other persistent buffer ------------------------------> copied from the lowest rank, byte by byte, as DDP does
    a buffer that cannot be sent, or is not persistent -------> each worker's own

Rules of this file
  1. Buffers are found by module and name at every step, as DDP finds them: a loop may replace one, or set it to None.
  2. A value that comes and is the buffer's own already is not written, so what was saved for backward stays valid.
  3. A buffer that no longer has the shape and dtype that the job knows is *absent*: neither sent nor written.

Source: torch/nn/parallel/distributed.py, ``_sync_buffers`` and ``_assign_modules_buffers``.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import Self

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from torch_ps.common.errors import ConfigError
from torch_ps.common.plan import Bucket, Piece
from torch_ps.common.schema import COPIED_DTYPES, TensorSpec
from torch_ps.common.tensor_words import read_words, write_words

log = logging.getLogger("torch_ps.worker")


class Buffers:
    """The buffers that a job shares.

    Args:
        specs: names, shapes and dtypes.
        tensors: the buffers.
        first: index of the first buffer in ``Model.tensors()``.
        homes: module and name of each buffer; without them the buffers are not followed.

    Attributes:
        specs: names, shapes and dtypes.
        tensors: the buffers as they are now; an absent one as it was last.
    """

    def __init__(
        self,
        specs: Sequence[TensorSpec],
        tensors: Sequence[torch.Tensor],
        first: int,
        homes: Sequence[tuple[nn.Module, str]] = (),
    ) -> None:
        self.specs, self.tensors, self._first, self._homes = specs, list(tensors), first, homes
        self._plain = [tensor.detach() for tensor in tensors]  # of class torch.Tensor whatever happens to the others
        self._absent: set[int] = set()
        self._told: set[int] = set()

    @classmethod
    def of(cls, model: nn.Module, first: int, *, local: bool = False) -> Self:
        """The persistent buffers of ``model`` that can be sent.

        Args:
            model: module that has the buffers.
            first: index of the first buffer in ``Model.tensors()``.
            local: whether every buffer stays this worker's own.

        Raises:
            ConfigError: a buffer has no shape yet.
        """
        kept = {} if local else model.state_dict(keep_vars=True)
        homes, specs, tensors, own = [], [], [], []
        for name, module, key, buffer in _named(model):
            if name not in kept:
                continue
            if is_lazy(buffer):
                raise ConfigError(f"buffer {name!r} has no shape yet; run the model once before the optimizer is made")
            if reason := _unfit(buffer):
                own.append(f"{name!r} ({reason})")
                continue
            homes.append((module, key))
            specs.append(TensorSpec.of_buffer(name, buffer))
            tensors.append(buffer)
        if own:
            log.warning("buffers that cannot be sent stay each worker's own: %s", ", ".join(own))
        return cls(specs, tensors, first, homes)

    def follow(self) -> None:
        """Look the buffers up again: the loop may have replaced some."""
        for index, (module, key) in enumerate(self._homes):
            own = module._buffers  # of a TorchScript module no dict
            buffer = own[key] if key in own else None  # noqa: SIM401
            if buffer is self.tensors[index] and index not in self._absent:
                continue
            self._follow(index, buffer)

    def absent(self, bucket: Bucket) -> tuple[int, ...]:
        """Positions of the pieces of a bucket whose buffer is absent."""
        if not self._absent:
            return ()
        return tuple(at for at, piece in enumerate(bucket.pieces) if piece.tensor - self._first in self._absent)

    def read(self, bucket: Bucket, into: torch.Tensor) -> torch.Tensor:
        """Copy what one bucket sends into ``into``, shape (numel,), fp32; returns it. What is absent is 0."""
        for piece, part in self._parts(bucket, into):
            index = piece.tensor - self._first
            if index in self._absent:
                part.zero_()
            else:
                self._read(index, piece, part)
        return into

    def write(self, bucket: Bucket, values: torch.Tensor) -> None:
        """Give the buffers of one bucket the ``values``, shape (numel,), fp32, that came for it."""
        now = self.read(bucket, torch.empty_like(values))
        differ = (now.view(torch.int32) != values.view(torch.int32)).cpu()  # one wait for a GPU, not one a buffer
        if not differ.any():
            return
        for piece, part in self._parts(bucket, values):
            index = piece.tensor - self._first
            if index not in self._absent and differ[piece.offset : piece.offset + part.numel()].any():
                self._write(index, piece, part)

    def _parts(self, bucket: Bucket, values: torch.Tensor) -> Iterator[tuple[Piece, torch.Tensor]]:
        for piece in bucket.pieces:
            yield piece, values[piece.offset : piece.offset + piece.stop - piece.start]

    def _read(self, index: int, piece: Piece, into: torch.Tensor) -> None:
        buffer = self._plain[index]
        if self.specs[index].copied:
            read_words(buffer, piece.start, into)
        else:
            into.copy_(buffer.reshape(-1)[piece.start : piece.stop])

    def _write(self, index: int, piece: Piece, part: torch.Tensor) -> None:
        buffer = self._plain[index]
        plain = buffer.is_contiguous() and not (buffer.is_conj() or buffer.is_neg())
        fresh = buffer if plain else buffer.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
        if self.specs[index].copied:
            write_words(part, piece.start, fresh)
        else:
            fresh.view(-1)[piece.start : piece.stop].copy_(part if buffer.is_floating_point() else part.round())
        if fresh is not buffer:
            _distinct(buffer, buffer).copy_(_distinct(fresh, buffer))

    def _follow(self, index: int, buffer: object) -> None:
        spec = self.specs[index]
        reason = _unfit(buffer) if isinstance(buffer, torch.Tensor) else "it is gone"
        if not reason and isinstance(buffer, torch.Tensor):
            found = TensorSpec.of_buffer(spec.name, buffer)
            reason = "" if found == spec else f"it is {list(found.shape)} {found.dtype} now"
        if reason:
            self._absent.add(index)
            if index not in self._told:
                self._told.add(index)
                log.warning("buffer %s stays this worker's own from now on: %s", spec, reason)
        elif isinstance(buffer, torch.Tensor):
            self._absent.discard(index)
            self.tensors[index], self._plain[index] = buffer, buffer.detach()


def _named(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, torch.Tensor]]:
    """Name, module, key and tensor of each buffer, each tensor once, as ``named_buffers`` names them."""
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for key, buffer in module._buffers.items():
            if buffer is not None and id(buffer) not in seen:
                seen.add(id(buffer))
                yield f"{prefix}.{key}" if prefix else key, module, key, buffer


def _unfit(buffer: torch.Tensor) -> str:
    """Reason why the bytes of a buffer cannot be sent; "" if they can."""
    if buffer.layout is not torch.strided:
        return str(buffer.layout).removeprefix("torch.")
    if buffer.is_meta:
        return "on the meta device"
    if buffer.is_nested or torch.utils._python_dispatch.is_traceable_wrapper_subclass(buffer):
        return type(buffer).__name__
    dtype = str(buffer.dtype).removeprefix("torch.")
    return "" if dtype in COPIED_DTYPES else dtype


def _distinct(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The elements of ``tensor`` that have memory of their own in ``like``: an expanded dimension has one."""
    for dimension, (size, stride) in enumerate(zip(like.shape, like.stride(), strict=True)):
        if size > 1 and not stride:
            tensor = tensor.narrow(dimension, 0, 1)
    return tensor
