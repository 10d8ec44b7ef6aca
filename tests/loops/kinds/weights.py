"""Weights that the loop writes itself, in every way, between any two lines."""

import copy
import io
import warnings
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parameters_to_vector, parametrizations, prune, vector_to_parameters
from torch.optim.swa_utils import AveragedModel

from tests.loops.registry import adam, kind
from tests.loops.run import Run
from tests.support.training import mlp


def _written(name: str, write: Any, *, workers: tuple[int, ...] = (1, 2)) -> None:
    """A kind that writes weights after each step."""

    @kind(name, workers=workers, optimizer=adam, keeps_promise=False)
    def loop(r: Run) -> None:
        for number in range(4):
            r.loss(number).backward()
            r.optimizer.step()
            r.optimizer.zero_grad()
            write(r.model)


def _each(write: Any) -> Any:
    def all_of(model: nn.Module) -> None:
        for parameter in model.parameters():
            write(parameter)

    return all_of


@torch.no_grad()
def _no_grad(p: nn.Parameter) -> None:
    p.clamp_(-0.1, 0.1)


@torch.no_grad()
def _unit_rows(p: nn.Parameter) -> None:
    if p.dim() == 2:
        p.div_(p.norm(dim=1, keepdim=True))


@torch.no_grad()
def _one_element(model: nn.Module) -> None:
    next(model.parameters())[0, 0] = 0.0


@torch.no_grad()
def _pruned(model: nn.Module) -> None:
    weight = next(model.parameters())
    weight.mul_((torch.arange(weight.numel()).view(weight.shape) % 3 > 0).float())


def _by_numpy(p: nn.Parameter) -> None:
    values = p.detach().numpy()
    values.clip(-0.1, 0.1, out=values)


def _by_vector(model: nn.Module) -> None:
    vector_to_parameters(parameters_to_vector(model.parameters()).detach() * 0.9, model.parameters())


def _other_data(p: nn.Parameter) -> None:
    p.data = p.data * 0.9


def _init(model: nn.Module) -> None:
    torch.nn.init.constant_(list(model.parameters())[-1], 0.25)


def _loaded(model: nn.Module) -> None:
    state = copy.deepcopy(model.state_dict())
    state["0.weight"] *= 0.9
    model.load_state_dict(state)


def _assigned(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data.set_(parameter.data.clamp(-0.1, 0.1))


_written("p.data.clamp_() after each step, as in WGAN", _each(lambda p: p.data.clamp_(-0.1, 0.1)))
_written("p.clamp_() under no_grad after each step", _each(_no_grad))
_written("p.copy_() after each step", _each(lambda p: p.data.copy_(p.data.sign() * 0.1)))
_written("rows projected to unit length", _each(_unit_rows))
_written("one element written", _one_element)
_written("pruning mask by hand", _pruned)
_written("weights written through numpy", _each(_by_numpy))
_written("weights written through dlpack", _each(lambda p: torch.from_dlpack(p.detach()).mul_(0.9)))
_written("vector_to_parameters", _by_vector)
_written("p.data = ... after each step", _each(_other_data))
_written("p.data.set_() after each step", _assigned)
_written("weight decay by hand", _each(lambda p: p.data.mul_(0.99)))
_written("layer initialised again", _init)
_written("load_state_dict in the middle", _loaded)


@kind("weights written between backward and step", keeps_promise=False)
def written_between(r: Run) -> None:
    for number in range(4):
        r.loss(number).backward()
        for parameter in r.model.parameters():
            parameter.data.clamp_(-0.2, 0.2)
        r.optimizer.step()
        r.optimizer.zero_grad()


@kind("weights written before the first step", keeps_promise=False)
def written_first(r: Run) -> None:
    with torch.no_grad():
        r.model[0].weight.mul_(0.5)
    r.train(0, 1, 2)


@kind("weights loaded before the first step", keeps_promise=False)
def loaded_first(r: Run) -> None:
    torch.manual_seed(5)
    r.model.load_state_dict(mlp().state_dict())
    r.train(0, 1, 2)


@kind("weights written, then a step without gradients", keeps_promise=False)
def written_alone(r: Run) -> None:
    r.train(0, 1, 2)
    with torch.no_grad():
        r.model[0].weight.fill_(0.1)
    r.optimizer.step()
    r.train(3)


@kind("weights of one worker are written", keeps_promise=False, workers=(2,))
def written_by_one(r: Run) -> None:
    for number in range(4):
        r.loss(number).backward()
        r.optimizer.step()
        r.optimizer.zero_grad()
        if r.rank == 1:
            with torch.no_grad():
                r.model[2].bias.fill_(0.1)


@kind("weights of both workers are written, differently", keeps_promise=False, workers=(2,))
def written_by_both(r: Run) -> None:
    for number in range(4):
        r.loss(number).backward()
        r.optimizer.step()
        r.optimizer.zero_grad()
        with torch.no_grad():
            r.model[2].bias.fill_(0.1 * (1 + r.rank))


@kind("average of the weights evaluated, then the weights put back")
def averaged_and_back(r: Run) -> None:
    average = [parameter.detach().clone() for parameter in r.model.parameters()]
    for number in range(4):
        r.train(number)
        for mean, parameter in zip(average, r.model.parameters(), strict=True):
            mean.lerp_(parameter.detach(), 0.1)
        kept = [parameter.detach().clone() for parameter in r.model.parameters()]
        for mean, parameter in zip(average, r.model.parameters(), strict=True):
            parameter.data.copy_(mean)
        with torch.no_grad():
            score = r.loss(20).item()
        for saved, parameter in zip(kept, r.model.parameters(), strict=True):
            parameter.data.copy_(saved)
        assert score


@kind("average of the weights stays, and training goes on from it", keeps_promise=False)
def averaged_and_kept(r: Run) -> None:
    average = AveragedModel(r.model)
    r.train(0, 1)
    average.update_parameters(r.model)
    r.train(2)
    average.update_parameters(r.model)
    r.model.load_state_dict(average.module.state_dict())
    r.optimizer.step()
    r.train(3)


@kind("Lookahead: slow weights every other step", keeps_promise=False)
def lookahead(r: Run) -> None:
    slow = [parameter.detach().clone() for parameter in r.model.parameters()]
    for number in range(6):
        r.train(number)
        if number % 2:
            for kept, parameter in zip(slow, r.model.parameters(), strict=True):
                kept.lerp_(parameter.detach(), 0.5)
                parameter.data.copy_(kept)


@kind("sharpness-aware: weights moved and put back between two backwards", keeps_promise=False)
def sharpness(r: Run) -> None:
    for number in range(3):
        r.loss(number).backward()
        kept = [parameter.detach().clone() for parameter in r.model.parameters()]
        for parameter in r.model.parameters():
            parameter.data.add_(parameter.grad, alpha=0.05)
        r.optimizer.zero_grad()
        r.loss(number).backward()
        for saved, parameter in zip(kept, r.model.parameters(), strict=True):
            parameter.data.copy_(saved)
        r.optimizer.step()
        r.optimizer.zero_grad()


@kind("evolution: weights tried, the better ones kept", keeps_promise=False)
def tried(r: Run) -> None:
    for number in range(3):
        r.train(number)
        with torch.no_grad():
            before = r.loss(30).item()
            noise = torch.randn(r.model[2].bias.shape, generator=torch.Generator().manual_seed(number))
            r.model[2].bias.add_(noise, alpha=0.1)
            after = r.loss(30).item()
            if after > before:
                r.model[2].bias.sub_(noise, alpha=0.1)


@kind(
    "weights and momentum-free state rolled back to an earlier copy", keeps_promise=False, optimizer=lambda m: _sgd(m)
)
def rolled_back(r: Run) -> None:
    r.train(0)
    kept = copy.deepcopy(r.model.state_dict())
    r.train(1, 2)
    r.model.load_state_dict(kept)
    r.train(3)


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


@kind("weights through a file and back", keeps_promise=False)
def through_a_file(r: Run) -> None:
    for number in range(3):
        r.train(number)
        file = io.BytesIO()
        torch.save(r.model.state_dict(), file)
        file.seek(0)
        r.model.load_state_dict(torch.load(file))


@kind("state_dict scaled and loaded", keeps_promise=False)
def assigned(r: Run) -> None:
    r.train(0, 1)
    state = {name: 0.9 * value for name, value in r.model.state_dict().items()}
    r.model.load_state_dict(state)
    r.train(2)


class Watched(nn.Sequential):
    """Keeps a view and an array of its first weight."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(12, 33), nn.Tanh(), nn.Linear(33, 7))
        self.live = [self[0].weight.detach(), torch.from_numpy(self[2].weight.detach().numpy())]


@kind("views of weights from before the optimizer was made", keeps_promise=False, model=Watched, keeps_views=True)
def views_from_before(r: Run) -> None:
    for number in range(4):
        r.train(number)
        view, array = r.model.live
        array.mul_(0.9)
        assert view is not array


@kind("views of weights from inside the loop", keeps_promise=False, model=Watched, keeps_views=True)
def views_from_inside(r: Run) -> None:
    view, array = r.model[0].weight.detach(), r.model[2].weight.detach().numpy()
    for number in range(4):
        r.train(number)
        array *= 0.9
        total = view.sum().item() + array.sum().item()
        assert total


@kind("copy of the model between steps, trained by itself")
def copied(r: Run) -> None:
    for number in range(3):
        r.train(number)
        other = copy.deepcopy(r.model)
        nn.functional.cross_entropy(other(r.batch(40)[0]), r.batch(40)[1]).backward()
        with torch.no_grad():
            other[0].weight.add_(1.0)
        weight = other[0].weight.detach()
        assert weight.shape


def _weight_norm() -> nn.Module:
    model = mlp()
    parametrizations.weight_norm(model.get_submodule("0"))
    return model


def _spectral_norm() -> nn.Module:
    model = mlp()
    parametrizations.spectral_norm(model.get_submodule("2"))
    return model


def _orthogonal() -> nn.Module:
    model = mlp()
    parametrizations.orthogonal(model.get_submodule("2"))
    return model


def _pruned_module() -> nn.Module:
    model = mlp()
    prune.l1_unstructured(model.get_submodule("0"), "weight", amount=0.5)
    return model


for name, make in {
    "weight_norm": _weight_norm,
    "spectral_norm": _spectral_norm,
    "orthogonal parametrization": _orthogonal,
    "torch.nn.utils.prune before the start": _pruned_module,
}.items():
    # The vectors of spectral_norm's power iteration are each worker's own until the next step.
    @kind(name, model=make)
    def parametrized(r: Run) -> None:
        r.train(0, 1, 2, 3)


@kind("torch.nn.utils.prune's mask made sharper in the middle", model=_pruned_module)
def pruned_more(r: Run) -> None:
    r.train(0, 1)
    with torch.no_grad():
        r.model[0].weight_mask[:, ::2] = 0
    r.train(2, 3)


class Words(nn.Module):
    """Embedding whose rows are renormalised in forward."""

    def __init__(self, **about: Any) -> None:
        super().__init__()
        self.words, self.out = nn.Embedding(12, 8, **about), nn.Linear(8, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.out(self.words(x.argmax(1)))
        return result


@kind("nn.Embedding(max_norm=...)", keeps_promise=False, model=lambda: Words(max_norm=1.0))
def max_norm(r: Run) -> None:
    r.train(0, 1, 2, 3)


@kind("nn.Embedding(padding_idx=...)", model=lambda: Words(padding_idx=3))
def padding(r: Run) -> None:
    r.train(0, 1, 2)


def _sparse_sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


@kind(
    "nn.Embedding(sparse=True), gradients coalesced",
    keeps_promise=False,
    model=lambda: Words(sparse=True),
    optimizer=_sparse_sgd,
)
def sparse(r: Run) -> None:
    for number in range(3):
        r.loss(number).backward()
        # Else torch adds the rows of a word that comes twice one after the other, which rounds otherwise.
        r.model.words.weight.grad = r.model.words.weight.grad.coalesce()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the gradient is pushed as a dense one
            r.optimizer.step()
        r.optimizer.zero_grad()
