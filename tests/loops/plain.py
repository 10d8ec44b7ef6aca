"""What plain torch makes of a loop: one process, or several whose steps take the mean as a synchronous job does.

    loop of rank 0 --step()--\
                              mean of the gradients, lowest rank's hyperparameters --> torch.optim steps each model
    loop of rank 1 --step()--/

Rules of this file
  1. A gradient that one worker lacks counts as zero there; one that none has is none.
  2. A worker whose gradients are not finite brings none.
  3. Weights that a loop has written are those of the lowest rank that wrote.
  4. Running statistics are averaged; any other buffer is that of the lowest rank, unless it is not persistent.
"""

import threading
import types
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from tests.loops.observed import Look, Moment, end, observe
from tests.loops.registry import Kind
from tests.loops.run import Run
from tests.support.threads import at_once

#: Seconds in which the other loops have to come to their step.
SECONDS = 60.0
AVERAGED = ("running_mean", "running_var")


def make(kind: Kind) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Model and optimizer of a loop, the same each time."""
    torch.manual_seed(1)
    model = kind.model()
    return model, kind.optimizer(model)


def plain_torch(kind: Kind, num_workers: int, look: Look) -> list[list[Moment]]:
    """What plain torch makes of a loop: for each worker what there is after each line.

    Raises:
        Exception: the loop ends with an error in plain torch, too.
    """
    made = [make(kind) for _ in range(num_workers)]
    runs = [Run(model, optimizer, rank, num_workers, is_plain=True) for rank, (model, optimizer) in enumerate(made)]
    if num_workers == 1:
        torch.manual_seed(2)
        return [_finished(kind, runs[0], look)]
    mean = Mean([model for model, _ in made], [optimizer for _, optimizer in made])

    def one(run: Run) -> list[Moment]:
        try:
            return _finished(kind, run, look)
        finally:
            mean.leave(run.rank)

    return at_once(*(lambda run=run: one(run) for run in runs))


def _finished(kind: Kind, run: Run, look: Look) -> list[Moment]:
    moments, error = observe(kind.loop, run, look)
    if error is not None:
        raise error
    return [*moments, end(run)]


class Mean:
    """Makes the steps of several plain optimizers those of one synchronous job.

    Args:
        models: the model of each rank, alike.
        optimizers: their optimizers, in the same order.
    """

    def __init__(self, models: Sequence[nn.Module], optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self._models, self._optimizers = models, optimizers
        self._parameters = [[p for group in o.param_groups for p in group["params"]] for o in optimizers]
        self._condition = threading.Condition()
        self._present, self._there, self._round = set(range(len(models))), set[int](), 0
        self._last: list[torch.Tensor] = [parameter.detach().clone() for parameter in self._parameters[0]]
        self._steps = [optimizer.step for optimizer in optimizers]
        self._error: BaseException | None = None
        for rank, optimizer in enumerate(optimizers):
            optimizer.step = types.MethodType(self._step_of(rank), optimizer)  # type: ignore[method-assign]

    def _step_of(self, rank: int) -> Any:
        def step(optimizer: torch.optim.Optimizer, closure: Any = None) -> Any:
            with torch.enable_grad():
                loss = closure() if closure is not None else None
            self._meet(rank)
            return loss

        return step

    def leave(self, rank: int) -> None:
        """The loop of a rank is over: the others go on."""
        with self._condition:
            self._present.discard(rank)
            self._go_on()

    def _meet(self, rank: int) -> None:
        with self._condition:
            number = self._round
            self._there.add(rank)
            self._go_on()
            assert self._condition.wait_for(lambda: self._round > number, SECONDS), "the other loop does not step"
            if self._error is not None:
                raise self._error

    def _go_on(self) -> None:
        if self._there and self._there >= self._present:
            try:
                self._step()
            except Exception as error:  # noqa: BLE001 - raised in every loop
                self._error = error
            self._there.clear()
            self._round += 1
            self._condition.notify_all()

    @torch.no_grad()
    def _step(self) -> None:
        there, lowest = sorted(self._there), min(self._there)
        gradients = {rank: [_dense(p.grad) for p in self._parameters[rank]] for rank in there}
        contributors = [rank for rank in there if all(g is None or g.isfinite().all() for g in gradients[rank])]
        mean = [self._mean([gradients[rank][i] for rank in contributors]) for i in range(len(self._last))]
        start = [self._start(i, there) for i in range(len(self._last))]
        for rank in range(len(self._models)):
            parameters = self._parameters[rank]
            own = [parameter.grad for parameter in parameters]
            groups = zip(self._optimizers[rank].param_groups, self._optimizers[lowest].param_groups, strict=True)
            kept = [dict(group) for group in self._optimizers[rank].param_groups]
            for group, job in groups:
                group.update({key: value for key, value in job.items() if key != "params"})
            for parameter, value, gradient in zip(parameters, start, mean, strict=True):
                if not torch.equal(parameter, value):  # else a graph from before stays valid if nothing is stepped
                    parameter.copy_(value)
                parameter.grad = None if gradient is None else gradient.clone()
            self._steps[rank]()
            for group, before in zip(self._optimizers[rank].param_groups, kept, strict=True):
                group.update(before)
            for parameter, gradient in zip(parameters, own, strict=True):
                parameter.grad = gradient
        self._last = [parameter.detach().clone() for parameter in self._parameters[lowest]]
        self._share_buffers(there)

    @staticmethod
    def _mean(gradients: list[torch.Tensor | None]) -> torch.Tensor | None:
        there = [gradient for gradient in gradients if gradient is not None]
        if not there:
            return None
        return torch.stack(there).sum(0).div(len(gradients))

    def _start(self, index: int, there: list[int]) -> torch.Tensor:
        """Where the step of one parameter begins."""
        for rank in there:
            value: torch.Tensor = self._parameters[rank][index].detach().clone()
            if not torch.equal(value, self._last[index]):
                return value
        return self._last[index]

    def _share_buffers(self, there: list[int]) -> None:
        buffers = [dict(model.named_buffers()) for model in self._models]
        for name in self._models[0].state_dict().keys() & buffers[0].keys():
            brought = [buffers[rank][name] for rank in there]
            averaged = name.endswith(AVERAGED)
            value = torch.stack(brought).sum(0) / len(brought) if averaged else brought[0].clone()
            for rank in there:
                if not torch.equal(buffers[rank][name], value):  # an expanded view cannot be written to
                    buffers[rank][name].copy_(value)


def _dense(gradient: torch.Tensor | None) -> torch.Tensor | None:
    return gradient.to_dense() if gradient is not None and gradient.layout is not torch.strided else gradient
