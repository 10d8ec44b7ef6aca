"""The next forward may begin before the last parameters are in: who reads a tensor waits for that tensor.

    step()    all gradients are sent; it returns           every tensor of the model is *under way*
    forward   a module is called  --> hook                 waits for the buckets of the module's own tensors
    else      anything reads a tensor that is under way    waits for its buckets: functional use, tied weights, copies,
                                                           evaluation, state_dict, a test in the training loop
    wait()    the next gradient that leaves, the next step, facts, the end: everything

Rules of this file
  1. Nobody reads a value before it is in. A tensor under way has a class whose ``__torch_function__`` waits, so that
     every function of torch which is given one does, on any thread; the class is its own again once the values are.
  2. Hooks come before those of others, which may compute a weight from the module's tensors (``weight_norm``). They
     see what extensions in C++ are given past ``__torch_function__``, and break the graph of ``torch.compile``.
  3. Tensors have storage of their own. In memory that is shared with a server (``views``), what the loop writes to one
     would keep its neighbours on the same page as they were.
  4. After an error the tensors are as they came, as after a ``step`` that failed. A timeout is none: who reads on
     waits on.

What neither sees: a replayed CUDA graph, and C++ code that kept a tensor from an earlier call. Call ``wait`` there.

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
from torch_ps.worker.optim.gpu_transfer import GpuTransfer
from torch_ps.worker.optim.pytree import tensors_in
from torch_ps.worker.session.session import Session, StepOutcome

log = logging.getLogger("torch_ps.worker")

Result = TypeVar("Result")

_T: Any = torch.Tensor
#: What a tensor can be asked without looking at its values; loops do so between two steps, ``zero_grad`` above all.
_WITHOUT_VALUES = {
    *(getattr(_T, name).__get__ for name in ("grad", "shape", "dtype", "device", "layout", "ndim", "requires_grad")),
    *(getattr(_T, name).__get__ for name in ("is_leaf", "is_cuda", "is_sparse", "grad_fn", "_version")),
    *(_T.grad.__set__, _T.grad.__delete__, _T.__hash__, _T.__len__),
    *(_T.size, _T.dim, _T.numel, _T.stride, _T.is_floating_point, _T.is_complex, _T.is_contiguous, _T.element_size),
}


class ForwardOverlap:
    """The tensors of one model between a step and their use.

    Args:
        model: model that gets the hooks.
        tensors: parameters and buffers, in the order of ``Model.tensors()``; ``names`` are theirs.
        buckets: all of them.
        outbox: queue that sends gradients and waits for their answers.
        flat: flat view of ``tensors``.

    Raises:
        ConfigError: a tensor or module whose use cannot be seen; says which.
    """

    def __init__(
        self,
        model: nn.Module,
        tensors: Sequence[torch.Tensor],
        names: Sequence[str],
        buckets: Sequence[Bucket],
        pusher: Session | GpuTransfer,
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
        self._kinds = {kind: _under_way(kind, self.arrive) for kind in (torch.Tensor, nn.Parameter)}
        self._open = False  # what the last step came to has not been asked for
        self._failed = False
        self._handles = [
            module.register_forward_pre_hook(_hook(self), prepend=True)
            for module in model.modules()
            if any(id(tensor) in self._number for tensor in _own(module))
        ]

    @property
    def open(self) -> bool:
        """Whether a step has begun and neither ended nor failed."""
        return self._open

    def begin(self) -> None:
        """A step's gradients are all sent."""
        self._open, self._failed = True, False
        for tensor in self._tensors:
            tensor.__class__ = self._kinds[type(tensor)]

    def arrive(self, tensor: torch.Tensor) -> None:
        """Return when the values of one tensor are in; at once if it is none of these.

        Raises:
            WaitTimeout: says who is waited for; the tensor is under way as before.
            PsError: the answer will not come; from now on the tensors are as they are.
        """
        if type(tensor) not in self._kinds.values():
            return
        index = self._number[id(tensor)]
        self._guard(lambda: self._pusher.wait_for(self._buckets[index]))
        self._flat.settle([index])
        _restore(tensor)

    def finish(self) -> StepOutcome:
        """Return when everything is in, with what the step came to. To be called once per ``begin``.

        Raises:
            WaitTimeout, PsError: as in ``arrive``.
        """
        outcome = self._guard(self._pusher.wait)
        self._end()
        return outcome

    def abandon(self) -> None:
        """Wait for nothing any more: the tensors are as they are."""
        self._end()

    def leave(self) -> None:
        """Before the session ends: wait for what is under way, unless somebody has waited in vain.

        Raises:
            WaitTimeout, PsError: as in ``arrive``; the tensors are as they are.
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


def _hook(forward: ForwardOverlap) -> Callable[[nn.Module, Any], None]:
    def hook(module: nn.Module, args: Any) -> None:
        for tensor in _own(module):
            forward.arrive(tensor)

    # torch.compile would look into it, and find nothing under way.
    hook._torchdynamo_disable = True  # type: ignore[attr-defined]
    return hook


def _own(module: nn.Module) -> Iterator[torch.Tensor]:
    """What the module itself has, not its children."""
    yield from (tensor for tensor in module._parameters.values() if tensor is not None)
    yield from (tensor for tensor in module._buffers.values() if tensor is not None)
