"""Lets tensors of a model live in the memory that a worker shares with its servers, so that nothing is copied.

    parameters  their data is the server's region (sync) or this worker's answers (async): a pull copies nothing
    gradients   .grad is the place from which the server reads: a push copies nothing

Rules of this file
  1. Tensors move between two pushes, while nothing is under way. They move out when a push fails or the worker leaves,
     for from then on others may change what was shared.
  2. Parameters: fp32, contiguous, on the CPU, alone in their storage, which no view or array of the script shares. What
     the training loop writes into them stays in its process until the next push tells the servers.
  3. A gradient moves in when it has outlived a push, as with ``zero_grad(set_to_none=False)``: then backward adds to it
     where the server reads it. A gradient that is new in each step is copied at the push.
  4. ``.grad`` is never changed, so gradients move out before they are scaled or zeroed for a push.

Source: DistributedDataParallel's ``gradient_as_bucket_view``, Li et al., VLDB 2020, arXiv:2006.15704.
"""

import weakref
from collections.abc import Sequence

import torch

from torch_ps.common.plan import Bucket, Piece
from torch_ps.worker.gradients.flat_tensors import FlatTensors, is_aliased
from torch_ps.worker.runtime.lifetime import Part
from torch_ps.worker.session.session import Session
from torch_ps.worker.session.shared_memory import SharedMemory

#: First pushes after which gradients are checked for having outlived one.
_CHECKED_PUSHES = 3


class SharedViews(Part):
    """The parameters and gradients of one model that live in shared memory; none do before ``share``.

    Args:
        parameters: trained parameters, the first tensors of ``flat``.
        flat: tensors of the model.
        lend_gradients: whether a push takes gradients as they are, neither encoded nor averaged over passes.
    """

    def __init__(self, parameters: Sequence[torch.Tensor], flat: FlatTensors, *, lend_gradients: bool) -> None:
        self._parameters, self._flat, self._lend_gradients = parameters, flat, lend_gradients
        self._forget()

    def _forget(self) -> None:
        self._memory: SharedMemory | None = None
        self._pieces: list[list[tuple[Bucket, Piece]]] = [[] for _ in self._parameters]
        self._parameters_in = False
        self._checks = _CHECKED_PUSHES if self._lend_gradients else 0
        self._seen: dict[int, weakref.ref[torch.Tensor]] = {}  # gradients that were there at the last push
        self._places: dict[int, torch.Tensor] = {}  # parameter -> its .grad, which may live in the arena
        self._homes: dict[int, int] = {}  # the address of its place there, which does not move as long as there is one

    @property
    def shared(self) -> bool:
        """Whether parameters can live in shared memory."""
        return self._memory is not None

    def share(self, session: Session, *, receive_here: bool) -> None:
        """Let tensors live in the memory that a session shares with the servers, or has for answers.

        Args:
            session: session that has joined; what an earlier one had is forgotten.
            receive_here: whether answers over the network may stay where they are received, so not on their way to a
                GPU.
        """
        self._forget()
        session.on_leave = lambda: None  # drops what an earlier session had
        memory = session.shared_memory
        if receive_here:
            memory.keep_here(session.plan, self._flat.read)
        if memory.holds_parameters:
            self._memory = memory
            for bucket in session.plan.buckets:
                for piece in bucket.pieces if bucket.rule == "optimizer" else ():
                    self._pieces[piece.tensor].append((bucket, piece))
            session.on_leave = self.release
            self.settle()

    def settle(self) -> None:
        """Let tensors move in. Call it when a push or pull is done."""
        memory = self._memory
        if memory is None:
            return
        if not self._parameters_in:
            self._parameters_in = True
            for index in self._alone():
                found = memory.parameter(self._pieces[index])
                if found is not None:
                    self._flat.lend(index, *found)
        for index, gradient in self._places.items() if memory.shards else ():
            if self._parameters[index].grad is gradient:
                self._lend(memory, index, gradient)
        if self._checks:
            self._take_gradients(memory)

    def release(self) -> None:
        """Move all tensors out, with the values that they have."""
        self.release_gradients()
        self._flat.own()
        self._parameters_in = False

    def release_gradients(self) -> None:
        """Move gradients out for good: this loop does with them what needs memory of its own."""
        self._move_gradients_out()
        self._places.clear()
        self._checks = 0

    def before_fork(self) -> None:
        """Move all tensors out until the next push, unless one is under way, as one of another thread may be."""
        if self._memory is not None and not self._memory.under_way:
            self._move_out()

    def after_fork_in_child(self) -> None:
        """Move all tensors out, in a forked child, which must not write to what its parent and the servers share."""
        if self._memory is not None:
            self._flat.forget_locks()
            self._move_out()

    def _move_out(self) -> None:
        """Give all tensors memory of their own; each stays the same object."""
        self._move_gradients_out()
        self._flat.own()
        self._parameters_in = False

    def _move_gradients_out(self) -> None:
        for gradient in self._places.values():
            gradient.data = gradient.detach().clone()

    def _alone(self) -> list[int]:
        """Indices of the parameters that may live anywhere: plain, and alone in storage that nobody else sees."""
        return [
            index
            for index, parameter in enumerate(self._parameters)
            if index not in self._flat.aliased
            and _is_plain(parameter)
            and not parameter.is_shared()  # type: ignore[no-untyped-call]
            and parameter.untyped_storage().nbytes() == 4 * parameter.numel()
        ]

    def _take_gradients(self, memory: SharedMemory) -> None:
        self._checks -= 1
        for index, parameter in enumerate(self._parameters):
            gradient = parameter.grad
            if gradient is None or index in self._places or not _is_plain(gradient):
                continue
            seen = self._seen.get(index)
            if seen is None or seen() is not gradient:
                self._seen[index] = weakref.ref(gradient)
                continue
            self._places[index] = gradient
            self._lend(memory, index, gradient)

    def _lend(self, memory: SharedMemory, index: int, gradient: torch.Tensor) -> None:
        """Let the gradient of one parameter live where the server reads it, unless something else sees its memory.

        It stays the same object.
        """
        if gradient.data_ptr() == self._homes.get(index):
            return
        place = memory.gradient(self._pieces[index])
        if place is not None:
            self._homes[index] = place.data_ptr()
        if place is not None and place.data_ptr() != gradient.data_ptr() and not is_aliased(gradient):
            gradient.data = place.as_strided(gradient.shape, gradient.stride()).copy_(gradient.detach())


def _is_plain(tensor: torch.Tensor) -> bool:
    return (
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and tensor.layout is torch.strided
        and tensor.dtype is torch.float32
        and tensor.device.type == "cpu"
        and tensor.is_contiguous()
        and tensor.numel() > 0
    )
