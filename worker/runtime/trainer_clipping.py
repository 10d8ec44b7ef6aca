"""Has Trainer, Accelerate, Lightning and Fabric clip by the norm of the mean gradient over all workers.

With torch.distributed the gradients that these libraries clip are the mean already. Here each worker has its own until
it pushes, so at the place where a library clips by norm the optimizer does it (``clip_grad_norm_``):

    max_grad_norm --> Accelerator.clip_grad_norm_ (Trainer, Accelerate) -------+--> ParameterServerOptimizer
    gradient_clip_val --> Precision.clip_grad_by_norm (Lightning) -------------+
    fabric.clip_gradients --> Strategy.clip_gradients_norm (Fabric) -----------+

Gradients of other optimizers, and of a part of the parameters only, are clipped as the library does it.

Source: accelerate/accelerator.py, ``Accelerator.clip_grad_norm_``; lightning/pytorch/plugins/precision/precision.py;
lightning/fabric/strategies/strategy.py.
"""

import functools
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch

from torch_ps.worker.runtime.jobs_here import members_here

#: Modules of Lightning with a ``Precision``, and of Fabric with a ``Strategy``, through which clipping goes.
PRECISIONS = "lightning.pytorch.plugins.precision.precision", "pytorch_lightning.plugins.precision.precision"
STRATEGIES = "lightning.fabric.strategies.strategy", "lightning_fabric.strategies.strategy"


def install() -> None:
    """Wrap the clipping of those libraries that are loaded by now; a second call changes nothing."""
    if (accelerate := sys.modules.get("accelerate.accelerator")) is not None:
        _wrap(accelerate.Accelerator, "clip_grad_norm_", _accelerate)
    for name in PRECISIONS:
        if (module := sys.modules.get(name)) is not None:
            _wrap(module.Precision, "clip_grad_by_norm", _lightning)
    for name in STRATEGIES:
        if (module := sys.modules.get(name)) is not None:
            _wrap(module.Strategy, "clip_gradients_norm", _fabric)


def _wrap(owner: type[Any], name: str, clip: Callable[..., Any]) -> None:
    """Have the method ``name`` of a class call ``clip``, which gets the method first."""
    method = getattr(owner, name)
    if hasattr(method, "clips_means"):
        return

    @functools.wraps(method)
    def clips(self: Any, *args: Any, **kwargs: Any) -> Any:
        return clip(self, method, *args, **kwargs)

    clips.clips_means = True  # type: ignore[attr-defined]
    setattr(owner, name, clips)


def _accelerate(self: Any, method: Any, parameters: Any, max_norm: float, norm_type: float = 2) -> Any:
    parameters = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    optimizer = _optimizer_of(parameters)
    if optimizer is None:
        return method(self, parameters, max_norm, norm_type)
    self.unscale_gradients()
    return optimizer.clip_grad_norm_(max_norm, norm_type, in_order_of=parameters)


def _lightning(self: Any, method: Any, optimizer: Any, clip_val: float) -> None:
    parameters = list(self.main_params(optimizer))
    mine = _optimizer_of(parameters)
    if mine is None:
        method(self, optimizer, clip_val)
    else:
        mine.clip_grad_norm_(clip_val, in_order_of=parameters)


def _fabric(
    self: Any,
    method: Any,
    module: torch.nn.Module,
    optimizer: Any,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = True,
) -> Any:
    parameters = list(self.precision.main_params(optimizer))
    mine = _optimizer_of(parameters)
    if mine is None:
        return method(self, module, optimizer, max_norm, norm_type, error_if_nonfinite)
    self.precision.unscale_gradients(optimizer)
    return mine.clip_grad_norm_(max_norm, norm_type, error_if_nonfinite, in_order_of=parameters)


def _optimizer_of(parameters: Iterable[torch.Tensor]) -> Any:
    """The optimizer of this process that has all of these parameters which have gradients, and no others; else None."""
    given = list(parameters)
    for optimizer in members_here():
        own = {id(each) for group in optimizer.param_groups for each in group["params"]}
        rest = [each for each in given if id(each) not in own]
        if len(given) - len(rest) == len(own) and all(each.grad is None for each in rest):
            return optimizer
    return None
