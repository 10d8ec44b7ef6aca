"""Tensors of a model that live in the memory which a worker shares with its servers, so that nothing is copied.

    parameters  their data is the server's (sync) or this worker's answers (async): a pull copies nothing
    gradients   .grad is the place from which the server reads: a push copies nothing

Rules of this file
  1. Only while nothing is under way: tensors move between two pushes, and move out when a push fails or the worker
     leaves, for from then on others may change what was shared.
  2. Parameters: fp32, contiguous, on the CPU, alone in their storage. What the training loop writes into them lasts
     until the next push, as on the network plane, and reaches nobody else.
  3. A gradient moves in when it has outlived a push, as with ``zero_grad(set_to_none=False)``: then backward adds to it
     where the server reads it. One that is made anew each time is copied, for it has to come from somewhere.
  4. ``.grad`` is never changed, so gradients move out before they are scaled or zeroed for a push.

Source: DistributedDataParallel's ``gradient_as_bucket_view``, Li et al., VLDB 2020, arXiv:2006.15704.
"""

import weakref
from collections.abc import Sequence

import torch

from torch_ps.common.plan import Bucket, Piece, Plan
from torch_ps.worker.gradients.flat_tensors import FlatTensors
from torch_ps.worker.session.shared_memory import SharedMemory

#: Pushes in which gradients may show that they outlive one.
_LOOKS = 3


class SharedViews:
    """Of the parameters of one model, which come first among the tensors of ``flat``.

    Args:
        lend_parameters: whether only pushes change them, not an optimizer of the worker's own.
        lend_gradients: whether a push takes gradients as they are, neither encoded nor averaged over passes.
    """

    def __init__(
        self,
        plan: Plan,
        parameters: Sequence[torch.Tensor],
        shared_memory: SharedMemory,
        flat: FlatTensors,
        *,
        lend_parameters: bool,
        lend_gradients: bool,
    ) -> None:
        self._parameters, self._planes, self._flat = parameters, shared_memory, flat
        self._pieces: list[list[tuple[Bucket, Piece]]] = [[] for _ in parameters]
        for bucket in plan.buckets:
            for piece in bucket.pieces if bucket.rule == "optimizer" else ():
                self._pieces[piece.tensor].append((bucket, piece))
        self._lend_parameters, self._parameters_in = lend_parameters, False
        self._looks = _LOOKS if lend_gradients else 0
        self._seen: dict[int, weakref.ref[torch.Tensor]] = {}  # gradients that were there at the last push
        self._places: dict[int, torch.Tensor] = {}  # parameter -> its .grad that lives in the arena

    def settle(self) -> None:
        """A push or pull is done: let tensors move in."""
        if self._lend_parameters and not self._parameters_in:
            self._parameters_in = True
            for index in self._alone():
                place = self._planes.parameter(self._pieces[index])
                if place is not None:
                    self._flat.lend(index, place)
        if self._looks:
            self._take_gradients()

    def release(self) -> None:
        """Move everything out, with the values it has."""
        self.release_gradients()
        self._flat.own()
        self._parameters_in = False

    def release_gradients(self) -> None:
        """Move gradients out, for good: this loop treats them in ways that need memory of its own."""
        for index, place in self._places.items():
            if self._parameters[index].grad is place:
                self._parameters[index].grad = place.clone()
        self._places.clear()
        self._looks = 0

    def _alone(self) -> list[int]:
        """Parameters that may live anywhere."""
        users: dict[int, int] = {}
        for parameter in self._parameters:
            storage = parameter.untyped_storage().data_ptr() if _is_plain(parameter) else 0
            users[storage] = users.get(storage, 0) + 1
        return [
            index
            for index, parameter in enumerate(self._parameters)
            if _is_plain(parameter)
            and not parameter.is_shared()  # type: ignore[no-untyped-call]
            and users[parameter.untyped_storage().data_ptr()] == 1
            and parameter.untyped_storage().nbytes() == 4 * parameter.numel()
        ]

    def _take_gradients(self) -> None:
        self._looks -= 1
        for index, parameter in enumerate(self._parameters):
            gradient = parameter.grad
            if gradient is None or index in self._places or not _is_plain(gradient):
                continue
            seen = self._seen.get(index)
            if seen is None or seen() is not gradient:
                self._seen[index] = weakref.ref(gradient)
                continue
            place = self._planes.gradient(self._pieces[index])
            if place is not None:
                self._places[index] = place.as_strided(gradient.shape, gradient.stride())
                parameter.grad = self._places[index].copy_(gradient.detach())


def _is_plain(tensor: torch.Tensor) -> bool:
    return (
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and tensor.layout is torch.strided
        and tensor.dtype is torch.float32
        and tensor.device.type == "cpu"
        and tensor.is_contiguous()
        and tensor.numel() > 0
    )
