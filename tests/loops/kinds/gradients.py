"""What a loop may do with gradients after backward: change, replace, drop, keep and share them."""

import contextlib
from typing import Any

import numpy as np
import torch
from torch import nn

from tests.loops.registry import adam, kind
from tests.loops.run import Run


@kind("gradient thrown away by zero_grad and continue", keeps_promise=False)
def dropped(r: Run) -> None:
    for number in range(5):
        r.optimizer.zero_grad()
        (r.loss(number) * (1000 if number in (1, 3) else 1)).backward()
        if number in (1, 3):
            r.optimizer.zero_grad()
            continue
        r.optimizer.step()


@kind("one worker throws batches away, the other does not", keeps_promise=False, workers=(2,))
def dropped_by_one(r: Run) -> None:
    for number in range(5):
        r.optimizer.zero_grad()
        (r.loss(number) * (1000 if number in (1, 3) else 1)).backward()
        if r.rank == 1 and number in (1, 3):
            r.optimizer.zero_grad()
            continue
        r.optimizer.step()


@kind("one worker steps without a gradient, the other with one", keeps_promise=False, workers=(2,))
def empty_by_one(r: Run) -> None:
    for number in range(5):
        r.optimizer.zero_grad()
        r.loss(number).backward()
        if r.rank == 1 and number in (1, 3):
            r.optimizer.zero_grad()
        r.optimizer.step()


@kind("zero_grad(set_to_none=False)")
def zeroed(r: Run) -> None:
    for number in range(4):
        r.loss(number).backward()
        r.optimizer.step()
        r.optimizer.zero_grad(set_to_none=False)


@kind("model.zero_grad()")
def by_model(r: Run) -> None:
    for number in range(4):
        r.loss(number).backward()
        r.optimizer.step()
        r.model.zero_grad()


@kind("model.zero_grad(set_to_none=False)")
def by_model_zeroed(r: Run) -> None:
    for number in range(4):
        r.loss(number).backward()
        r.optimizer.step()
        r.model.zero_grad(set_to_none=False)


@kind("p.grad = None")
def set_to_none(r: Run) -> None:
    for number in range(4):
        r.loss(number).backward()
        r.optimizer.step()
        for parameter in r.model.parameters():
            parameter.grad = None


@kind("del p.grad")
def deleted(r: Run) -> None:
    for number in range(4):
        r.loss(number).backward()
        r.optimizer.step()
        for parameter in r.model.parameters():
            del parameter.grad


@kind("p.grad.zero_()")
def zeroed_in_place(r: Run) -> None:
    for number in range(4):
        r.loss(number).backward()
        r.optimizer.step()
        for parameter in r.model.parameters():
            parameter.grad.zero_()


@kind("p.grad.data.zero_() and detach_()")
def zeroed_in_data(r: Run) -> None:
    for number in range(4):
        r.loss(number).backward()
        r.optimizer.step()
        for parameter in r.model.parameters():
            parameter.grad.detach_()
            parameter.grad.data.zero_()


@kind("gradients are never zeroed")
def never_zeroed(r: Run) -> None:
    for number in range(4):
        r.loss(number).backward()
        r.optimizer.step()


@kind("gradients are zeroed by a factor", keeps_promise=False)
def decayed(r: Run) -> None:
    for number in range(4):
        r.loss(number).backward()
        r.optimizer.step()
        for parameter in r.model.parameters():
            parameter.grad.mul_(0.5)


@kind("two steps with one gradient")
def stepped_twice(r: Run) -> None:
    for number in range(3):
        r.loss(number).backward()
        r.optimizer.step()
        r.optimizer.step()
        r.optimizer.zero_grad()


@kind("step without any gradient, first and later", optimizer=adam)
def no_gradient(r: Run) -> None:
    r.optimizer.step()
    r.train(0, 1)
    r.optimizer.step()
    r.train(2)
    r.optimizer.zero_grad(set_to_none=False)
    r.optimizer.step()


@kind("gradients of zero everywhere", optimizer=adam)
def gradients_of_zero(r: Run) -> None:
    r.train(0)
    (0 * r.loss(1)).backward()
    r.optimizer.step()
    r.optimizer.zero_grad()
    r.train(2)


@kind("accumulation by the loop itself", keeps_promise=False)
def accumulated(r: Run) -> None:
    for number in range(6):
        (r.loss(number) / 2).backward()
        if number % 2:
            r.optimizer.step()
            r.optimizer.zero_grad()


@kind("accumulation, then the mean in place", keeps_promise=False)
def accumulated_and_divided(r: Run) -> None:
    for number in range(3):
        for part in range(3):
            r.loss(10 * number + part).backward()
        for parameter in r.model.parameters():
            parameter.grad /= 3
        r.optimizer.step()
        r.optimizer.zero_grad()


@kind("accumulate=2 and optimizer.zero_grad()", options={"accumulate": 2})
def two_passes(r: Run) -> None:
    _passes(r, lambda: r.optimizer.zero_grad())


@kind("accumulate=2 and model.zero_grad()", options={"accumulate": 2})
def two_passes_model(r: Run) -> None:
    _passes(r, lambda: r.model.zero_grad())


@kind("accumulate=2 and p.grad = None", options={"accumulate": 2})
def two_passes_none(r: Run) -> None:
    def forget() -> None:
        for parameter in r.model.parameters():
            parameter.grad = None

    _passes(r, forget)


def _passes(r: Run, forget: object) -> None:
    """Two passes are one step of plain torch with the mean of both."""
    assert callable(forget)
    for number in range(3):
        for part in range(2):
            r.loss(10 * number + part).backward()
            if r.is_plain:
                if part:
                    for parameter in r.model.parameters():
                        parameter.grad /= 2
                    r.optimizer.step()
                    forget()
            else:
                r.optimizer.step()
                forget()


def _changed(name: str, change: object, *, always_new: bool = False) -> None:
    """A kind that changes each gradient by ``change`` before the step; autograd adds to every second one."""

    @kind(name, keeps_promise=False)
    def loop(r: Run) -> None:
        for number in range(4):
            r.optimizer.zero_grad(set_to_none=always_new or number % 2 == 0)
            (10 * r.loss(number)).backward()
            for parameter in r.model.parameters():
                change(parameter)
            r.optimizer.step()


def _by_numpy(p: nn.Parameter) -> None:
    assert p.grad is not None
    values = p.grad.numpy()
    np.clip(values, -0.01, 0.01, out=values)


def _by_dlpack(p: nn.Parameter) -> None:
    assert p.grad is not None
    torch.from_dlpack(p.grad.detach()).clamp_(-0.01, 0.01)


def _masked(p: nn.Parameter) -> None:
    assert p.grad is not None
    p.grad[p.grad.abs() < 0.01] = 0


def _by_where(p: nn.Parameter) -> None:
    assert p.grad is not None
    p.grad = torch.where(p.grad > 0, p.grad, 0.1 * p.grad)


def _at_the_same_place(p: nn.Parameter) -> None:
    assert p.grad is not None
    sign = p.grad.sign()
    p.grad = None
    p.grad = sign * 0.01


def _other_strides(p: nn.Parameter) -> None:
    assert p.grad is not None
    if p.dim() == 2:
        p.grad = p.grad.t().contiguous().t() * 0.5


def _expanded(p: nn.Parameter) -> None:
    assert p.grad is not None
    p.grad = p.grad.mean().expand(p.shape)


def _other_data(p: nn.Parameter) -> None:
    assert p.grad is not None
    p.grad.data = p.grad.data.clamp(-0.01, 0.01)


def _by_set(p: nn.Parameter) -> None:
    assert p.grad is not None
    p.grad.set_(p.grad.detach().clamp(-0.01, 0.01))


def _by_storage(p: nn.Parameter) -> None:
    assert p.grad is not None
    p.grad.view(-1).untyped_storage().copy_(p.grad.sign().mul(0.01).contiguous().untyped_storage())


def _noisy(p: nn.Parameter) -> None:
    assert p.grad is not None
    p.grad.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())), alpha=0.01)


def _centred(p: nn.Parameter) -> None:
    assert p.grad is not None
    if p.dim() > 1:
        p.grad.data.sub_(p.grad.data.mean(1, keepdim=True))


def _requiring(p: nn.Parameter) -> None:
    assert p.grad is not None
    p.grad = (p.grad * 0.5).requires_grad_()


_changed("p.grad.clamp_()", lambda p: p.grad.clamp_(-0.01, 0.01))
_changed("p.grad.data.clamp_()", lambda p: p.grad.data.clamp_(-0.01, 0.01))
_changed("p.grad.detach().mul_()", lambda p: p.grad.detach().mul_(0.1))
_changed("gradient clipped through numpy()", _by_numpy)
_changed("gradient clipped through dlpack", _by_dlpack)
_changed("gradient masked by index", _masked)
_changed("gradient replaced by torch.where", _by_where)
_changed("gradient replaced by one at the same address", _at_the_same_place)
_changed("gradient with other strides", _other_strides)
_changed("gradient that is an expanded view", _expanded, always_new=True)
_changed("p.grad.data = ...", _other_data)
_changed("p.grad.set_()", _by_set)
_changed("bytes of the gradient's storage", _by_storage)
_changed("noise added to the gradient", _noisy)
_changed("gradient centred in its rows", _centred)
_changed("gradient that requires a gradient itself", _requiring)


@kind("clip_grad_norm_", keeps_promise=False, workers=(1, 2))
def clipped(r: Run) -> None:
    for number in range(4):
        (10 * r.loss(number)).backward()
        norm = nn.utils.clip_grad_norm_(r.model.parameters(), 0.5)
        r.optimizer.step()
        r.optimizer.zero_grad()
        assert norm > 0.5


def _clip(r: Run, norm: float) -> Any:
    return nn.utils.clip_grad_norm_(r.model.parameters(), norm) if r.is_plain else r.optimizer.clip_grad_norm_(norm)


@kind("clip_grad_norm_ of the optimizer", keeps_promise=False, workers=(1,))
def clipped_by_the_optimizer(r: Run) -> None:
    for number in range(4):
        (10 * r.loss(number)).backward()
        r.notes[f"norm {number}"] = _clip(r, 0.5)
        r.optimizer.step()
        r.optimizer.zero_grad()


@kind("clip_grad_value_", keeps_promise=False)
def clipped_values(r: Run) -> None:
    for number in range(4):
        (10 * r.loss(number)).backward()
        nn.utils.clip_grad_value_(r.model.parameters(), 0.02)
        r.optimizer.step()
        r.optimizer.zero_grad()


@kind("torch._foreach_mul_ on all gradients", keeps_promise=False)
def by_foreach(r: Run) -> None:
    for number in range(3):
        r.loss(number).backward()
        torch._foreach_mul_([p.grad for p in r.model.parameters()], 0.5)
        r.optimizer.step()
        r.optimizer.zero_grad()


@kind("gradients of two parameters swapped", keeps_promise=False)
def swapped(r: Run) -> None:
    one, other = r.model[0], r.model[0]
    for number in range(3):
        r.loss(number).backward()
        one.weight.grad, other.weight.grad = other.weight.grad.flip(0), one.weight.grad.flip(1)
        r.optimizer.step()
        r.optimizer.zero_grad()


class Twins(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(12, 7), nn.Linear(12, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.one(x) + 0.5 * self.other(x)
        return result


@kind("one tensor is the gradient of two parameters", model=Twins, keeps_promise=False)
def shared(r: Run) -> None:
    for number in range(3):
        r.loss(number).backward()
        r.model.other.weight.grad = r.model.one.weight.grad
        r.optimizer.step()
        r.optimizer.zero_grad()


@kind("gradients are views of one flat tensor", keeps_promise=False)
def flat(r: Run) -> None:
    parameters = list(r.model.parameters())
    together = torch.zeros(sum(p.numel() for p in parameters))
    at = 0
    for parameter in parameters:
        parameter.grad = together[at : at + parameter.numel()].view(parameter.shape)
        at += parameter.numel()
    for number in range(3):
        r.loss(number).backward()
        r.optimizer.step()
        together.zero_()


@kind("flat gradients that are changed as one", keeps_promise=False)
def flat_changed(r: Run) -> None:
    parameters = list(r.model.parameters())
    together = torch.zeros(sum(p.numel() for p in parameters))
    at = 0
    for parameter in parameters:
        parameter.grad = together[at : at + parameter.numel()].view(parameter.shape)
        at += parameter.numel()
    for number in range(3):
        r.loss(number).backward()
        together.clamp_(-0.01, 0.01)
        r.optimizer.step()
        together.zero_()


@kind("gradients changed through views that are kept", keeps_promise=False)
def kept_views(r: Run) -> None:
    r.loss(0).backward()
    views = [parameter.grad.view(-1) for parameter in r.model.parameters()]
    for number in range(1, 7):
        for view in views:
            view.clamp_(-0.01, 0.01)
        r.optimizer.step()
        r.optimizer.zero_grad(set_to_none=False)
        r.loss(number).backward()


@kind("gradients changed through numpy arrays that are kept", keeps_promise=False)
def kept_arrays(r: Run) -> None:
    r.loss(0).backward()
    arrays = [parameter.grad.numpy() for parameter in r.model.parameters()]
    for number in range(1, 7):
        for array in arrays:
            array *= 0.5
        r.optimizer.step()
        r.optimizer.zero_grad(set_to_none=False)
        r.loss(number).backward()


@kind("list of gradients that is kept", keeps_promise=False)
def kept_list(r: Run) -> None:
    r.loss(0).backward()
    gradients = [parameter.grad for parameter in r.model.parameters()]
    for number in range(1, 7):
        torch._foreach_mul_(gradients, 0.5)
        r.optimizer.step()
        r.optimizer.zero_grad(set_to_none=False)
        r.loss(number).backward()


@kind("gradients saved, zeroed, and put back", keeps_promise=False)
def restored(r: Run) -> None:
    for number in range(3):
        r.loss(number).backward()
        kept = [parameter.grad for parameter in r.model.parameters()]
        r.optimizer.zero_grad()
        r.loss(10 + number).backward()
        for parameter, gradient in zip(r.model.parameters(), kept, strict=True):
            parameter.grad = gradient
        r.optimizer.step()
        r.optimizer.zero_grad()


@kind("gradients of two tasks projected (PCGrad)", keeps_promise=False)
def projected(r: Run) -> None:
    for number in range(3):
        gradients = []
        for task in (0, 10):
            r.optimizer.zero_grad()
            r.loss(task + number).backward()
            gradients.append([parameter.grad.clone() for parameter in r.model.parameters()])
        for parameter, one, other in zip(r.model.parameters(), *gradients, strict=True):
            along = (one * other).sum().clamp(max=0) / other.square().sum()
            parameter.grad = one - along * other + other
        r.optimizer.step()
        r.optimizer.zero_grad()


@kind("gradients without autograd")
def by_hand(r: Run) -> None:
    for number in range(3):
        for parameter in r.model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=r.generator(100 * number + parameter.numel()))
        r.optimizer.step()


@kind("gradient of one layer is dropped before the step", optimizer=adam, keeps_promise=False)
def layer_dropped(r: Run) -> None:
    for number in range(4):
        r.loss(number).backward()
        if number % 2:
            r.model[0].weight.grad = None
        r.optimizer.step()
        r.optimizer.zero_grad()


@kind("NaN in one layer: the step is left out", keeps_promise=False)
def not_a_number(r: Run) -> None:
    for number in range(5):
        r.loss(number).backward()
        if number in (1, 3):
            r.model[0].weight.grad[0, 0] = float("nan")
        _step_if_finite(r)
        r.optimizer.zero_grad()


@kind("infinity that backward makes in one layer: the step is left out", optimizer=adam)
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


@kind("closure that is evaluated once", keeps_promise=True)
def closure(r: Run) -> None:
    for number in range(3):

        def evaluate(number: int = number) -> torch.Tensor:
            r.optimizer.zero_grad()
            loss: torch.Tensor = r.loss(number)
            loss.backward()
            return loss

        loss = r.optimizer.step(evaluate)
        assert loss


@kind("backward, and then a closure that starts again", keeps_promise=False)
def closure_again(r: Run) -> None:
    for number in range(3):
        r.loss(10 + number).backward()

        def evaluate(number: int = number) -> torch.Tensor:
            r.optimizer.zero_grad()
            loss: torch.Tensor = r.loss(number)
            loss.backward()
            return loss

        loss = r.optimizer.step(evaluate)
        assert loss


@kind("closure that adds to the gradient", keeps_promise=False)
def closure_adds(r: Run) -> None:
    for number in range(3):
        r.loss(10 + number).backward()

        def evaluate(number: int = number) -> torch.Tensor:
            loss: torch.Tensor = r.loss(number)
            loss.backward()
            return loss

        r.optimizer.step(evaluate)
        r.optimizer.zero_grad()


@kind("closure that raises, caught", keeps_promise=False)
def closure_raises(r: Run) -> None:
    def fails() -> torch.Tensor:
        r.loss(50).backward()
        raise ArithmeticError("in a closure")

    for number in range(3):
        with contextlib.suppress(ArithmeticError):
            r.optimizer.step(fails)
        r.optimizer.zero_grad()
        r.train(number)


@kind("closure without gradients")
def closure_empty(r: Run) -> None:
    for number in range(3):
        r.loss(number).backward()
        loss = r.optimizer.step(lambda: torch.tensor(1.0))
        r.optimizer.zero_grad()
        assert loss == 1
