"""Lets the next forward begin before the last parameters are in: reading a tensor waits for that tensor.

    step()    all gradients are sent; it returns           every tensor of the model is *under way*
    forward   a module is called  --> hook                 waits for the buckets of the module's own tensors
    else      anything reads a tensor that is under way    waits for its buckets: functional use, tied weights, copies,
                                                           evaluation, state_dict, a test in the training loop
    wait()    the next gradient that leaves, the next step, a property of the optimizer, the end: waits for everything

Rules of this file
  1. No value is read before it is in. A tensor under way has a class whose ``__torch_function__`` waits, so every
     function of torch that gets the tensor waits, on any thread; the tensor has its own class again once its values are
     in.
  2. The hooks run before those of others, which may compute a weight from the module's tensors (``weight_norm``). They
     also cover extensions in C++, which bypass ``__torch_function__``, and break the graph of ``torch.compile``.
  3. Tensors have storage of their own. In memory that is shared with a server (``shared_views.py``), a write of the
     loop to one tensor would keep its neighbours on the same page as they were.
  4. After an error the tensors are as they came, as after a ``step`` that failed. A timeout is no such error: reading
     again waits again.

Neither the class nor the hooks see a replayed CUDA graph, nor C++ code that kept a tensor from an earlier call. Call
``wait`` there.

Source: Jayarajan et al., MLSys 2019, arXiv:1905.03960, for parameters that are waited for layer by layer;
``torch.nn.parameter.UninitializedTensorMixin`` for a tensor that changes its class when its values come.
"""

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from torch_ps.common.errors import ConfigError, PsError
from torch_ps.common.plan import Bucket
from torch_ps.worker.gradients.flat_tensors import FlatTensors
from torch_ps.worker.optim.gpu_transfer import Pusher
from torch_ps.worker.optim.pytree import tensors_in
from torch_ps.worker.runtime.lifetime import Part, immortalise, weakly
from torch_ps.worker.session.answers import StepOutcome

log = logging.getLogger("torch_ps.worker")

Result = TypeVar("Result")

_T: Any = torch.Tensor
#: Functions that read no values of a tensor; loops call them between two steps, ``zero_grad`` above all.
_WITHOUT_VALUES = {
    *(getattr(_T, name).__get__ for name in ("grad", "shape", "dtype", "device", "layout", "ndim", "requires_grad")),
    *(getattr(_T, name).__get__ for name in ("is_leaf", "is_cuda", "is_sparse", "grad_fn", "_version")),
    *(_T.grad.__set__, _T.grad.__delete__, _T.__hash__, _T.__len__),
    *(_T.size, _T.dim, _T.numel, _T.stride, _T.is_floating_point, _T.is_complex, _T.is_contiguous, _T.element_size),
}


class ForwardOverlap(Part):
    """The tensors of one model between a step and their use.

    Args:
        model: module that gets the hooks.
        tensors: parameters and buffers, in the order of ``Model.tensors()``.
        names: names of the tensors.
        buckets: all buckets of the job.
        pusher: session or GPU transfer that waits for the answers.
        flat: the tensors as flat slices.

    Raises:
        ConfigError: the use of a tensor or module cannot be seen; says which.
    """

    def __init__(
        self,
        model: nn.Module,
        tensors: Sequence[torch.Tensor],
        names: Sequence[str],
        buckets: Sequence[Bucket],
        pusher: Pusher,
        flat: FlatTensors,
    ) -> None:
        self._tensors, self._pusher, self._flat = tensors, pusher, flat
        for name, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                raise ConfigError(f"overlap=forward cannot see when the TorchScript module {name!r} uses a parameter")
        for name, tensor in zip(names, tensors, strict=True):
            if type(tensor) not in (torch.Tensor, nn.Parameter):
                raise ConfigError(
                    f"overlap=forward cannot see when tensor {name!r}, a {type(tensor).__name__}, is used; give "
                    "overlap=auto or on"
                )
        self._buckets: list[set[int]] = [set() for _ in tensors]
        for bucket in buckets:
            for piece in bucket.pieces:
                self._buckets[piece.tensor].add(bucket.index)
        self._number = {id(tensor): index for index, tensor in enumerate(tensors)}
        self._kinds = {kind: _under_way(kind, weakly(self.arrive)) for kind in (torch.Tensor, nn.Parameter)}
        self._outcome: StepOutcome | None = None  # of the last step, if a fork has waited for it
        self._open = False  # the outcome of the last step has not been taken
        self._failed = False
        self._handles = [
            module.register_forward_pre_hook(_Hook(self).wait, prepend=True)
            for module in model.modules()
            if any(id(tensor) in self._number for tensor in _own(module))
        ]

    @property
    def open(self) -> bool:
        """Whether a step has begun and neither ended nor failed."""
        return self._open

    def begin(self, tensors: Sequence[torch.Tensor]) -> None:
        """Note that the gradients of a step are all sent: ``tensors``, as the model has them now, are under way."""
        self._open, self._failed, self._outcome = True, False, None
        self._tensors, self._number = tensors, {id(tensor): index for index, tensor in enumerate(tensors)}
        for tensor in self._tensors:
            tensor.__class__ = self._kinds[type(tensor)]

    def arrive(self, tensor: torch.Tensor) -> None:
        """Wait until the values of one tensor are in. Returns at once if the tensor is not under way.

        Raises:
            WaitTimeout: says who is waited for; the tensor stays under way.
            PsError: the answer will not come; the tensors stay as they are.
        """
        if type(tensor) not in self._kinds.values():
            return
        index = self._number[id(tensor)]
        self._guard(lambda: self._pusher.wait_for(self._buckets[index]))
        self._flat.settle([index])
        _restore(tensor)

    def finish(self) -> StepOutcome:
        """Wait until everything is in; returns the outcome of the step. Call it once per ``begin``.

        Raises:
            WaitTimeout: says who is waited for; the tensors stay under way.
            PsError: an answer will not come; the tensors stay as they are.
        """
        outcome = self._outcome or self._guard(self._pusher.wait)
        self._end()
        return outcome

    def abandon(self) -> None:
        """Stop waiting: the tensors stay as they are."""
        self._end()

    def close(self) -> None:
        """Remove the hooks, and wait for what is under way unless a wait has failed. Call it before the session ends.

        Raises:
            WaitTimeout: says who is waited for.
            PsError: an answer will not come. After either error the tensors stay as they are.
        """
        for handle in self._handles:
            handle.remove()
        try:
            if self._open and not self._failed:
                self.finish()
            elif self._open:
                log.warning("not all parameters of the last step were waited for: the model holds what has come")
        finally:
            self._end()

    def before_fork(self) -> None:
        """Wait until everything is in, as the child has nobody to wait for."""
        if self._open and self._outcome is None:
            try:
                self._outcome = self._guard(self._pusher.wait)
            except PsError as error:
                log.warning("a process is forked while parameters of the last step are under way: %s", error)
                return
            self._flat.settle()
            for tensor in self._tensors:
                _restore(tensor)

    def after_fork_in_child(self) -> None:
        """Remove the hooks, in a forked child. Reading a tensor that is under way is an error there."""
        for handle in self._handles:
            handle.remove()
        if any(type(tensor) in self._kinds.values() for tensor in self._tensors):
            immortalise(self)  # it has to be there to refuse

    def _guard(self, wait: Callable[[], Result]) -> Result:
        try:
            return wait()
        except PsError:
            self._failed = True
            if not self._pusher.waiting:
                self._end()
            raise

    def _end(self) -> None:
        self._open = False
        self._flat.settle()
        for tensor in self._tensors:
            _restore(tensor)


def _under_way(kind: type[torch.Tensor], arrive: Callable[[torch.Tensor], None]) -> type[torch.Tensor]:
    """The class of a tensor of class ``kind`` while its values are under way."""

    class UnderWay(kind):  # type: ignore[misc, valid-type]
        @classmethod
        def __torch_function__(
            cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            if function not in _WITHOUT_VALUES:
                for tensor in tensors_in((args, kwargs)):
                    arrive(tensor)
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **(kwargs or {}))

        def __deepcopy__(self, memo: dict[int, Any]) -> Any:
            arrive(self)
            return copy.deepcopy(self, memo)

        def __reduce_ex__(self, protocol: Any) -> Any:
            arrive(self)
            return self.__reduce_ex__(protocol)

    return UnderWay


def _restore(tensor: torch.Tensor) -> None:
    kind = type(tensor)
    if kind not in (torch.Tensor, nn.Parameter):
        tensor.__class__ = kind.__mro__[1]


class _Hook:
    """The forward hook of one module. A copy of the module, or one that was saved and loaded, waits for nothing."""

    def __init__(self, forward: ForwardOverlap | None = None) -> None:
        self._forward = forward

    def __reduce__(self) -> tuple[type["_Hook"], tuple[()]]:
        return _Hook, ()

    def wait(self, module: nn.Module, args: Any) -> None:
        if self._forward is not None:
            for tensor in _own(module):
                self._forward.arrive(tensor)

    # torch.compile would trace the hook while nothing is under way, and leave the wait out.
    wait._torchdynamo_disable = True  # type: ignore[attr-defined]


def _own(module: nn.Module) -> Iterator[torch.Tensor]:
    """The tensors of the module itself, without those of its children."""
    yield from (tensor for tensor in module._parameters.values() if tensor is not None)
    yield from (tensor for tensor in module._buffers.values() if tensor is not None)
