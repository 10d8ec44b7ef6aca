"""Every class of optimizers that servers run, with options, and with parameters that come and go."""

from typing import Any

import torch
from torch import nn

from tests.loops.kinds.absent import Experts
from tests.loops.registry import kind
from tests.loops.run import Run

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    "Adam": {"amsgrad": True},
    "AdamW": {},
    "Adagrad": {"lr_decay": 0.1, "initial_accumulator_value": 0.3},
    "RMSprop": {"centered": True, "momentum": 0.9},
    "Adamax": {"weight_decay": 0.1},
    "NAdam": {"decoupled_weight_decay": True, "weight_decay": 0.1},
    "RAdam": {},
    "Adadelta": {"weight_decay": 0.1},
    "Rprop": {},
    "ASGD": {"weight_decay": 0.1, "t0": 2},
}


def made(name: str, **more: Any) -> Any:
    def make(model: nn.Module) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = getattr(torch.optim, name)(
            model.parameters(), lr=0.01, **OPTIMIZERS[name], **more
        )
        return optimizer

    return make


def everything(r: Run) -> None:
    """Experts by turns, a gradient that is dropped, one that is changed, and weights that are written."""
    for number in range(7):
        r.model.chosen = number % 3 if number < 4 else 0
        r.loss(number).backward()
        if number == 4:
            r.optimizer.zero_grad()
        if number == 5:
            r.model.last.weight.grad.data.clamp_(-0.01, 0.01)
        r.optimizer.step()
        r.optimizer.zero_grad()
        if number == 2:
            r.model.first.weight.data.clamp_(-0.1, 0.1)


def usual(r: Run) -> None:
    r.train(0, 1, 2, 3, 4)


for name in OPTIMIZERS:
    kind(
        f"{name}: experts by turns, a changed and a dropped gradient, written weights",
        model=Experts,
        optimizer=made(name),
        keeps_promise=False,
    )(everything)
for name in ("SGD", "Adam", "AdamW", "Adagrad"):
    kind(f"{name}, fused", optimizer=made(name, fused=True))(usual)
for name in ("SGD", "Adam", "ASGD", "NAdam", "RAdam", "Rprop"):
    kind(f"{name}, foreach", optimizer=made(name, foreach=True))(usual)
