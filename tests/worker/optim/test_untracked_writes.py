"""What scripts of plain torch do that the servers would not see is an error or a warning, never lost without a word."""

import contextlib
import copy
import io
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import torch_ps
from tests.support.jobs import job
from tests.support.training import backward, mlp, same, seeded


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01, foreach=False)


@contextlib.contextmanager
def served(
    model: nn.Module, optimizer: torch.optim.Optimizer | None = None, **options: Any
) -> Iterator[torch_ps.ParameterServerOptimizer]:
    with (
        job() as servers,
        torch_ps.ParameterServerOptimizer(optimizer or adamw(model), model, str(servers), **options) as wrapped,
    ):
        yield wrapped


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    for step in range(steps):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("options", [{"overlap": "eager"}, {"overlap": "eager,forward"}, {"local_steps": 2}])
def test_model_that_is_loaded_after_the_optimizer_was_made_is_refused_at_the_first_step(
    options: dict[str, Any],
) -> None:
    model = seeded(mlp)
    with served(model, **options) as optimizer:
        model.load_state_dict(seeded(mlp, 2).state_dict())
        with pytest.raises(torch_ps.PsError, match=r"'0\.weight' was written to after .* load or initialise the model"):
            train(model, optimizer)


@pytest.mark.parametrize("options", [{}, {"overlap": "forward"}, {"plane": "network"}])
def test_model_that_is_loaded_after_the_optimizer_was_made_is_trained_from_what_was_loaded(
    options: dict[str, Any],
) -> None:
    alone, model = seeded(mlp, 2), seeded(mlp)
    train(alone, adamw(alone))
    with served(model, **options) as optimizer:
        model.load_state_dict(seeded(mlp, 2).state_dict())
        train(model, optimizer)
    assert same(model, alone)


def test_weights_that_an_eager_loop_changes_break_its_promise_before_anything_of_the_step_is_applied() -> None:
    model = seeded(mlp)
    with served(model, overlap="eager") as optimizer:
        train(model, optimizer)
        with torch.no_grad():
            model.get_parameter("2.bias").clamp_(-0.01, 0.01)
        with pytest.raises(torch_ps.PsError, match=r"'2\.bias' was written to between two steps.*leave overlap out"):
            train(model, optimizer)
        assert optimizer.version == 3


def test_parameter_that_was_frozen_when_the_optimizer_was_made_is_refused_once_it_is_to_be_trained() -> None:
    model = seeded(mlp)
    model.get_parameter("0.weight").requires_grad_(False)
    with served(model) as optimizer:
        train(model, optimizer)
        model.requires_grad_(True)
        with pytest.raises(torch_ps.PsError, match=r"'0\.weight' was frozen when the optimizer was made"):
            train(model, optimizer)


def test_group_that_is_added_to_a_job_is_refused() -> None:
    model = seeded(mlp)
    with served(model) as optimizer:
        with pytest.raises(torch_ps.PsError, match="give the optimizer all groups before it is wrapped"):
            optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
        train(model, optimizer)


@pytest.mark.parametrize("plane", ["memory", "network"])
def test_frozen_parameter_stands_still_beside_others_of_its_group(plane: str, caplog: pytest.LogCaptureFixture) -> None:
    def run(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        train(model, optimizer)
        model[0].requires_grad_(False)  # type: ignore[index]
        train(model, optimizer)

    alone, model = seeded(mlp), seeded(mlp)
    run(alone, adamw(alone))
    with served(model, plane=plane) as optimizer:
        run(model, optimizer)
    assert same(model, alone)
    assert warnings_of(caplog) == []


def test_state_that_would_not_be_used_is_named_and_what_is_saved_loads_into_plain_torch(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = seeded(mlp)
    plain = adamw(model)
    train(model, plain)
    with served(model, plain) as optimizer:
        assert "state of 4 parameters" in warnings_of(caplog).pop()
        optimizer.load_state_dict(copy.deepcopy(plain.state_dict()))
        assert "state of 4 parameters" in warnings_of(caplog).pop()
        caplog.clear()
        for group in optimizer.param_groups:
            group["lr"] = 0.005
        train(model, optimizer)
        torch.save(optimizer.state_dict(), file := io.BytesIO())
    assert warnings_of(caplog) == []
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    assert saved["version"] == 3
    other = adamw(model)
    other.load_state_dict(saved)
    assert other.param_groups[0]["lr"] == 0.005
    train(model, other)
    with served(model) as optimizer:
        optimizer.load_state_dict(saved)
        assert optimizer.param_groups[0]["lr"] == 0.005
    (warning,) = warnings_of(caplog)
    assert "saved at version 3 and the servers are at version 0" in warning


def test_schedule_that_was_made_with_the_wrapped_optimizer_works_without_a_warning() -> None:
    def run(model: nn.Module, over: bool) -> None:
        inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        schedule = torch.optim.lr_scheduler.OneCycleLR(inner, 0.2, total_steps=9)
        with served(model, inner) if over else contextlib.nullcontext(inner) as optimizer:
            for step in range(6):
                backward(model, step)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()

    local, remote = seeded(mlp), seeded(mlp)
    run(local, over=False)
    run(remote, over=True)
    assert same(local, remote)
