"""A loop whose gradients are clipped worker by worker is told so once, and no other loop is."""

import logging
from collections.abc import Callable

import pytest
import torch
from torch import nn

from tests.support.training import backward, mlp, seeded
from torch_ps.worker.optim.clip_notice import ClipNotice

Change = Callable[[nn.Module, int], object]


def told(
    change: Change, caplog: pytest.LogCaptureFixture, *, workers: int = 2, dtype: torch.dtype = torch.float32
) -> int:
    """How often a loop of ten steps is told that changes its gradients in this way."""
    model = seeded(mlp).to(dtype)
    notice = ClipNotice(list(model.parameters()), "w0")
    with caplog.at_level(logging.WARNING):
        for step in range(10):
            model.zero_grad()
            inputs, labels = torch.randn(4, 12, dtype=dtype), torch.randint(7, (4,))
            nn.functional.cross_entropy(model(inputs), labels).backward()  # type: ignore[no-untyped-call]
            change(model, step)
            notice.check(workers)
    return len([message for message in caplog.messages if "write optimizer.clip_grad_norm_(max_norm)" in message])


def multiply(model: nn.Module, factor: float) -> None:
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(factor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clipping_by_norm_is_told_once(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    def clip(model: nn.Module, step: int) -> object:
        return nn.utils.clip_grad_norm_(model.parameters(), 0.1)

    assert told(clip, caplog, dtype=dtype) == 1


def test_clipping_of_a_worker_that_is_alone_is_not_told(caplog: pytest.LogCaptureFixture) -> None:
    assert told(lambda model, step: nn.utils.clip_grad_norm_(model.parameters(), 0.1), caplog, workers=1) == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda model, step: None,
        lambda model, step: nn.utils.clip_grad_norm_(model.parameters(), 1e6),
        lambda model, step: nn.utils.clip_grad_value_(model.parameters(), 0.001),
        lambda model, step: multiply(model, 2.0**-step),
        lambda model, step: multiply(model, 1 / 3),
        lambda model, step: backward(model, step),
        lambda model, step: model.zero_grad(),
    ],
    ids=["nothing", "too small to clip", "by value", "unscaled", "averaged", "a second backward", "dropped"],
)
def test_other_changes_are_not_told(change: Change, caplog: pytest.LogCaptureFixture) -> None:
    assert told(change, caplog) == 0


def test_notice_that_is_closed_tells_nothing(caplog: pytest.LogCaptureFixture) -> None:
    model = seeded(mlp)
    notice = ClipNotice(list(model.parameters()), "w0")
    notice.close()
    for step in range(3):
        model.zero_grad()
        backward(model, step)
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        notice.check(2)
    assert caplog.messages == []
