"""The kinds of loops: each is a function that reads as a user's script does, with what it is to come to."""

import importlib
import pkgutil
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tests.loops.run import Loop
from tests.support.training import mlp

MakeModel = Callable[[], nn.Module]
MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


def momentum(model: nn.Module) -> torch.optim.Optimizer:
    """SGD whose state and weight decay show each step that should not have been."""
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    """Adam with weight decay: its step count shows, too."""
    return torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=0.01)


@dataclass(frozen=True, eq=False)
class Kind:
    """A kind of loops.

    Attributes:
        name: what the loop does, in words.
        subject: name of the module that it is from.
        loop: function that runs it.
        model, optimizer: functions that make what it trains.
        options: options of the worker, beside plane and overlap.
        workers: numbers of workers for which it has a meaning.
        refused: words of the error that a worker ends with before anything is applied; "" where none is allowed.
        refused_with: the same for some values of overlap only.
        keeps_promise: whether a gradient stays as backward left it, and nothing is read before ``step``: what
            ``overlap="eager"`` is for.
        keeps_views: whether a view or array of a weight is kept, whose use ``overlap="forward"`` cannot see.
        same_gradients: whether ``.grad`` is compared, too. False with a GradScaler: a wrapped optimizer leaves the
            scale in it, as torch's own do that ``_step_supports_amp_scaling``, such as the fused ones.
        is_observed: whether model and gradients are compared after each line, too, not only after the last one.
    """

    name: str
    subject: str
    loop: Loop
    model: MakeModel = mlp
    optimizer: MakeOptimizer = momentum
    options: Mapping[str, Any] = field(default_factory=dict)
    workers: tuple[int, ...] = (1, 2)
    refused: str = ""
    refused_with: Mapping[str, str] = field(default_factory=dict)
    keeps_promise: bool = True
    keeps_views: bool = False
    same_gradients: bool = True
    is_observed: bool = True

    def is_for(self, overlap: str) -> bool:
        """Whether the documentation of a value of overlap covers this loop."""
        return not ("eager" in overlap and not self.keeps_promise) and not ("forward" in overlap and self.keeps_views)


KINDS: dict[str, Kind] = {}


def kind(name: str, **about: Any) -> Callable[[Loop], Loop]:
    """Enter a loop among the kinds.

    Args:
        name: description of what it does; names the test.
        about: attributes of ``Kind``.
    """

    def enter(loop: Loop) -> Loop:
        assert name not in KINDS, f"two kinds are called {name!r}"
        KINDS[name] = Kind(name, loop.__module__.rpartition(".")[2], loop, **about)
        return loop

    return enter


def load() -> dict[str, Kind]:
    """All kinds, by name, in the order of their modules."""
    package = importlib.import_module("tests.loops.kinds")
    for module in sorted(each.name for each in pkgutil.iter_modules(package.__path__)):
        importlib.import_module(f"tests.loops.kinds.{module}")
    return KINDS


def listed() -> str:
    """All kinds as lines of markdown, an entry for each module of ``tests/loops/kinds``."""
    names: dict[str, list[str]] = {}
    for each in load().values():
        names.setdefault(each.subject, []).append(each.name)
    entries = [f"* `{subject}.py`, {len(found)} kinds: {'; '.join(found)}" for subject, found in sorted(names.items())]
    return "\n".join(textwrap.fill(entry, 120, subsequent_indent="  ", break_on_hyphens=False) for entry in entries)
