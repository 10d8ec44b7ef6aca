"""Asynchronous pushes: each applied alone and once, with its staleness."""

from __future__ import annotations

from typing import Any

import pytest

from tests.core.job import member, push, roster, shard, told
from torch_ps.common.errors import ConfigError, StepConflict
from torch_ps.ps.core.effects import Apply, Contribution, Release
from torch_ps.ps.core.modes import Mode
from torch_ps.ps.core.shard import Shard


def test_every_push_is_applied_at_once_with_its_staleness() -> None:
    s = shard("a", "b", mode="async")
    s.push(push("a", 0, base=0))
    said = "step 0 of b applied, 1 versions stale"
    assert s.push(push("b", 0, base=0, weight=2)) == (
        Apply(0, 2, (Contribution("b", 1, 0, 2, 1),), said),
        Release("b", 1, 0, 0, 2, 1, 1, 3, True, ("b",), said),
    )


def test_async_does_not_wait_for_the_first_quorum() -> None:
    s = shard(mode="async")
    s.set_roster(roster(2, member("a"), is_open=False))
    assert told(s.push(push("a"))) == ["apply 1: a", "release a step 0"]


def test_repeat_is_answered_with_the_staleness_it_had() -> None:
    s = shard("a", "b", mode="async")
    s.push(push("b", 0))
    s.push(push("a", 0))
    s.push(push("b", 1, base=1))
    discard, release = s.push(push("a", 0))
    assert told((discard, release)) == ["discard a 0", "release a step 0"]
    assert isinstance(release, Release)
    assert (release.version, release.next_step, release.staleness) == (3, 1, 1)


@pytest.mark.parametrize(("step", "base"), [(1, 0), (5, 0), (0, 1)])
def test_gap_in_the_count_or_base_from_the_future_is_refused(step: int, base: int) -> None:
    s = shard("a", mode="async")
    with pytest.raises(StepConflict, match=r"its next step is 0|the newest is 0"):
        s.push(push("a", step, base=base))


def test_next_step_is_the_workers_own_count_not_the_version() -> None:
    s = shard("a", "b", mode="async")
    for step in range(3):
        s.push(push("a", step))
    (release,) = s.pull("b", 1, 0)
    assert isinstance(release, Release)
    assert (release.version, release.next_step) == (3, 0)


def test_next_life_of_a_worker_counts_from_zero() -> None:
    s = shard("a", mode="async")
    s.push(push("a", 0))
    s.set_roster(roster(2, member("a", session=2)))
    assert told(s.push(push("a", 0, base=1, session=2))) == ["apply 2: a", "release a step 0"]


def test_order_of_pushes_on_one_bucket_does_not_bind_another() -> None:
    s = shard("a", mode="async", buckets=2)
    s.push(push("a", 0, bucket=1))
    s.push(push("a", 1, bucket=1))
    assert told(s.push(push("a", 0, bucket=0))) == ["apply 1: a", "release a step 0"]
    assert s.versions == (1, 2)


def bounded(*names: str, **settings: Any) -> Shard:
    core = Shard(buckets=1, mode=Mode(name="async", **settings))
    core.set_roster(roster(1, *(member(name) for name in names)))
    return core


def test_push_older_than_the_bound_is_refused_for_good_and_answered_with_fresh_parameters() -> None:
    s = bounded("a", "b", max_staleness=1)
    for step in range(2):
        s.push(push("b", step))
    effects = s.push(push("a", 0, base=0))
    assert told(effects) == ["discard a 0", "release a step 0 dropped"]
    (_, release) = effects
    assert isinstance(release, Release)
    assert (release.version, release.next_step, release.staleness) == (2, 1, 2)
    assert release.reason == "step 0 of a is 2 versions stale; at most 1 are allowed"
    assert told(s.push(push("a", 0, base=0))) == ["discard a 0", "release a step 0 dropped"]
    assert told(s.push(push("a", 1, base=1))) == ["apply 3: a", "release a step 1"]


def test_learning_rate_is_divided_by_one_plus_staleness() -> None:
    s = bounded("a", "b", staleness_lr="inverse")
    scales = []
    for step, worker in enumerate("aab"):
        apply = s.push(push(worker, step % 2, base=0))[0]
        assert isinstance(apply, Apply)
        scales.append(apply.lr_scale)
    assert scales == [1, 1 / 2, 1 / 3]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"staleness_lr": "linear"}, "staleness_lr must be one of constant, inverse; got 'linear'"),
        ({"max_staleness": -1}, "max_staleness must be >= 0; got -1"),
        ({"slack": -1}, "slack must be >= 0; got -1"),
        ({"backup_workers": -2}, "backup_workers must be >= 0; got -2"),
    ],
)
def test_setting_out_of_range_is_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Mode(**settings)


def test_mode_says_in_words_what_it_does() -> None:
    assert str(Mode(name="ssp", slack=2, max_staleness=4, staleness_lr="inverse")) == (
        "ssp, slack 2, staleness at most 4, learning rate inverse to staleness"
    )
    assert str(Mode(backup_workers=1)) == "sync, 1 backup worker"
