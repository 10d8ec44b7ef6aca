"""The lines that loops are put together from at random: each is a statement that plain torch runs.

A line that torch refuses, such as backward through a graph that is stale or used up, notes what torch says; the error
has to be the same with servers.
"""

import copy
import random
from typing import Any

import torch
from torch import nn

from tests.loops.kinds.backward import Fails
from tests.loops.run import Run
from tests.loops.served import UNSEEN

LOSSES = 2


class Drawn(Run):
    """A run that keeps what its lines hand on to each other.

    Attributes:
        losses: graphs that have not been used up, by number.
        gradients: gradients that were set aside.
        states: states of the model that were set aside.
        handles: hooks that change gradients.
    """

    losses: dict[int, Any]
    gradients: list[Any]
    states: dict[int, Any]
    handles: list[Any]


def begin(r: Run) -> None:
    """What every loop begins with."""
    r.losses, r.gradients, r.states, r.handles = {}, [], {}, []  # type: ignore[attr-defined]


# ------------------------------------------------------------------ graphs


def forward(r: Any, number: int, batch: int, factor: float = 1.0) -> None:
    r.losses[number] = factor * r.loss(batch)


def backward(r: Any, number: int, *, retain: bool = False, layer: int | None = None) -> None:
    if number not in r.losses:
        return
    inputs = None if layer is None else [p for p in layer_of(r, layer).parameters() if p.requires_grad]
    if inputs == []:
        return
    _try(r, lambda: r.losses[number].backward(retain_graph=retain, inputs=inputs))


def penalty(r: Any, batch: int) -> None:
    """Backward through the gradient of the inputs."""
    inputs, labels = r.batch(batch)
    loss: Any = nn.functional.cross_entropy(r.model(inputs.requires_grad_()), labels)
    (slope,) = torch.autograd.grad(loss, inputs, create_graph=True)
    _try(r, lambda: (loss + slope.square().sum()).backward())


def curvature(r: Any, batch: int) -> None:
    """A Hessian-vector product, which leaves no gradient."""
    parameters = [p for p in r.model.parameters() if p.requires_grad]
    if not parameters:
        return
    slopes = torch.autograd.grad(r.loss(batch), parameters, create_graph=True, allow_unused=True)
    used = [(p, s) for p, s in zip(parameters, slopes, strict=True) if s is not None and s.requires_grad]
    if used:
        products = torch.autograd.grad([s.sum() for _, s in used], [p for p, _ in used], allow_unused=True)
        r.notes["curvature"] = sum(each.sum().item() for each in products if each is not None)


def saliency(r: Any, batch: int) -> None:
    """Backward to the inputs, which leaves gradients on the parameters, too."""
    inputs = r.batch(batch)[0].requires_grad_()
    r.model(inputs).sum().backward()
    r.notes["saliency"] = inputs.grad


def evaluate(r: Any, batch: int) -> None:
    with torch.no_grad():
        r.notes["score"] = r.loss(batch).item()


def fail_in_backward(r: Any, batch: int) -> None:
    """Some gradients are there when backward ends with an error."""
    try:
        (r.loss(batch) + Fails.apply(layer_of(r, 0).weight).sum()).backward()  # type: ignore[no-untyped-call]
    except ArithmeticError as error:
        r.notes["said"] = str(error)


def fail_in_forward(r: Any) -> None:
    _try(r, lambda: r.model(torch.ones(3, 5)))


def copy_trains(r: Any, batch: int) -> None:
    """A copy of the model gets gradients and weights of its own."""
    other = copy.deepcopy(r.model)
    inputs, labels = r.batch(batch)
    loss: Any = nn.functional.cross_entropy(other(inputs), labels)
    loss.backward()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)


def _try(r: Any, function: Any) -> None:
    try:
        function()
    except RuntimeError as error:
        r.notes["said"] = str(error)[:60]


# ------------------------------------------------------------------ gradients


def forget(r: Any, how: str) -> None:
    match how:
        case "optimizer":
            r.optimizer.zero_grad()
        case "optimizer, zeros":
            r.optimizer.zero_grad(set_to_none=False)
        case "model":
            r.model.zero_grad()
        case "model, zeros":
            r.model.zero_grad(set_to_none=False)
    for parameter in r.model.parameters():
        match how:
            case "none":
                parameter.grad = None
            case "in place" if parameter.grad is not None:
                _try(r, parameter.grad.detach_)  # torch refuses it for a view
                parameter.grad.zero_()
            case "data" if parameter.grad is not None:
                parameter.grad.data.zero_()
            case "deleted":
                del parameter.grad


FORGET = ("optimizer", "optimizer, zeros", "model", "model, zeros", "none", "in place", "data", "deleted")


def change(r: Any, how: str, index: int | None = None) -> None:
    """Change the gradient of one parameter, or of all."""
    parameters = list(r.model.parameters())
    for parameter in parameters if index is None else [parameters[index % len(parameters)]]:
        if parameter.grad is not None:
            _change(parameter, how)


@torch.no_grad()
def _change(p: Any, how: str) -> None:
    match how:
        case "clamp_":
            p.grad.clamp_(-0.01, 0.01)
        case "data.clamp_":
            p.grad.data.clamp_(-0.01, 0.01)
        case "numpy":
            values = p.grad.detach().numpy()
            values *= 0.5
        case "dlpack":
            torch.from_dlpack(p.grad.detach()).mul_(0.5)  # type: ignore[attr-defined]
        case "mask":
            p.grad[p.grad.abs() < 0.01] = 0
        case "replace":
            p.grad = p.grad * 0.5
        case "same place":
            sign = p.grad.sign()
            p.grad = None
            p.grad = sign * 0.01
        case "strides" if p.dim() == 2:
            p.grad = p.grad.t().contiguous().t()
        case "data":
            p.grad.data = p.grad.data * 0.5
        case "drop":
            p.grad = None
        case "make":
            p.grad = torch.full_like(p, 0.01)


CHANGE = (
    "clamp_",
    "data.clamp_",
    "numpy",
    "dlpack",
    "mask",
    "replace",
    "same place",
    "strides",
    "data",
    "drop",
    "make",
)


def clip(r: Any, norm: float) -> None:
    nn.utils.clip_grad_norm_(r.model.parameters(), norm)


def set_aside(r: Any) -> None:
    r.gradients = [parameter.grad for parameter in r.model.parameters()]


def put_back(r: Any) -> None:
    if r.gradients:
        for parameter, gradient in zip(r.model.parameters(), r.gradients, strict=True):
            parameter.grad = gradient


def by_hand(r: Any, seed: int) -> None:
    for parameter in r.model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=r.generator(seed + parameter.numel()))


def spoil(r: Any, index: int) -> None:
    """One value is not finite: a wrapped optimizer leaves the step out."""
    parameters = list(r.model.parameters())
    gradient = parameters[index % len(parameters)].grad
    if gradient is not None:
        gradient[(0,) * gradient.dim()] = float("nan")


def hook(r: Any, index: int) -> None:
    parameters = [p for p in r.model.parameters() if p.requires_grad]
    if parameters:
        r.handles.append(
            parameters[index % len(parameters)].register_hook(lambda gradient: gradient.clamp(-0.05, 0.05))
        )


def unhook(r: Any) -> None:
    while r.handles:
        r.handles.pop().remove()


# ------------------------------------------------------------------ steps


def step(r: Any) -> None:
    gradients = [p.grad for group in r.optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not r.is_plain or r.world > 1 or all(gradient.isfinite().all() for gradient in gradients):
        r.optimizer.step()


def step_with_closure(r: Any, batch: int) -> None:
    def closure() -> Any:
        r.optimizer.zero_grad()
        loss = r.loss(batch)
        loss.backward()
        return loss

    r.notes["loss"] = r.optimizer.step(closure).item()


def step_with_bad_closure(r: Any, batch: int) -> None:
    def closure() -> Any:
        r.loss(batch).backward()
        raise ArithmeticError("in a closure")

    try:
        r.optimizer.step(closure)
    except ArithmeticError as error:
        r.notes["said"] = str(error)


def change_lr(r: Any, factor: float) -> None:
    for group in r.optimizer.param_groups:
        group["lr"] *= factor


def change_decay(r: Any, value: float) -> None:
    for group in r.optimizer.param_groups:
        if "weight_decay" in group:
            group["weight_decay"] = value


def change_momentum(r: Any, value: float) -> None:
    for group in r.optimizer.param_groups:
        if group.get("momentum"):
            group["momentum"] = value
        elif "betas" in group:
            group["betas"] = (value, 0.99)


def reload_optimizer(r: Any) -> None:
    r.optimizer.load_state_dict(copy.deepcopy(r.optimizer.state_dict()))


# ------------------------------------------------------------------ weights


def layer_of(r: Any, number: int) -> Any:
    """One of the layers that are linear."""
    layers = [module for module in r.model.modules() if isinstance(module, nn.Linear)]
    return layers[number % len(layers)]


def freeze(r: Any, layer: int, trained: bool) -> None:
    """At least one layer stays trained, as plain torch, too, raises where a loss depends on nothing."""
    frozen = list(layer_of(r, layer).parameters())
    others = [p for p in r.model.parameters() if p.requires_grad and all(p is not each for each in frozen)]
    for parameter in frozen:
        parameter.requires_grad_(trained or not others)


@torch.no_grad()
def write(r: Any, how: str, index: int) -> None:
    parameters = list(r.model.parameters())
    p = parameters[index % len(parameters)]
    match how:
        case "data.clamp_":
            p.data.clamp_(-0.1, 0.1)
        case "mul_":
            p.mul_(0.9)
        case "numpy":
            values = p.detach().numpy()
            values *= 0.9
        case "data":
            p.data = p.data * 0.9
        case "element":
            p[(0,) * p.dim()] = 0.25
        case "copy_":
            p.copy_(p.sign() * 0.1)


WRITE = ("data.clamp_", "mul_", "numpy", "data", "element", "copy_")


def save_model(r: Any, number: int) -> None:
    r.states[number] = copy.deepcopy(r.model.state_dict())


def load_model(r: Any, number: int) -> None:
    if number in r.states:
        r.model.load_state_dict(r.states[number])


def choose(r: Any, expert: int) -> None:
    """The layer that the next batches go through, of a model that has several."""
    if hasattr(r.model, "chosen"):
        r.model.chosen = expert


# ------------------------------------------------------------------ drawing


def draw(chance: random.Random, length: int, *, keeps_promise: bool) -> list[str]:
    """The lines of a loop.

    Args:
        chance: source of what is drawn.
        length: number of lines, about.
        keeps_promise: whether nothing happens between a backward and its step.
    """
    lines: list[str] = []
    while len(lines) < length:
        lines += _promised(chance) if keeps_promise else _any(chance)
    return [line if chance.random() < 0.7 else f"{line}  {UNSEEN}" for line in lines]


def _promised(chance: random.Random) -> list[str]:
    batch = chance.randrange(50)
    before = chance.choice(
        [
            f"change_lr(r, {chance.choice((0.5, 2.0))})",
            f"change_decay(r, {chance.choice((0.0, 0.1))})",
            f"evaluate(r, {batch + 50})",
            f"choose(r, {chance.randrange(3)})",
            "reload_optimizer(r)",
            f"freeze(r, {chance.randrange(2)}, {chance.random() < 0.5})",
        ]
    )
    usual = [f"forward(r, 0, {batch})", "backward(r, 0)", "step(r)", f"forget(r, {chance.choice(FORGET)!r})"]
    return [before, *usual] if chance.random() < 0.5 else usual


def _any(chance: random.Random) -> list[str]:
    batch, number = chance.randrange(50), chance.randrange(LOSSES)
    index, layer = chance.randrange(8), chance.randrange(2)
    usual = [f"forward(r, {number}, {batch})", f"backward(r, {number})", "step(r)"]
    several = {
        "usual": (6, [*usual, f"forget(r, {chance.choice(FORGET)!r})"]),
        "kept": (2, usual),
        "dropped": (1, [*usual[:2], f"forget(r, {chance.choice(FORGET)!r})"]),
        "forward": (3, [f"forward(r, {number}, {batch}, {chance.choice((0.5, 1.0, 10.0))})"]),
        "backward": (3, [f"backward(r, {number})"]),
        "retained": (1, [f"backward(r, {number}, retain=True)"]),
        "layer": (2, [f"backward(r, {number}, layer={layer}, retain={chance.random() < 0.5})"]),
        "penalty": (1, [f"penalty(r, {batch})"]),
        "curvature": (1, [f"curvature(r, {batch})"]),
        "saliency": (1, [f"saliency(r, {batch})"]),
        "evaluate": (1, [f"evaluate(r, {batch})"]),
        "fail in backward": (1, [f"fail_in_backward(r, {batch})"]),
        "fail in forward": (1, ["fail_in_forward(r)"]),
        "copy": (1, [f"copy_trains(r, {batch})"]),
        "forget": (2, [f"forget(r, {chance.choice(FORGET)!r})"]),
        "change": (4, [f"change(r, {chance.choice(CHANGE)!r}, {chance.choice((None, index))})"]),
        "clip": (1, [f"clip(r, {chance.choice((0.1, 1.0))})"]),
        "aside": (1, ["set_aside(r)"]),
        "back": (1, ["put_back(r)"]),
        "by hand": (1, [f"by_hand(r, {batch})"]),
        "spoil": (1, [f"spoil(r, {index})"]),
        "hook": (1, [f"hook(r, {index})"]),
        "unhook": (1, ["unhook(r)"]),
        "step": (4, ["step(r)"]),
        "closure": (1, [f"step_with_closure(r, {batch})"]),
        "bad closure": (1, [f"step_with_bad_closure(r, {batch})"]),
        "lr": (1, [f"change_lr(r, {chance.choice((0.5, 2.0))})"]),
        "decay": (1, [f"change_decay(r, {chance.choice((0.0, 0.1))})"]),
        "momentum": (1, [f"change_momentum(r, {chance.choice((0.5, 0.8))})"]),
        "optimizer's state": (1, ["reload_optimizer(r)"]),
        "freeze": (1, [f"freeze(r, {layer}, {chance.random() < 0.5})"]),
        "write": (2, [f"write(r, {chance.choice(WRITE)!r}, {index})"]),
        "save": (1, [f"save_model(r, {number})"]),
        "load": (1, [f"load_model(r, {number})"]),
        "choose": (1, [f"choose(r, {chance.randrange(3)})"]),
    }
    weights = [weight for weight, _ in several.values()]
    return chance.choices([lines for _, lines in several.values()], weights)[0]
