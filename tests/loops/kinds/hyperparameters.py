"""Hyperparameters that change at any line: set, scheduled, loaded, and of every type that torch takes."""

import copy
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import lr_scheduler

from tests.loops.registry import adam, kind, momentum
from tests.loops.run import Run


@kind("lr set before backward")
def lr_before(r: Run) -> None:
    for number in range(4):
        r.optimizer.param_groups[0]["lr"] = 0.1 * (number + 1)
        r.loss(number).backward()
        r.optimizer.step()
        r.optimizer.zero_grad()


@kind("lr set between backward and step", keeps_promise=False)
def lr_between(r: Run) -> None:
    for number in range(4):
        r.loss(number).backward()
        r.optimizer.param_groups[0]["lr"] = 0.1 * (number + 1)
        r.optimizer.step()
        r.optimizer.zero_grad()


@kind("momentum and weight decay set between backward and step", keeps_promise=False)
def momentum_between(r: Run) -> None:
    for number in range(5):
        r.loss(number).backward()
        r.optimizer.param_groups[0]["momentum"] = 0.5 + 0.1 * number
        r.optimizer.param_groups[0]["weight_decay"] = 0.01 * number
        r.optimizer.step()
        r.optimizer.zero_grad()


@kind("betas set between backward and step", optimizer=adam, keeps_promise=False)
def betas_between(r: Run) -> None:
    for number in range(4):
        r.loss(number).backward()
        r.optimizer.param_groups[0]["betas"] = (0.9 - 0.1 * number, 0.99)
        r.optimizer.param_groups[0]["eps"] = 10.0 ** -(4 + number)
        r.optimizer.step()
        r.optimizer.zero_grad()


@kind("lr of 0 for some steps")
def lr_zero(r: Run) -> None:
    for number in range(4):
        r.optimizer.param_groups[0]["lr"] = 0.1 * (number % 2)
        r.train(number)


@kind("lr of the lowest rank counts", workers=(2,))
def lr_by_rank(r: Run) -> None:
    for number in range(3):
        r.optimizer.param_groups[0]["lr"] = 0.1 * (r.rank + 1)
        r.loss(number).backward()
        r.optimizer.step()
        r.optimizer.param_groups[0]["lr"] = 0.05


@kind("maximize and nesterov switched")
def switched(r: Run) -> None:
    for number in range(4):
        r.optimizer.param_groups[0]["maximize"] = number % 2 == 1
        r.optimizer.param_groups[0]["nesterov"] = number > 1
        r.train(number)


@kind("lr is a numpy scalar", optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=np.float32(0.1), momentum=0.9))
def lr_numpy(r: Run) -> None:
    for number in range(3):
        r.train(number)
        r.optimizer.param_groups[0]["lr"] = np.float64(0.05) * np.float32(number)


for name in ("SGD", "Adam", "AdamW", "Adamax", "NAdam", "ASGD"):

    def with_tensor(model: nn.Module, name: str = name) -> torch.optim.Optimizer:
        made: torch.optim.Optimizer = getattr(torch.optim, name)(model.parameters(), lr=torch.tensor(0.01))
        return made

    @kind(f"lr is a tensor, {name}", optimizer=with_tensor)
    def lr_tensor(r: Run) -> None:
        r.train(0, 1)
        r.optimizer.param_groups[0]["lr"] *= 0.5
        r.train(2, 3)


@kind(
    "lr is a tensor that is written to",
    keeps_promise=False,
    optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=torch.tensor(0.1)),
)
def lr_tensor_written(r: Run) -> None:
    for number in range(4):
        r.loss(number).backward()
        r.optimizer.param_groups[0]["lr"].fill_(0.1 / (number + 1))
        r.optimizer.step()
        r.optimizer.zero_grad()


def _scheduled(name: str, make: Any, *, optimizer: Any = momentum) -> None:
    """A kind that steps a schedule after each step, and each time says its rate."""

    @kind(name, optimizer=optimizer)
    def loop(r: Run) -> None:
        scheduler = make(r.optimizer)
        for number in range(6):
            r.loss(number).backward()
            r.optimizer.step()
            r.optimizer.zero_grad()
            scheduler.step()
            rate = scheduler.get_last_lr()[0]
            assert rate is not None


_scheduled("StepLR", lambda o: lr_scheduler.StepLR(o, 2))
_scheduled("MultiStepLR", lambda o: lr_scheduler.MultiStepLR(o, [1, 3]))
_scheduled("LambdaLR", lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)))
_scheduled("MultiplicativeLR", lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9))
_scheduled("ExponentialLR", lambda o: lr_scheduler.ExponentialLR(o, 0.9))
_scheduled("CosineAnnealingLR", lambda o: lr_scheduler.CosineAnnealingLR(o, 4))
_scheduled("CosineAnnealingWarmRestarts", lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2))
_scheduled("LinearLR", lambda o: lr_scheduler.LinearLR(o, total_iters=4))
_scheduled("PolynomialLR", lambda o: lr_scheduler.PolynomialLR(o, total_iters=8, power=2))
_scheduled("OneCycleLR, which cycles momentum", lambda o: lr_scheduler.OneCycleLR(o, 0.2, total_steps=8))
_scheduled("OneCycleLR, which cycles betas", lambda o: lr_scheduler.OneCycleLR(o, 0.2, total_steps=8), optimizer=adam)
_scheduled("CyclicLR", lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2))
_scheduled(
    "SequentialLR",
    lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=2), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[2]
    ),
)
_scheduled(
    "ChainedScheduler",
    lambda o: lr_scheduler.ChainedScheduler([lr_scheduler.ConstantLR(o, 0.5, 3), lr_scheduler.ExponentialLR(o, 0.9)]),
)


@kind("ReduceLROnPlateau")
def plateau(r: Run) -> None:
    scheduler = lr_scheduler.ReduceLROnPlateau(r.optimizer, factor=0.5, patience=0)
    for number in range(5):
        r.train(number)
        scheduler.step(float(number % 3))
        rate = r.optimizer.param_groups[0]["lr"]
        assert rate


@kind("scheduler steps before the optimizer, in each step of backward", keeps_promise=False)
def scheduled_between(r: Run) -> None:
    scheduler = lr_scheduler.LambdaLR(r.optimizer, lambda step: 1 / (1 + step))
    r.train(0)
    for number in range(1, 4):
        r.loss(number).backward()
        scheduler.step()
        r.optimizer.step()
        r.optimizer.zero_grad()


@kind("state of the optimizer saved and loaded at once", optimizer=adam)
def saved(r: Run) -> None:
    for number in range(4):
        r.loss(number).backward()
        r.optimizer.load_state_dict(copy.deepcopy(r.optimizer.state_dict()))
        r.optimizer.step()
        r.optimizer.zero_grad()


@kind("groups loaded from an earlier state of the optimizer", optimizer=lambda m: _plain_sgd(m))
def groups_loaded(r: Run) -> None:
    state = copy.deepcopy(r.optimizer.state_dict())
    r.optimizer.param_groups[0]["lr"] = 0.5
    r.train(0, 1)
    r.optimizer.load_state_dict(state)
    r.train(2)


def _plain_sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


@kind("state of the scheduler saved and loaded")
def scheduler_saved(r: Run) -> None:
    scheduler = lr_scheduler.StepLR(r.optimizer, 2)
    for number in range(5):
        r.train(number)
        scheduler.step()
        scheduler.load_state_dict(copy.deepcopy(scheduler.state_dict()))


def _two_groups(model: nn.Module) -> torch.optim.Optimizer:
    first, last = model.get_submodule("0"), model.get_submodule("2")
    groups = [
        {"params": list(first.parameters())},
        {"params": list(last.parameters()), "lr": 0.02, "weight_decay": 0.1},
    ]
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9)


@kind("two groups whose rates change places", optimizer=_two_groups)
def rates_swapped(r: Run) -> None:
    one, other = r.optimizer.param_groups
    for number in range(4):
        r.train(number)
        one["lr"], other["lr"] = other["lr"], one["lr"]


@kind("decay of some parameters only", optimizer=_two_groups)
def some_decay(r: Run) -> None:
    r.train(0, 1, 2)


@kind("hooks of the wrapped optimizer change gradients before the step", keeps_promise=False)
def step_hooks(r: Run) -> None:
    def halve(optimizer: Any, *about: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad.mul_(0.5)

    r.optimizer.register_step_pre_hook(halve)
    r.train(0, 1, 2)
