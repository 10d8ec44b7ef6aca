"""What a loop may do with gradients after backward: change, replace, keep and share them."""

from typing import Any

import numpy as np
import torch
from torch import nn

from tests.loops.registry import kind
from tests.loops.run import Run


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
