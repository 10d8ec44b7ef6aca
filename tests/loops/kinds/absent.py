"""Parameters without a gradient: never, now and then, frozen, of branches and experts. Torch leaves them alone."""

import torch
from torch import nn

from tests.loops.registry import adam, kind, momentum
from tests.loops.run import Run


class Experts(nn.Module):
    """One of several layers for a batch, between layers for all."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 16)
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.last = nn.Linear(16, 7)
        self.chosen = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.last(torch.tanh(self.experts[self.chosen](torch.tanh(self.first(x)))))
        return result


def rmsprop(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.RMSprop(model.parameters(), lr=0.01, momentum=0.9, weight_decay=0.01)


def adagrad(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adagrad(model.parameters(), lr=0.01, lr_decay=0.1, weight_decay=0.01)


def experts(r: Run) -> None:
    for number in range(7):
        r.model.chosen = number % 3 if number < 4 else 0
        r.loss(number).backward()
        r.optimizer.step()
        r.optimizer.zero_grad()


for name, make in {"momentum": momentum, "Adam": adam, "RMSprop": rmsprop, "Adagrad": adagrad}.items():
    kind(f"mixture of experts, {name}", model=Experts, optimizer=make)(experts)


@kind("mixture of experts whose gradients are set to zero", model=Experts, optimizer=adam)
def experts_zeroed(r: Run) -> None:
    for number in range(6):
        r.model.chosen = number % 3
        r.loss(number).backward()
        r.optimizer.step()
        r.optimizer.zero_grad(set_to_none=False)


@kind("each worker uses another expert", model=Experts, optimizer=momentum, workers=(2,))
def experts_by_rank(r: Run) -> None:
    for number in range(6):
        r.model.chosen = (number + r.rank) % 3 if number < 3 else r.rank
        r.loss(number).backward()
        r.optimizer.step()
        r.optimizer.zero_grad()


@kind("layer that is never used", model=Experts, optimizer=adam)
def never_used(r: Run) -> None:
    r.train(0, 1, 2)


@kind("layers dropped at random", model=Experts, optimizer=momentum)
def layer_drop(r: Run) -> None:
    for number in range(6):
        inputs, labels = r.batch(number)
        hidden = torch.tanh(r.model.first(inputs))
        for expert in r.model.experts:
            if torch.rand((), generator=torch.Generator().manual_seed(10 * number + expert.in_features)) < 0.5:
                hidden = hidden + expert(hidden)
        nn.functional.cross_entropy(r.model.last(hidden), labels).backward()
        r.optimizer.step()
        r.optimizer.zero_grad()


@kind("layer frozen in the middle, and trained again", optimizer=adam)
def frozen(r: Run) -> None:
    r.train(0, 1)
    r.model[0].requires_grad_(False)
    r.train(2, 3)
    r.model[0].requires_grad_(True)
    r.train(4, 5)


@kind("layer frozen while it has a gradient, which stays", optimizer=adam)
def frozen_with_gradient(r: Run) -> None:
    r.train(0)
    r.loss(1).backward()
    r.model[0].requires_grad_(False)
    r.optimizer.step()
    r.optimizer.step()
    r.optimizer.zero_grad()
    r.train(2)


@kind("bias without a gradient now and then", keeps_promise=False)
def bias(r: Run) -> None:
    for number in range(6):
        r.loss(number).backward()
        if number % 2:
            r.model[2].bias.grad = None
        r.optimizer.step()
        r.optimizer.zero_grad()


@kind("no gradient but one parameter's", optimizer=adam, keeps_promise=False)
def only_one(r: Run) -> None:
    for number in range(4):
        r.loss(number).backward()
        for parameter in list(r.model.parameters())[1:]:
            parameter.grad = None
        r.optimizer.step()
        r.optimizer.zero_grad()
    r.train(4)


@kind("layers trained by turns, a group each", optimizer=lambda m: torch.optim.Adam(_groups(m), weight_decay=0.01))
def by_turns(r: Run) -> None:
    for number in range(6):
        r.model[0].requires_grad_(number % 2 == 0)
        r.model[2].requires_grad_(number % 2 == 1)
        r.loss(number).backward()
        r.optimizer.step()
        r.optimizer.zero_grad()


def _groups(model: nn.Module) -> list[dict[str, object]]:
    first, last = model.get_submodule("0"), model.get_submodule("2")
    return [{"params": list(first.parameters()), "lr": 0.01}, {"params": list(last.parameters()), "lr": 0.02}]


@kind("two heads, a loss of one by turns", model=Experts, optimizer=momentum)
def heads(r: Run) -> None:
    for number in range(6):
        r.model.chosen = number % 2
        r.loss(number).backward()
        r.optimizer.step()
        r.model.zero_grad()


@kind("backward for a part of the parameters only", optimizer=adam)
def part_only(r: Run) -> None:
    for number in range(4):
        some = list(r.model[number % 2 * 2].parameters())
        r.loss(number).backward(inputs=some)
        r.optimizer.step()
        r.optimizer.zero_grad()
