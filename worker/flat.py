"""Between named tensors and buckets: where each slice of the flat vector lives in a model's own tensors.

Rules of this file
  1. Copies only; a bucket's staging tensor is reused from step to step.
  2. A tensor keeps its own dtype, device and memory format; the bucket is fp32 on the CPU.
"""

from collections.abc import Mapping, Sequence

import torch

from torch_ps.common.plan import Bucket


class Flat:
    """The tensors of a model, in the order of ``Model.tensors()``, seen as flat slices.

    Memory: one shadow copy of every tensor that is not contiguous; nothing for the others.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._tensors = [tensor.detach() for tensor in tensors]
        self._shadows = {i: t.contiguous().view(-1) for i, t in enumerate(self._tensors) if not t.is_contiguous()}
        self._views = [self._shadows[i] if i in self._shadows else t.view(-1) for i, t in enumerate(self._tensors)]
        self._pieces: dict[int, list[torch.Tensor]] = {}  # by bucket
        self._written: set[int] = set()

    def read(self, bucket: Bucket, into: torch.Tensor) -> torch.Tensor:
        """Copy the current values of one bucket into ``into``, shape (numel,), fp32; returns it."""
        for piece in bucket.pieces:
            if piece.tensor in self._shadows:
                self._shadows[piece.tensor].copy_(self._tensors[piece.tensor].reshape(-1))
            into[piece.offset : piece.offset + piece.stop - piece.start].copy_(
                self._views[piece.tensor][piece.start : piece.stop]
            )
        return into

    def write(self, bucket: Bucket, values: torch.Tensor) -> None:
        """Copy fp32 ``values``, shape (numel,), to where the tensors live."""
        views = self._views_of(bucket)
        parts = torch.split(values, [len(view) for view in views])
        if all(view.is_floating_point() for view in views):
            torch._foreach_copy_(views, parts)
        else:
            for view, part in zip(views, parts, strict=True):
                # The mean of integers, such as BatchNorm's counter.
                view.copy_(part if view.is_floating_point() else part.round())
        if self._shadows:
            self._written.update(piece.tensor for piece in bucket.pieces if piece.tensor in self._shadows)

    def _views_of(self, bucket: Bucket) -> list[torch.Tensor]:
        """Where each piece of a bucket lives; made once."""
        if bucket.index not in self._pieces:
            self._pieces[bucket.index] = [self._views[p.tensor][p.start : p.stop] for p in bucket.pieces]
        return self._pieces[bucket.index]

    def settle(self) -> None:
        """Bring what was written to shadows into their tensors; to be called when all buckets are in."""
        for index in self._written:
            self._tensors[index].copy_(self._shadows[index].view(self._tensors[index].shape))
        self._written.clear()


def gather(
    bucket: Bucket, gradients: Sequence[torch.Tensor | None] | Mapping[int, torch.Tensor | None], into: torch.Tensor
) -> torch.Tensor:
    """Copy the gradients of one bucket into ``into``, shape (numel,), fp32; returns it.

    A parameter without a gradient counts as zero; a sparse gradient becomes dense.
    """
    parts = []
    for piece in bucket.pieces:
        gradient = gradients[piece.tensor]
        if gradient is None:
            gradient = into.new_zeros(()).expand(piece.stop)
        elif gradient.layout is not torch.strided:
            gradient = gradient.to_dense()
        part = gradient.detach().reshape(-1)
        parts.append(part if piece.stop - piece.start == len(part) else part[piece.start : piece.stop])
    if all(part.dtype == into.dtype and part.device == into.device for part in parts):
        return torch.cat(parts, out=into)
    for place, part in zip(torch.split(into, [len(part) for part in parts]), parts, strict=True):
        place.copy_(part)
    return into
