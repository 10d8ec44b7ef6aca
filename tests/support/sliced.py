"""The parameters of a small, awkward model in the buckets of a plan, stepped as a server's store steps them.

Tensors of odd sizes, two groups with hyperparameters of their own, a schedule, and every elementwise optimizer.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from torch_ps.common import codecs
from torch_ps.common import optimizer_spec as optim
from torch_ps.common.plan import Bucket, plan
from torch_ps.common.schema import Group, Model, TensorSpec
from torch_ps.ps.engine.parameter_store import Gradient, Store

Tensors = dict[str, torch.Tensor]
#: What one worker has; None: no gradient for this tensor.
Gradients = Mapping[str, torch.Tensor | None]
Hyper = dict[str, Any]

SHAPES = {"weight": (37, 29), "bias": (29,), "scale": (), "table": (400, 5), "odd": (7, 3), "kernel": (3, 3, 5, 5)}
NAMES = tuple(SHAPES)
GROUPS = (NAMES[:3], NAMES[3:])

CASES: dict[str, tuple[str, Hyper]] = {
    "SGD": ("SGD", {}),
    "SGD momentum": ("SGD", {"momentum": 0.9}),
    "SGD Nesterov, weight decay": ("SGD", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    "SGD dampening, maximize": ("SGD", {"momentum": 0.9, "dampening": 0.3, "maximize": True}),
    "SGD fused": ("SGD", {"fused": True, "weight_decay": 0.01}),
    "SGD fused, Nesterov": ("SGD", {"fused": True, "momentum": 0.9, "nesterov": True}),
    "Adam": ("Adam", {"weight_decay": 0.01}),
    "Adam amsgrad": ("Adam", {"amsgrad": True}),
    "Adam maximize": ("Adam", {"maximize": True, "betas": (0.8, 0.95)}),
    "Adam fused": ("Adam", {"fused": True}),
    "Adam fused, amsgrad": ("Adam", {"fused": True, "amsgrad": True, "weight_decay": 0.1}),
    "AdamW": ("AdamW", {}),
    "AdamW amsgrad": ("AdamW", {"amsgrad": True}),
    "AdamW fused": ("AdamW", {"fused": True}),
    "AdamW fused, amsgrad, maximize": ("AdamW", {"fused": True, "amsgrad": True, "maximize": True}),
    "Adagrad": ("Adagrad", {}),
    "Adagrad with everything": ("Adagrad", {"lr_decay": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.3}),
    "Adagrad fused": ("Adagrad", {"fused": True}),
    "RMSprop": ("RMSprop", {}),
    "RMSprop centered": ("RMSprop", {"centered": True}),
    "RMSprop centered, momentum": ("RMSprop", {"centered": True, "momentum": 0.9, "weight_decay": 0.1}),
    "RMSprop momentum": ("RMSprop", {"momentum": 0.9}),
    "Adamax": ("Adamax", {"weight_decay": 0.1}),
    "NAdam": ("NAdam", {}),
    "NAdam decoupled": ("NAdam", {"decoupled_weight_decay": True, "weight_decay": 0.1}),
    "RAdam": ("RAdam", {}),
    "RAdam decoupled": ("RAdam", {"decoupled_weight_decay": True, "weight_decay": 0.1}),
    "Adadelta": ("Adadelta", {"weight_decay": 0.1, "rho": 0.8}),
    "Rprop": ("Rprop", {"maximize": True}),
    "ASGD": ("ASGD", {"weight_decay": 0.1, "alpha": 0.5, "t0": 10}),
    **{f"{name} foreach": (name, {"foreach": True}) for name in optim.ELEMENTWISE},
    **{f"{name} lr tensor": (name, {"lr": torch.tensor(0.01)}) for name in optim.ELEMENTWISE},
    "AdamW lr of float64": ("AdamW", {"lr": torch.tensor([0.01], dtype=torch.float64)}),
    "Adam betas tensors": ("Adam", {"betas": (torch.tensor(0.8), torch.tensor(0.95))}),
    "NAdam betas one tensor": ("NAdam", {"betas": torch.tensor([0.8, 0.95])}),
    "Adamax betas list": ("Adamax", {"betas": [0.8, 0.95]}),
    "NAdam foreach, lr tensor": ("NAdam", {"foreach": True, "lr": torch.tensor(0.01)}),
    "AdamW of numpy": ("AdamW", {"lr": np.float32(0.01), "weight_decay": np.float32(0.1), "eps": np.float64(1e-7)}),
    "SGD of tensors": ("SGD", {"momentum": torch.tensor(0.9), "weight_decay": torch.tensor(0.01)}),
    "SGD lr an integer": ("SGD", {"lr": 1}),
}


def gradients_of(step: int) -> Tensors:
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def start() -> Tensors:
    return gradients_of(1000)


def optimizer_of(name: str, hyper: Hyper, parameters: Tensors) -> torch.optim.Optimizer:
    """Over both groups; the second one's weight decay is its own."""
    own = {"weight_decay": 0.003} if "weight_decay" in hyper else {}
    groups = [{"params": [parameters[key] for key in GROUPS[0]]}, {"params": [parameters[key] for key in GROUPS[1]]}]
    groups[1].update(own)  # type: ignore[arg-type]
    return getattr(torch.optim, name)(groups, **copy.deepcopy({"lr": 0.01, **hyper}))  # type: ignore[no-any-return]


def like(old: Any, new: float) -> Any:
    """A new value of the kind of the old one; a tensor is changed in place, as some loops do."""
    if isinstance(old, torch.Tensor):
        return old.fill_(new)
    return type(old)(new) if isinstance(old, np.generic) else new


def schedule(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Hyperparameters that a user's script may change from step to step, different in each group."""
    for number, group in enumerate(optimizer.param_groups):
        sign = -1 if step == 10 and "lambd" not in group else 1  # torch refuses a negative lr at the start alone
        group["lr"] = like(group["lr"], sign * 0.01 * (1 + number) * (1 - step / 40))
        if step > 15 and group.get("weight_decay"):
            group["weight_decay"] = 0.02
        if step > 20 and group.get("momentum"):
            group["momentum"] = 0.8
        if step > 20 and "betas" in group:
            group["betas"] = [like(*pair) for pair in zip(group["betas"], (0.85, 0.99), strict=True)]


def leaves(tensors: Tensors) -> Tensors:
    return {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}


def cut(tensors: Gradients, bucket: Bucket) -> torch.Tensor:
    """The elements of one bucket; zeros where there is no tensor."""
    parts = []
    for piece in bucket.pieces:
        tensor = tensors[NAMES[piece.tensor]]
        parts.append(
            torch.zeros(piece.stop - piece.start) if tensor is None else tensor.reshape(-1)[piece.start : piece.stop]
        )
    return torch.cat(parts)


def payload(values: torch.Tensor) -> memoryview:
    return memoryview(b"".join(codecs.codec("none").encode(values)))


class Sliced:
    """The model in the buckets of a plan.

    Args:
        name, hyper: Optimizer and its hyperparameters.
        bucket_bytes, num_shards: The plan.
    """

    def __init__(self, name: str, hyper: Hyper, bucket_bytes: int, num_shards: int) -> None:
        # It never steps: its groups say what the script wants.
        self._optimizer = optimizer_of(name, hyper, leaves(start()))
        _, described = optim.describe(self._optimizer)
        groups = zip(GROUPS, described, strict=True)
        model = Model(name, tuple(Group(tuple(TensorSpec(key, SHAPES[key]) for key in keys), h) for keys, h in groups))
        self.buckets, none = plan(model, bucket_bytes, num_shards).buckets, codecs.codec("none")
        self.store = Store(model, self.buckets)
        for bucket in self.buckets:
            self.store.load(bucket.index, none, payload(cut(start(), bucket)))

    def step(self, step: int, workers: Sequence[Gradients]) -> None:
        """One step with the mean of what the workers have."""
        schedule(self._optimizer, step)
        _, now = optim.describe(self._optimizer)
        for bucket in self.buckets:
            gradients = [gradient(f"w{rank}", step, have, bucket) for rank, have in enumerate(workers)]
            mean, _ = self.store.mean(bucket.index, gradients)
            if mean is not None:
                self.store.step(bucket.index, mean, now[bucket.group])

    def differing(self, expected: Tensors) -> list[int]:
        """Buckets whose bits are not those of ``expected``."""
        pairs = ((b.index, self.store.values(b.index), cut(expected, b)) for b in self.buckets)
        return [index for index, one, other in pairs if not torch.equal(one.view(torch.int32), other.view(torch.int32))]


def gradient(worker: str, step: int, have: Gradients, bucket: Bucket) -> Gradient:
    """Push of one bucket by one worker."""
    absent = tuple(at for at, piece in enumerate(bucket.pieces) if have[NAMES[piece.tensor]] is None)
    missing = len(absent) == len(bucket.pieces)
    return Gradient(worker, step, 1.0, codecs.codec("none"), payload(cut(have, bucket)), missing, absent)
