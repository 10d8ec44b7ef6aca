"""A model's tensors as buckets: reads and writes the slices of the flat vector where the tensors live.

    values of a bucket --write()--> slices of the model's tensors; a *lent* tensor lives where the values are: no copy

Rules of this file
  1. A tensor keeps its own dtype, device and memory format; the bucket is fp32, on the CPU or on the tensors' GPU.
  2. Values that are in place already are not copied. Values from elsewhere for a lent tensor give it storage of its own
     again.
"""

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch._utils import _flatten_dense_tensors

from torch_ps.common.plan import Bucket, Piece
from torch_ps.worker.gradients.buffers import Buffers

#: Elements up to which the gradients of a bucket are joined in one call and then copied. That takes a fifth of the time
#: of a call for each of them, and both copies stay in the cache.
SMALL = 65536


def empty_fp32(*shape: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """An uninitialised fp32 tensor, whatever dtype and device are the script's defaults."""
    return torch.empty(shape, dtype=torch.float32, device=device)


class FlatTensors:
    """The tensors of a model, seen as flat slices.

    Args:
        tensors: tensors in the order of ``Model.tensors()``.
        buffers: what reads and writes the buckets of buffers, if these are not among ``tensors``.

    Attributes:
        on_settle: called by ``settle``; lets what is done next wait for writes that are under way on a GPU.

    Memory: one shadow copy of every tensor that is not contiguous; nothing for the others.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], buffers: Buffers | None = None) -> None:
        self._owners, self._buffers = tensors, buffers
        self._tensors = [tensor.detach() for tensor in tensors]
        self._homes = [(tensor.data_ptr(), tensor.dtype) for tensor in tensors]
        self._shadows: dict[int, torch.Tensor] = {}
        self._views = list(self._tensors)
        self._lent: set[int] = set()
        self._written: set[int] = set()
        self.on_settle: Callable[[], None] = lambda: None
        self._lock = threading.Lock()  # of where tensors live; reader threads of several shards write side by side
        for index in range(len(tensors)):
            self._bind(index)

    @property
    def device(self) -> torch.device:
        """The one GPU that all tensors are on, else the CPU."""
        found = {tensor.device for tensor in self._tensors}
        return found.pop() if len(found) == 1 and all(each.type == "cuda" for each in found) else torch.device("cpu")

    def gradients(self, bucket: Bucket) -> list[torch.Tensor]:
        """The gradients of one bucket; parameters without one are left out."""
        if bucket.rule != "optimizer":
            return []
        found = [self._owners[piece.tensor].grad for piece in bucket.pieces]
        return [gradient for gradient in found if gradient is not None]

    def read(self, bucket: Bucket, into: torch.Tensor) -> torch.Tensor:
        """Copy the current values of one bucket into ``into``, shape (numel,), fp32; returns it."""
        if bucket.rule != "optimizer" and self._buffers is not None:
            return self._buffers.read(bucket, into)
        for piece in bucket.pieces:
            if piece.tensor in self._shadows:
                self._shadows[piece.tensor].copy_(self._tensors[piece.tensor].reshape(-1))
            into[piece.offset : piece.offset + piece.stop - piece.start].copy_(
                self._views[piece.tensor][piece.start : piece.stop]
            )
        return into

    def write(self, bucket: Bucket, values: torch.Tensor) -> None:
        """Copy the values of one bucket, shape (numel,), fp32, to where its tensors live."""
        if bucket.rule != "optimizer" and self._buffers is not None:
            self._buffers.write(bucket, values)
            return
        views, home = self._views_of(bucket)
        if home == values.data_ptr():
            return
        parts = list(torch.split(values, [piece.stop - piece.start for piece in bucket.pieces]))
        if self._lent:
            views, parts = self._away(bucket, views, parts)
        if all(view.is_floating_point() for view in views):
            torch._foreach_copy_(views, parts)
        else:
            for view, part in zip(views, parts, strict=True):
                # Buffers of integers, such as BatchNorm's counter, get the rounded mean.
                view.copy_(part if view.is_floating_point() else part.round())
        if self._shadows:
            self._written.update(piece.tensor for piece in bucket.pieces if piece.tensor in self._shadows)

    def _away(
        self, bucket: Bucket, views: list[torch.Tensor], parts: list[torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The pairs of view and part that are not the same memory; a lent tensor among them gets its own storage."""
        away = [number for number, (view, part) in enumerate(zip(views, parts, strict=True)) if not _same(view, part)]
        if lent := self._lent.intersection(bucket.pieces[number].tensor for number in away):
            self.own(lent)
            views, _ = self._views_of(bucket)
        return [views[number] for number in away], [parts[number] for number in away]

    def settle(self, indices: Iterable[int] | None = None) -> None:
        """Complete the writes of some tensors, or all, whose buckets are in, for everything that is done next."""
        self.on_settle()
        for index in list(self._written) if indices is None else self._written.intersection(indices):
            self._tensors[index].copy_(self._shadows[index].view(self._tensors[index].shape))
            self._written.discard(index)

    # -------------------------------------------------------------- where tensors live

    def follow(self) -> None:
        """Follow tensors to another storage, such as ``model.to(device)`` gives them."""
        if self._buffers is not None:
            self._buffers.follow()
        for index, (owner, (address, dtype)) in enumerate(zip(self._owners, self._homes, strict=True)):
            if owner.data_ptr() != address or owner.dtype is not dtype:
                self._lent.discard(index)
                self._bind(index)

    def lend(self, index: int, place: torch.Tensor) -> None:
        """Let one tensor live in ``place``, shape (numel,) and the tensor's dtype, which holds its values already."""
        owner = self._owners[index]
        owner.data = place.as_strided(owner.shape, owner.stride())  # a side of 1 may have any stride
        self._lent.add(index)
        self._bind(index)

    def own(self, indices: Iterable[int] | None = None) -> None:
        """Give some tensors, or all, storage of their own again, with the values that they have now."""
        with self._lock:
            for index in self._lent & set(self._lent if indices is None else indices):
                owner = self._owners[index]
                if _same(owner, self._tensors[index]):  # else its own already
                    room = torch.empty_strided(owner.shape, owner.stride(), dtype=owner.dtype, device=owner.device)
                    owner.data = room.copy_(owner.detach())
                self._lent.discard(index)
                self._bind(index)

    def forget_locks(self) -> None:
        """Forget a lock that a thread of the parent may have held, in a forked child."""
        self._lock = threading.Lock()

    def _bind(self, index: int) -> None:
        tensor = self._tensors[index] = self._owners[index].detach()
        self._homes[index] = tensor.data_ptr(), tensor.dtype
        self._shadows.pop(index, None)
        if not tensor.is_contiguous():
            self._shadows[index] = tensor.contiguous().view(-1)
        self._views[index] = self._shadows[index] if index in self._shadows else tensor.view(-1)
        self._pieces: dict[int, tuple[list[torch.Tensor], int]] = {}  # by bucket

    def _views_of(self, bucket: Bucket) -> tuple[list[torch.Tensor], int]:
        """Where each piece of a bucket lives, and the address at which all are in place, 0 for none; computed once."""
        found = self._pieces.get(bucket.index)
        if found is None:
            views = [self._views[p.tensor][p.start : p.stop] for p in bucket.pieces]
            homes = {view.data_ptr() - 4 * p.offset for view, p in zip(views, bucket.pieces, strict=True)}
            lent = all(piece.tensor in self._lent for piece in bucket.pieces)
            found = self._pieces[bucket.index] = views, homes.pop() if lent and len(homes) == 1 else 0
        return found


def gather(
    bucket: Bucket, gradients: Sequence[torch.Tensor | None] | Mapping[int, torch.Tensor | None], into: torch.Tensor
) -> torch.Tensor:
    """Copy the gradients of one bucket into ``into``, shape (numel,), fp32, except those that live there; returns it.

    A parameter without a gradient counts as zero; a sparse gradient becomes dense.
    """
    home = into.data_ptr()
    away = [piece for piece in bucket.pieces if not _in_place(piece, gradients[piece.tensor], home)]
    if not away:
        return into
    if bucket.numel <= SMALL and (whole := _whole(bucket, gradients, into)):
        return into.copy_(_flatten_dense_tensors(whole))  # type: ignore[no-untyped-call]
    parts = [_part(piece, gradients[piece.tensor], into) for piece in away]
    if len(away) == len(bucket.pieces) and all(p.dtype == into.dtype and p.device == into.device for p in parts):
        return torch.cat(parts, out=into)
    for piece, part in zip(away, parts, strict=True):
        into[piece.offset : piece.offset + part.numel()].copy_(part)
    return into


def _whole(
    bucket: Bucket, gradients: Sequence[torch.Tensor | None] | Mapping[int, torch.Tensor | None], like: torch.Tensor
) -> list[torch.Tensor]:
    """The gradients of a bucket if all are whole, dense and of the dtype and device of ``like``; else an empty list."""
    found: list[torch.Tensor] = []
    for piece in bucket.pieces:
        gradient = gradients[piece.tensor]
        if (
            gradient is None
            or gradient.layout is not torch.strided
            or gradient.dtype is not like.dtype
            or gradient.device != like.device
            or gradient.numel() != piece.stop - piece.start
        ):
            return []
        found.append(gradient.detach())
    return found


def _part(piece: Piece, gradient: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    if gradient is None:
        return like.new_zeros(()).expand(piece.stop - piece.start)
    part = (gradient if gradient.layout is torch.strided else gradient.to_dense()).detach().reshape(-1)
    return part if piece.stop - piece.start == part.numel() else part[piece.start : piece.stop]


def _in_place(piece: Piece, gradient: torch.Tensor | None, home: int) -> bool:
    """Whether a piece of ``gradient`` lives in the bucket's values at address ``home``, as that of a lent one does."""
    return (
        gradient is not None
        and gradient.layout is torch.strided
        and gradient.data_ptr() + 4 * (piece.start - piece.offset) == home
    )


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.data_ptr() == b.data_ptr()
