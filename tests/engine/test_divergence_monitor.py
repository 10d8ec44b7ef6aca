"""The divergence monitor reads and never writes, looks on a schedule, and turns off alone when it fails."""

import logging
from collections.abc import Callable

import pytest
import torch

from torch_ps.common.plan import plan
from torch_ps.common.schema import Group, Model, TensorSpec
from torch_ps.ps.core.effects import Apply, Contribution
from torch_ps.ps.core.lr_stability import Reading
from torch_ps.ps.core.modes import Mode
from torch_ps.ps.engine.divergence_monitor import (
    FIRST_LOOK,
    LOOK,
    PAUSE,
    SHORTEST,
    DivergenceMonitor,
    StepObserver,
    create_monitor,
)

SIZE, WORKERS = 40_000, 4


def model(optimizer: str = "SGD") -> Model:
    return Model(optimizer, (Group((TensorSpec("x", (SIZE,)),), {"lr": 0.1}),), ())


def monitor(report: Callable[[Reading], None] = lambda reading: None, mode: str = "async") -> DivergenceMonitor | None:
    buckets = plan(model(), 4 << 20, 1).buckets
    return create_monitor(Mode(name=mode), model(), buckets, num_workers=lambda: WORKERS, advise=print, report=report)


def asked(monitor: DivergenceMonitor, version: int, lr: float = 0.1) -> StepObserver | None:
    stale = min(version, WORKERS - 1)
    apply = Apply(0, version + 1, (Contribution(f"w{version % WORKERS}", 1, 0, 1.0, stale),), "")
    return monitor.observer(0, apply, {"lr": lr})


def looks(monitor: DivergenceMonitor, versions: range, lr: float = 0.1) -> list[int]:
    """Versions at which it looked; parameters and gradients are noise."""
    random = torch.Generator().manual_seed(versions.start)
    found = []
    for version in versions:
        watch = asked(monitor, version, lr)
        if watch is not None:
            found.append(version)
            watch(torch.randn(SIZE, generator=random), torch.randn(SIZE, generator=random), ())
    return found


def test_it_writes_to_nothing_that_it_sees() -> None:
    found = monitor()
    assert found is not None
    for version in range(50):
        gradient, values = torch.randn(SIZE), torch.randn(SIZE)
        before = gradient.clone(), values.clone()
        watch = asked(found, version)
        assert watch is not None
        watch(gradient, values, ())
        assert torch.equal(gradient, before[0])
        assert torch.equal(values, before[1])


def test_it_draws_no_number_that_training_would_have_drawn() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    looks(monitor(), range(20))  # type: ignore[arg-type]
    assert torch.equal(torch.rand(1), expected)


def test_after_the_first_look_it_looks_at_one_version_in_fifty() -> None:
    found = monitor()
    assert found is not None
    first = looks(found, range(FIRST_LOOK + 500))
    assert first[0] == 0
    assert FIRST_LOOK <= len(first) == first[-1] + 1 < FIRST_LOOK + 500
    end = first[-1] + (PAUSE + 1) * LOOK * SHORTEST + 100
    later = looks(found, range(first[-1] + 1, end))
    assert later[0] >= first[-1] + PAUSE * LOOK * SHORTEST
    assert LOOK * SHORTEST <= len(later) <= 2 * LOOK * SHORTEST


def test_a_learning_rate_that_rises_is_looked_at_at_once() -> None:
    found = monitor()
    assert found is not None
    rest = looks(found, range(FIRST_LOOK + 500))[-1] + 1
    assert asked(found, rest + 600, lr=0.1) is None
    assert looks(found, range(rest + 600, rest + 620), lr=0.2) == list(range(rest + 600, rest + 620))


def test_what_fails_in_it_ends_it_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    def broken(reading: Reading) -> None:
        raise ZeroDivisionError

    found = monitor(broken)
    assert found is not None
    with caplog.at_level(logging.WARNING, logger="torch_ps.ps"):
        seen = looks(found, range(200))
    assert 0 < len(seen) < 50
    assert [r.getMessage() for r in caplog.records] == [
        "the check for divergence has failed and is off; training goes on"
    ]


def test_parameters_that_are_not_finite_are_no_reading() -> None:
    readings: list[Reading] = []
    found = monitor(readings.append)
    assert found is not None
    for version in range(100):
        watch = asked(found, version)
        assert watch is not None
        watch(torch.full((SIZE,), 1e30), torch.full((SIZE,), float("inf") if version % 2 else float("nan")), ())
    assert readings == []


def test_synchronous_modes_and_other_optimizers_have_none() -> None:
    assert monitor(mode="sync") is None
    other = model("Adam")
    buckets = plan(other, 4 << 20, 1).buckets
    mode = Mode(name="async")
    assert (
        create_monitor(mode, other, buckets, num_workers=lambda: 4, advise=print, report=lambda reading: None) is None
    )
