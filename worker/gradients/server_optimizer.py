"""The optimizer that the servers run, described by a ``torch.optim`` object of the worker.

    torch.optim object --describe--> class name, hyperparameters per group     (registered when the worker joins)
                       --changed---> what differs from the job's by now        (travels with each push)

The object never steps here. Its ``param_groups`` may change at any time.
"""

from collections.abc import Sequence

import torch
from torch.nn.parameter import is_lazy

from torch_ps.common import optimizer_spec as optim
from torch_ps.common import schema
from torch_ps.common.errors import ConfigError
from torch_ps.common.optimizer_spec import Hyper
from torch_ps.common.plan import Bucket
from torch_ps.common.schema import Group, Model, TensorSpec
from torch_ps.worker.gradients.buffers import Buffers
from torch_ps.worker.gradients.flat_tensors import FlatTensors
from torch_ps.worker.gradients.momentum_correction import MomentumCorrection


class ServerOptimizer:
    """Describes what the servers run in place of ``optimizer``.

    Args:
        optimizer: elementwise optimizer of ``torch.optim``.
        corrects_momentum: whether this worker computes the momentum of SGD where it can.

    Attributes:
        name: class of the optimizer.

    Raises:
        ConfigError: the optimizer cannot run on slices of the parameters.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, corrects_momentum: bool = False) -> None:
        self._optimizer, self._corrects_momentum = optimizer, corrects_momentum
        self.name, self._hyper = optim.describe(optimizer)
        self._arguments = optim.arguments_of(self.name)
        #: The last call of ``changed``, where it can be repeated: the job's groups, all values, the result.
        self._last: tuple[Sequence[Group], list[dict[str, object]], list[Hyper]] | None = None

    def tensors(self, model: torch.nn.Module, buffers: str = "sync") -> tuple[list[torch.Tensor], Model, Buffers]:
        """What the servers hold of ``model``.

        Args:
            model: module that names the parameters and holds the buffers.
            buffers: "sync" to share its persistent buffers, "local" to share none.

        Returns:
            The trained parameters in flat order, the model as the job describes it, and the shared buffers.

        Raises:
            ConfigError: a parameter is not in ``model`` or has no values that could be trained, or a buffer has no
                shape yet.
        """
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        parameters: list[torch.Tensor] = []
        groups: list[Group] = []
        for number, group in enumerate(self._optimizer.param_groups):
            trained = [parameter for parameter in group["params"] if parameter.requires_grad]
            for parameter in trained:
                if id(parameter) not in names:
                    raise ConfigError(
                        f"group {number} of the optimizer has a parameter of shape {list(parameter.shape)} that is not "
                        "in the model; pass the module that holds all of them"
                    )
                if reason := _unfit(parameter):
                    raise ConfigError(f"parameter {names[id(parameter)]!r} {reason}")
            groups.append(Group(tuple(TensorSpec.of(names[id(p)], p) for p in trained), self._hyper[number]))
            parameters += trained
        shared = Buffers.of(model, len(parameters), local=buffers == "local")
        described = Model(self.name, tuple(groups), tuple(shared.specs))
        schema.check(described)
        return parameters, described, shared

    def hyper(self, group: int) -> Hyper:
        """The hyperparameters of one group, as they are now."""
        return optim.hyper_of(self.name, self._optimizer.param_groups[group], self._arguments)

    def momentum(self, bucket: Bucket, gradient: torch.Tensor, flat: FlatTensors) -> Hyper | None:
        """Prepare a gradient for momentum correction: add the weight decay, as SGD does before its momentum.

        Args:
            bucket: bucket of the gradient.
            gradient: gradient, shape (numel,), fp32; changed in place.
            flat: parameters.

        Returns:
            The hyperparameters of the momentum; None, and no change, if the server computes it.
        """
        if not self._corrects_momentum:
            return None
        hyper = self.hyper(bucket.group)
        if not MomentumCorrection.fits(self.name, hyper):
            return None
        if decay := hyper.get("weight_decay"):
            gradient.add_(flat.read(bucket, torch.empty_like(gradient)), alpha=optim.number_of(decay))
        return hyper

    def changed(self, job: Sequence[Group]) -> list[Hyper]:
        """Per group, the hyperparameters that differ from the job's.

        Args:
            job: groups of the job's model.

        Raises:
            ConfigError: torch would refuse a value; nothing has been sent.
        """
        read = [{key: group.get(key) for key in self._arguments} for group in self._optimizer.param_groups]
        constant = all(_is_constant(value) for group in read for value in group.values())
        if constant and self._last is not None and self._last[0] is job and self._last[1] == read:
            return self._last[2]
        found = []
        for number, (own, group) in enumerate(zip(self._optimizer.param_groups, job, strict=True)):
            hyper = optim.hyper_of(self.name, own, self._arguments)
            if hyper != self._hyper[number]:
                optim.check_change(self.name, group.hyper, hyper)
                self._hyper[number] = hyper
            found.append(optim.changed_values(hyper, group.hyper))
        self._last = (job, read, found) if constant else None
        return found


def _unfit(parameter: torch.Tensor) -> str:
    """Why the servers cannot train a parameter and what to do, as the end of a sentence; "" if they can."""
    if is_lazy(parameter):
        return "has no shape yet; run the model once before the optimizer is made"
    if parameter.is_meta:
        return "is on the meta device and has no values; make them (module.to_empty, then initialise or load) before"
    if parameter.layout is not torch.strided:
        return f"is {str(parameter.layout).removeprefix('torch.')}; only dense parameters can be trained"
    if any(size > 1 and not stride for size, stride in zip(parameter.shape, parameter.stride(), strict=True)):
        return "is expanded, so that elements share memory, and torch cannot step it either; make it of a clone()"
    return ""


def _is_constant(value: object) -> bool:
    """Whether a hyperparameter changes only when another object takes its place, as no tensor and no list does."""
    return isinstance(value, float | int | str | None) or (
        isinstance(value, tuple) and all(isinstance(each, float | int) for each in value)
    )
