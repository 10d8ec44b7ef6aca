"""Hooks, state and groups of either optimizer mean what they mean in torch, or an error says why not."""

from typing import Any

import pytest
import torch

import torch_ps
from tests.support.jobs import job
from tests.support.training import backward, mlp, seeded


def calls(hooked: torch.optim.Optimizer, used: torch.optim.Optimizer, model: torch.nn.Module) -> list[str]:
    """The hooks of ``hooked`` that run when a loop uses ``used``."""
    seen: list[str] = []

    def note(name: str) -> Any:
        def hook(optimizer: torch.optim.Optimizer, *more: Any) -> None:
            assert optimizer is hooked
            seen.append(f"{name} {len(more)}")

        return hook

    hooked.register_step_pre_hook(note("before step"))
    hooked.register_step_post_hook(note("after step"))
    hooked.register_state_dict_pre_hook(note("before state_dict"))
    hooked.register_state_dict_post_hook(note("after state_dict"))
    hooked.register_load_state_dict_pre_hook(note("before load"))
    hooked.register_load_state_dict_post_hook(note("after load"))
    backward(model, 0)
    used.step()
    used.load_state_dict(used.state_dict())
    return seen


@pytest.mark.parametrize("options", [{}, {"local_steps": 2}], ids=["servers", "local"])
def test_hooks_of_either_optimizer_run_as_in_torch(options: dict[str, Any]) -> None:
    plain = seeded(mlp)
    reference = torch.optim.SGD(plain.parameters(), lr=0.1)
    expected = calls(reference, reference, plain)
    assert len(expected) == 6
    with job() as servers:
        model = seeded(mlp)
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        with torch_ps.ParameterServerOptimizer(sgd, model, str(servers), **options) as optimizer:
            assert calls(optimizer, optimizer, model) == expected
            assert calls(sgd, optimizer, model) == expected


def test_what_hooks_change_counts() -> None:
    with job() as servers:
        model = seeded(mlp)
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        with torch_ps.ParameterServerOptimizer(sgd, model, str(servers)) as optimizer:
            sgd.register_step_pre_hook(lambda *_: ((sgd, lambda: 5.0), {}))
            assert optimizer.step() == 5.0
            for each in (optimizer, sgd):
                each.register_state_dict_post_hook(lambda _, found: {**found, "mine": found.get("mine", 0) + 1})
            assert optimizer.state_dict()["mine"] == 2

            def rate(_: torch.optim.Optimizer, found: dict[str, Any]) -> dict[str, Any]:
                return {**found, "param_groups": [{**group, "lr": 0.25} for group in found["param_groups"]]}

            optimizer.register_load_state_dict_pre_hook(rate)
            optimizer.load_state_dict(optimizer.state_dict())
            assert sgd.param_groups[0]["lr"] == 0.25


def test_groups_stay_shared_when_the_wrapped_optimizer_loads() -> None:
    with job() as servers:
        model = seeded(mlp)
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        with torch_ps.ParameterServerOptimizer(sgd, model, str(servers)) as optimizer:
            saved = sgd.state_dict()
            saved["param_groups"][0]["lr"] = 0.5
            sgd.load_state_dict(saved)
            assert optimizer.param_groups is sgd.param_groups
            assert optimizer.param_groups[0]["lr"] == 0.5
            backward(model, 0)
            optimizer.step()


def test_groups_that_have_changed_are_refused_at_step_before_anything_is_sent() -> None:
    with job() as servers:
        model = seeded(mlp)
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        with torch_ps.ParameterServerOptimizer(sgd, model, str(servers), name="w0") as optimizer:
            sgd.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]})
            backward(model, 0)
            with pytest.raises(
                torch_ps.PsError, match="groups of worker 'w0' are not those that it joined the job with"
            ):
                optimizer.step()
            sgd.param_groups.pop()
            last = sgd.param_groups[0]["params"].pop()
            with pytest.raises(torch_ps.PsError, match="groups or their parameters were added, removed or replaced"):
                optimizer.step()
            sgd.param_groups[0]["params"].append(last)
            assert optimizer.version == 0
            optimizer.step()
            assert optimizer.version == 1


def test_state_on_the_servers_cannot_be_reset_from_a_worker() -> None:
    with job() as servers:
        model = seeded(mlp)
        sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        with torch_ps.ParameterServerOptimizer(sgd, model, str(servers)) as optimizer:
            parameter = next(model.parameters())
            optimizer.state.clear()  # there is none yet, as in torch
            backward(model, 0)
            optimizer.step()
            assert optimizer.state[parameter].get("momentum_buffer") is None
            for change in (
                lambda: optimizer.state.clear(),
                lambda: optimizer.state.pop(parameter),
                lambda: optimizer.state[parameter].update(momentum_buffer=torch.zeros(1)),
                lambda: optimizer.state.__setitem__(parameter, {"momentum_buffer": torch.zeros(1)}),
            ):
                with pytest.raises(torch_ps.PsError, match="lives on the servers and cannot be changed from a worker"):
                    change()
            optimizer.state = type(sgd.state)(dict)
            with pytest.raises(torch_ps.PsError, match="lives on the servers"):
                optimizer.step()


@pytest.mark.filterwarnings("error")
def test_a_schedule_on_either_optimizer_made_before_or_after_counts() -> None:
    plain = seeded(mlp)
    reference = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    with job() as servers:
        model = seeded(mlp)
        sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        before = torch.optim.lr_scheduler.StepLR(sgd, 1, 0.5)
        with torch_ps.ParameterServerOptimizer(sgd, model, str(servers)) as optimizer:
            made: list[torch.optim.lr_scheduler.LRScheduler] = [
                torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1)),
                torch.optim.lr_scheduler.OneCycleLR(sgd, 0.1, total_steps=5),
            ]
            expected = [
                torch.optim.lr_scheduler.StepLR(reference, 1, 0.5),
                torch.optim.lr_scheduler.LambdaLR(reference, lambda step: 1 / (step + 1)),
                torch.optim.lr_scheduler.OneCycleLR(reference, 0.1, total_steps=5),
            ]
            for step in range(3):
                for each, one, schedules in ((model, optimizer, [before, *made]), (plain, reference, expected)):
                    one.zero_grad()
                    backward(each, step)
                    one.step()
                    for schedule in schedules:
                        schedule.step()
            assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
