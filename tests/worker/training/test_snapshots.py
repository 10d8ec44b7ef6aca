"""Copies during training, evaluation after it."""

from typing import Any

import pytest
import torch
from torch import nn

from torch_ps.worker.tasks import Task
from torch_ps.worker.training import snapshots
from torch_ps.worker.training.snapshots import Snapshots


class Probe(Task):
    """Its "loss" is the weight it sees; it records the state it was called in."""

    def __init__(self) -> None:
        self.modes: list[tuple[bool, bool]] = []

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        self.modes.append((model.training, torch.is_grad_enabled()))
        return {"loss": next(model.parameters()).sum().item()}


def taken(total: int, count: int, seen: list[int]) -> list[tuple[int, float]]:
    """Samples and "loss" of the copies made of a model whose only weight is the number of samples."""
    model: Any = nn.Linear(1, 1, bias=False)
    found = Snapshots(model, total, count)
    for samples in seen:
        torch.nn.init.constant_(model.weight, samples)
        found.copy_if_due(samples)
    return [(snapshot.samples, metrics["loss"]) for snapshot, metrics in found.evaluate(Probe())]


def test_points_are_equidistant_from_start_to_end() -> None:
    assert taken(90, 4, list(range(0, 100, 10))) == [(0, 0), (30, 30), (60, 60), (90, 90)]


def test_points_that_were_jumped_over_are_one_copy() -> None:
    assert taken(90, 10, [0, 55, 100]) == [(0, 0), (55, 55), (100, 100)]


def test_a_single_point_is_the_end() -> None:
    assert taken(90, 1, [0, 30, 90]) == [(90, 90)]


def test_no_point_is_no_copy() -> None:
    assert taken(90, 0, [0, 90]) == []


def test_buffers_are_part_of_a_copy() -> None:
    model = nn.BatchNorm1d(1)
    found = Snapshots(model, 10, 2)
    found.copy_if_due(0)
    model(torch.ones(4, 1) * 5)
    list(found.evaluate(Probe()))
    assert model.running_mean is not None
    assert model.running_mean.item() == 0


def test_the_model_is_measured_in_evaluation_mode_without_gradients() -> None:
    probe = Probe()
    found = Snapshots(nn.Linear(1, 1), 10, 2)
    found.copy_if_due(0)
    list(found.evaluate(probe))
    assert probe.modes == [(False, False)]


def test_a_large_model_is_measured_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshots, "MOST_MEMORY", 3 * 4)  # three copies of one fp32 weight
    assert [samples for samples, _ in taken(90, 20, list(range(0, 100, 10)))] == [0, 50, 90]
