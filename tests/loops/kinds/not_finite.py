"""Gradients that are not finite, and scaled ones: the loop or a GradScaler leaves the step out, or mends them."""

import torch
from torch import nn

from tests.loops.registry import adam, kind
from tests.loops.run import Run


@kind("NaN in one layer: the step is left out", keeps_promise=False)
def not_a_number(r: Run) -> None:
    for number in range(5):
        r.loss(number).backward()
        if number in (1, 3):
            r.model[0].weight.grad[0, 0] = float("nan")
        _step_if_finite(r)
        r.optimizer.zero_grad()


@kind("infinity that backward makes in one layer: the step is left out", optimizer=adam, keeps_promise=False)
def infinite(r: Run) -> None:
    for number in range(5):
        factor = float("inf") if number in (1, 3) else 1.0
        handle = r.model[0].bias.register_hook(lambda gradient, factor=factor: gradient * factor)
        r.loss(number).backward()
        handle.remove()
        _step_if_finite(r)
        r.optimizer.zero_grad()


def _step_if_finite(r: Run) -> None:
    """What a wrapped optimizer does by itself: it leaves a step out whose gradients are not finite."""
    finite = all(parameter.grad.isfinite().all() for parameter in r.model.parameters())
    if finite or not r.is_plain or r.world > 1:
        r.optimizer.step()


@kind("NaN of one worker: the other one's gradient is the step", workers=(2,), keeps_promise=False)
def not_a_number_of_one(r: Run) -> None:
    for number in range(4):
        r.loss(number).backward()
        if r.rank == 1 and number in (1, 2):
            r.model[2].weight.grad.fill_(float("nan"))
        r.optimizer.step()
        r.optimizer.zero_grad()


@kind("NaN replaced before the step", keeps_promise=False)
def replaced_nan(r: Run) -> None:
    for number in range(3):
        handle = r.model[0].bias.register_hook(lambda gradient: gradient / 0)
        r.loss(number).backward()
        handle.remove()
        for parameter in r.model.parameters():
            torch.nan_to_num(parameter.grad, nan=0.0, posinf=0.1, neginf=-0.1, out=parameter.grad)
        r.optimizer.step()
        r.optimizer.zero_grad()


@kind("GradScaler on the CPU", workers=(1,), keeps_promise=False, same_gradients=False)
def scaled(r: Run) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for number in range(4):
        scaler.scale(r.loss(number)).backward()
        scaler.step(r.optimizer)
        scaler.update()
        r.optimizer.zero_grad()


@kind("GradScaler, unscale_ and clipping", workers=(1,), keeps_promise=False, same_gradients=False)
def unscaled(r: Run) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for number in range(4):
        scaler.scale(10 * r.loss(number)).backward()
        scaler.unscale_(r.optimizer)
        nn.utils.clip_grad_norm_(r.model.parameters(), 0.5)
        scaler.step(r.optimizer)
        scaler.update()
        r.optimizer.zero_grad()


@kind("GradScaler with an overflow", workers=(1,), keeps_promise=False, same_gradients=False)
def overflown(r: Run) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1)
    for number in range(5):
        scaler.scale(r.loss(number)).backward()
        if number in (1, 2):
            r.model[0].weight.grad[0, 0] = float("inf")
        scaler.step(r.optimizer)
        scaler.update()
        r.optimizer.zero_grad()
        scale = scaler.get_scale()
        assert scale
