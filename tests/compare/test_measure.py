"""Figures against numbers worked out by hand."""

import math
from dataclasses import replace

import pytest

from torch_ps.compare.events import End, Evaluation, Journal, Start, Step
from torch_ps.compare.measure import RunInfo, common_target, measure, seconds_to, staleness, with_target
from torch_ps.compare.results import CurvePoint, RunResult

FACTS = RunInfo(name="async fp32", mode="async", compress="none", compress_pull="none", lr=0.1, command="ps-run")


def step(time: float, number: int, job: int, *, stale: int | None = 0, loss: float = 1.0, wait: float = 0.0) -> Step:
    """Step ``number`` of a worker with batches of 10, 100 bytes up and 200 down each."""
    return Step(
        time=time,
        step=number,
        samples=10 * number,
        job_samples=job,
        loss=loss,
        staleness=stale,
        pushed_bytes=100 * number,
        pulled_bytes=200 * number,
        wait_seconds=wait,
    )


def journal(rank: int, started: float, steps: list[Step], ended: float) -> Journal:
    start = Start(started, f"w{rank}", rank, 2, "async", "cpu", "digits", 4810, {})
    end = End(ended, len(steps), 10 * len(steps), 100 * len(steps), 200 * len(steps), "ok")
    return Journal(start, steps, [], None, end)


def two_workers() -> list[Journal]:
    """Worker 1 starts two seconds later; w0 makes 3 steps, w1 one."""
    w0 = journal(
        0, 100.0, [step(101, 1, 10), step(104, 2, 20, stale=0, wait=0.5), step(107, 3, 40, stale=1, wait=1.0)], 107.5
    )
    w1 = journal(1, 102.0, [step(106, 1, 30, stale=2, loss=3.0)], 112.0)
    w0.evaluations = [Evaluation(100.0, 0, {"loss": 4.0}), Evaluation(107.0, 40, {"loss": 2.0, "accuracy": 0.5})]
    return [w0, w1]


def test_the_clock_starts_when_the_last_worker_is_ready_and_stops_with_the_last_end() -> None:
    result = measure(FACTS, two_workers())
    assert result.seconds == 10.0
    assert result.samples == 40
    assert result.samples_per_second == 4.0
    assert [point.seconds for point in result.curve] == [0.0, 5.0]


def test_validation_figures_are_those_of_the_last_evaluation() -> None:
    result = measure(FACTS, two_workers())
    assert (result.validation_loss, result.validation_accuracy) == (2.0, 0.5)


def test_bytes_are_the_mean_over_workers() -> None:
    result = measure(FACTS, two_workers())
    assert (result.bytes.pushed_per_worker, result.bytes.pulled_per_worker) == (200, 400)
    # at 107 w0 has moved 900, w1 300 bytes
    assert [point.bytes for point in result.curve] == [0, 600]


def test_staleness_counts_every_push_of_every_worker() -> None:
    result = measure(FACTS, two_workers()).staleness
    assert (result.mean, result.max) == (0.75, 2)
    assert result.histogram == {"0": 2, "1": 1, "2": 1}


def test_steps_without_a_push_have_no_staleness() -> None:
    assert staleness([step(1, 1, 10, stale=None), step(2, 2, 20, stale=3)]).mean == 3.0
    assert staleness([]).histogram == {}


def test_workers_are_told_apart() -> None:
    w0, w1 = measure(FACTS, two_workers()).workers_detail
    assert (w0.name, w0.steps, w0.samples, w0.seconds, w0.wait_seconds) == ("w0", 3, 30, 7.5, 1.0)
    assert (w1.name, w1.steps, w1.samples, w1.seconds, w1.wait_seconds) == ("w1", 1, 10, 10.0, 0.0)


def test_training_loss_is_averaged_over_stretches_of_samples() -> None:
    steps = [step(100 + i, i + 1, 10 * (i + 1), loss=float(i)) for i in range(480)]
    (only,) = [measure(FACTS, [journal(0, 100.0, steps, 600.0)])]
    assert 100 <= len(only.training) <= 120
    assert only.training[0].samples == 40
    assert only.training[0].loss == pytest.approx(1.5)
    assert only.training[-1].samples == 4800


def curve(*losses: float | None) -> list[CurvePoint]:
    """A point every ten seconds and hundred samples."""
    return [CurvePoint(seconds=10.0 * i, samples=100 * i, bytes=0, loss=loss) for i, loss in enumerate(losses)]


def test_time_to_target_is_linear_between_two_points() -> None:
    assert seconds_to(2.5, curve(4.0, 3.0, 2.0)) == pytest.approx(15.0)
    assert seconds_to(3.0, curve(4.0, 3.0, 2.0)) == pytest.approx(10.0)
    assert seconds_to(5.0, curve(4.0, 3.0)) == 0.0


def test_time_to_target_is_the_first_time_even_if_the_loss_rises_again() -> None:
    assert seconds_to(2.0, curve(4.0, 1.0, 3.0, 1.0)) == pytest.approx(20.0 / 3)


def test_a_target_that_was_not_reached_has_no_time() -> None:
    assert seconds_to(1.0, curve(4.0, 3.0, 2.0)) is None
    assert seconds_to(1.0, []) is None


def test_nothing_is_interpolated_over_a_loss_that_is_no_number() -> None:
    assert seconds_to(2.5, curve(4.0, None, 2.0)) == 20.0


def finished(*losses: float | None) -> RunResult:
    return replace(measure(FACTS, two_workers()), curve=curve(*losses))


def test_the_common_target_is_the_worst_best_loss_a_little_relaxed() -> None:
    target = common_target([finished(4.0, 2.0, 1.5), finished(4.0, 1.8, 1.9)])
    assert target == 1.82  # 1.8 plus one percent, rounded up to three digits
    first, second = with_target([finished(4.0, 2.0, 1.5), finished(4.0, 1.8, 1.9)], target)
    assert first.seconds_to_target == pytest.approx(13.6)
    assert second.seconds_to_target == pytest.approx(10 * (4 - 1.82) / 2.2)


def test_a_run_that_diverged_sets_no_target() -> None:
    good, bad, worse = finished(4.0, 2.0), finished(4.0, 9.0), finished(4.0, None)
    assert common_target([good, bad, worse]) == 2.02
    assert common_target([bad, worse]) is None
    assert [run.seconds_to_target for run in with_target([good, bad], None)] == [None, None]


@pytest.mark.parametrize("loss", [0.0123, 0.9991, 1.0, 123.4, 1e-7])
def test_a_target_is_never_below_what_the_worst_run_reached(loss: float) -> None:
    target = common_target([finished(1e6, loss)])
    assert target is not None
    assert loss <= target <= 1.021 * loss


def test_a_loss_that_is_no_number_becomes_none() -> None:
    journals = two_workers()
    journals[0].evaluations.append(Evaluation(108.0, 40, {"loss": math.inf}))
    assert measure(FACTS, journals).validation_loss is None
