"""A worker whose pushes do not count gets one warning, with the reason and what to do."""

from typing import Any

import pytest
import torch

import torch_ps
from tests.support.jobs import job
from torch_ps.worker.session.dropped_pushes import MOST, DroppedPushes

FINE: dict[str, Any] = {"weight": 1.0, "nonfinite": False, "idle": False}


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "none of the last" in record.getMessage()]


@pytest.mark.parametrize(
    ("push", "applied", "averages", "said"),
    [
        ({**FINE, "weight": 0.0}, True, True, "their weight is 0: set optimizer.weight"),
        ({**FINE, "weight": 0.0, "nonfinite": True}, True, True, "their gradients are not finite: lower the learning"),
        (FINE, False, True, "they come after their steps have closed: start the servers with fewer --backup-workers"),
        (FINE, False, False, "they are too stale: start the servers with a larger --max-staleness"),
    ],
)
def test_each_reason_has_its_way_out_and_is_told_once(
    push: dict[str, Any], applied: bool, averages: bool, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    dropped = DroppedPushes("w0", averages=averages)
    for count in range(3 * MOST):
        assert len(told(caplog)) == (count >= MOST)
        dropped.pushed(**push)
        dropped.answered(applied=applied)
    assert told(caplog)[0].startswith(f"none of the last {MOST} pushes of worker w0 counts, as {said}")


def test_one_push_that_counts_begins_the_count_anew_and_idle_pushes_and_pulls_are_none(
    caplog: pytest.LogCaptureFixture,
) -> None:
    dropped = DroppedPushes("w0", averages=True)
    for number in range(4 * MOST):
        dropped.pushed(**FINE)
        dropped.answered(applied=number % (MOST - 1) == 0)
        dropped.answered(applied=True)  # of a pull
    for _ in range(2 * MOST):
        dropped.pushed(0.0, nonfinite=False, idle=True)
        dropped.answered(applied=True)
    assert not told(caplog)


def test_pushes_that_are_too_stale_are_told_to_their_worker(caplog: pytest.LogCaptureFixture) -> None:
    with job(mode="async", max_staleness=1) as servers, torch_ps.Client(str(servers), name="w0") as client:
        client.init({"x": torch.zeros(8)}, torch_ps.OptimizerSpec("SGD", lr=1.0))
        results = [client.push({"x": torch.ones(8)}, base=0).applied for _ in range(MOST + 3)]
    assert results[:2] == [True, True]
    assert not any(results[2:])
    assert len(told(caplog)) == 1
    assert "they are too stale" in told(caplog)[0]
