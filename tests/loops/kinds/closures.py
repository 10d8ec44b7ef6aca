"""What a loop may give ``step`` to evaluate: closures that zero, add, raise or do nothing."""

import contextlib

import torch

from tests.loops.registry import kind
from tests.loops.run import Run


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
