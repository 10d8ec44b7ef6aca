"""Models of every make: buffers, tied and shared weights, other layouts, compiled, and parameters of odd shapes."""

import copy
import io
from typing import Any

import torch
from torch import nn

from tests.loops.registry import adam, kind
from tests.loops.run import Run
from tests.support.training import conv, mlp


@kind("BatchNorm in training", model=conv)
def batch_norm(r: Run) -> None:
    r.train(0, 1, 2)


@kind("BatchNorm, evaluated between steps", model=conv)
def batch_norm_evaluated(r: Run) -> None:
    for number in range(3):
        r.train(number)
        r.model.eval()
        with torch.no_grad():
            score = r.loss(10 + number).item()
        r.model.train()
        assert score


@kind("BatchNorm, a forward more between backward and step", model=conv, keeps_promise=False, workers=(1,))
def batch_norm_forward(r: Run) -> None:
    for number in range(3):
        r.loss(number).backward()
        with torch.no_grad():
            r.model(r.batch(10 + number)[0])
        r.optimizer.step()
        r.optimizer.zero_grad()


@kind("BatchNorm, batches dropped", model=conv, keeps_promise=False)
def batch_norm_dropped(r: Run) -> None:
    for number in range(4):
        r.loss(number).backward()
        if number % 2:
            r.optimizer.zero_grad()
            continue
        r.optimizer.step()
        r.optimizer.zero_grad()


@kind("running statistics reset in the middle", model=conv)
def statistics_reset(r: Run) -> None:
    r.train(0, 1)
    r.model[2].reset_running_stats()
    r.train(2)


class Queue(nn.Module):
    """A queue of unit vectors, its place, a mask and a mean that the loop keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.out = nn.Linear(12, 8), nn.Linear(8, 7)
        self.register_buffer("queue", nn.functional.normalize(torch.randn(64, 8), dim=1))
        self.register_buffer("place", torch.zeros(1, dtype=torch.long))
        self.register_buffer("filled", torch.zeros(64, dtype=torch.bool))
        self.register_buffer("centre", torch.zeros(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.out(self.encode(x) @ self.queue.clone().T @ self.queue.clone() - self.centre)
        return result


@torch.no_grad()
def _enqueue(model: Any, keys: torch.Tensor) -> None:
    place = int(model.place)
    model.queue[place : place + len(keys)] = nn.functional.normalize(keys, dim=1)
    model.filled[place : place + len(keys)] = True
    model.place[0] = (place + len(keys)) % 64
    model.centre.mul_(0.9).add_(keys.mean(0), alpha=0.1)


@kind("queue, counter and mask in buffers, written before the step", model=Queue, keeps_promise=False)
def queue(r: Run) -> None:
    for number in range(6):
        r.loss(number).backward()
        _enqueue(r.model, r.model.encode(r.batch(number)[0]))
        r.optimizer.step()
        r.optimizer.zero_grad()


@kind("queue, counter and mask in buffers, written after the step", model=Queue)
def queue_after(r: Run) -> None:
    for number in range(6):
        r.loss(number).backward()
        r.optimizer.step()
        r.optimizer.zero_grad()
        _enqueue(r.model, r.model.encode(r.batch(number)[0]))


@kind("buffer replaced by another tensor", model=Queue, workers=(1,))
def buffer_replaced(r: Run) -> None:
    for number in range(4):
        r.train(number)
        r.model.centre = r.model.centre * 0.5 + number


def _expanded() -> nn.Module:
    model = mlp()
    model.register_buffer("position", torch.ones(1).expand(5))
    return model


@kind("buffer that is an expanded view", model=_expanded)
def expanded(r: Run) -> None:
    r.train(0, 1, 2)


def _large_integers() -> nn.Module:
    model = mlp()
    model.register_buffer("count", torch.tensor([2**40 + 1, -(2**33) - 7]))
    return model


@kind("buffer of integers beyond 2**24", model=_large_integers)
def large_integers(r: Run) -> None:
    for number in range(3):
        r.train(number)
        r.model.count += 1


def _not_persistent() -> nn.Module:
    model = mlp()
    model.register_buffer("seen", torch.zeros(1), persistent=False)
    return model


@kind("buffer that is not persistent", model=_not_persistent)
def not_persistent(r: Run) -> None:
    for number in range(3):
        r.train(number)
        r.model.seen += r.rank + 1


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.out = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 7)
        self.other.weight = self.one.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.out(self.other(torch.tanh(self.one(x))))
        return result


@kind("tied weights", model=Tied)
def tied(r: Run) -> None:
    r.train(0, 1, 2)


@kind("tied weights, written", keeps_promise=False, model=Tied, optimizer=adam)
def tied_written(r: Run) -> None:
    for number in range(3):
        r.train(number)
        r.model.other.weight.data.clamp_(-0.1, 0.1)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.LSTM(4, 6, batch_first=True), nn.Linear(6, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.out(self.cell(x.view(-1, 3, 4))[0][:, -1])
        return result


@kind("LSTM", model=Recurrent)
def recurrent(r: Run) -> None:
    r.train(0, 1, 2)


@kind("LSTM through time in pieces, hidden state detached", model=Recurrent)
def through_time(r: Run) -> None:
    state = None
    for number in range(4):
        inputs, labels = r.batch(number)
        output, state = r.model.cell(inputs.view(-1, 3, 4), state)
        nn.functional.cross_entropy(r.model.out(output[:, -1]), labels).backward()
        state = tuple(each.detach() for each in state)
        r.optimizer.step()
        r.optimizer.zero_grad()


@kind("LSTM whose state keeps the graph of the step before raises", model=Recurrent)
def through_time_stale(r: Run) -> None:
    state = None
    said = ""
    for number in range(2):
        inputs, labels = r.batch(number)
        output, state = r.model.cell(inputs.view(-1, 3, 4), state)
        try:
            nn.functional.cross_entropy(r.model.out(output[:, -1]), labels).backward(retain_graph=True)
        except RuntimeError as error:
            said = str(error)[:70]
            break
        r.optimizer.step()
        r.optimizer.zero_grad()
    assert "has been modified" in said


class Odd(nn.Module):
    """Parameters that are a scalar, empty, and in lists and dictionaries."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.empty = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.empty(0, 3))
        self.some = nn.ParameterList([nn.Parameter(0.1 * torch.randn(12, 7)), nn.Parameter(torch.zeros(7))])
        self.named = nn.ParameterDict({"shift": nn.Parameter(torch.zeros(1, 7))})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.scale * (x @ self.some[0] + self.some[1]) + self.named["shift"] + self.empty.sum()
        return result


@kind("scalar and empty parameters, lists and dictionaries of them", model=Odd)
def odd(r: Run) -> None:
    r.train(0, 1, 2)


def _transposed() -> nn.Module:
    model = mlp()
    layer = model.get_submodule("0")
    layer.weight = nn.Parameter(layer.weight.detach().t().contiguous().t())
    return model


@kind("parameter that is not contiguous", model=_transposed)
def transposed(r: Run) -> None:
    r.train(0, 1, 2)


def _slices() -> nn.Module:
    model = mlp()
    together = torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])
    at = 0
    for parameter in model.parameters():
        parameter.data = together[at : at + parameter.numel()].view(parameter.shape)
        at += parameter.numel()
    return model


@kind("parameters that are slices of one tensor", model=_slices)
def slices(r: Run) -> None:
    r.train(0, 1, 2)


def _channels_last() -> nn.Module:
    return conv().to(memory_format=torch.channels_last)  # type: ignore[no-any-return]


@kind("channels_last", model=_channels_last)
def channels_last(r: Run) -> None:
    r.train(0, 1, 2)


def _shared_memory() -> nn.Module:
    return mlp().share_memory()


@kind("parameters in torch's own shared memory", model=_shared_memory)
def shared_memory(r: Run) -> None:
    r.train(0, 1, 2)


@kind("model compiled with backend eager", workers=(1,), is_observed=False)
def compiled(r: Run) -> None:
    model = torch.compile(r.model, backend="eager")
    for number in range(4):
        inputs, labels = r.batch(number)
        nn.functional.cross_entropy(model(inputs), labels).backward()
        r.optimizer.step()
        r.optimizer.zero_grad()


@kind("model through pickle in the middle")
def pickled(r: Run) -> None:
    r.train(0, 1)
    file = io.BytesIO()
    torch.save(r.model, file)
    file.seek(0)
    copied = torch.load(file, weights_only=False)
    score = copied(r.batch(9)[0]).sum().item()
    r.train(2)
    assert score


@kind("dropout", model=lambda: nn.Sequential(nn.Linear(12, 20), nn.Dropout(0.5), nn.Linear(20, 7)), workers=(1,))
def dropout(r: Run) -> None:
    r.train(0, 1, 2)


@kind("autocast to bfloat16")
def autocast(r: Run) -> None:
    for number in range(3):
        inputs, labels = r.batch(number)
        with torch.autocast("cpu", torch.bfloat16):
            output = r.model(inputs)
        nn.functional.cross_entropy(output.float(), labels).backward()
        r.optimizer.step()
        r.optimizer.zero_grad()


@kind("teacher that follows the student (EMA), both in the loop")
def teacher(r: Run) -> None:
    teacher = copy.deepcopy(r.model).requires_grad_(False)
    for number in range(4):
        inputs, _ = r.batch(number)
        (r.model(inputs) - teacher(inputs) - 1).square().mean().backward()
        r.optimizer.step()
        r.optimizer.zero_grad()
        with torch.no_grad():
            for slow, fast in zip(teacher.parameters(), r.model.parameters(), strict=True):
                slow.lerp_(fast, 0.1)
        followed = teacher[0].weight
        assert followed is not None


@kind("target network copied now and then", keeps_promise=False)
def target(r: Run) -> None:
    target = copy.deepcopy(r.model)
    for number in range(5):
        inputs, _ = r.batch(number)
        with torch.no_grad():
            wanted = 0.9 * target(inputs).max(1, keepdim=True).values
        (r.model(inputs) - wanted).square().mean().backward()
        for parameter in r.model.parameters():
            parameter.grad.data.clamp_(-0.05, 0.05)
        r.optimizer.step()
        r.optimizer.zero_grad()
        if number % 2:
            target.load_state_dict(r.model.state_dict())


@kind("complex parameter", model=lambda: _complex(), refused="complex")
def complex_parameter(r: Run) -> None:
    (r.model(r.batch(0)[0]).square().mean() + r.model.phase.abs().sum()).backward()
    r.optimizer.step()


def _complex() -> nn.Module:
    model = mlp()
    model.register_parameter("phase", nn.Parameter(torch.ones(3, dtype=torch.complex64)))
    return model
