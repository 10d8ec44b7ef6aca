"""What all modes share: who may push, which roster a push speaks of, and that a refusal leaves no trace."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests.core.job import member, push, roster, shard, told, trace, why
from torch_ps.common.errors import ConfigError, ProtocolError, StepConflict, UnknownWorker
from torch_ps.ps.core.effects import Release
from torch_ps.ps.core.modes import Mode
from torch_ps.ps.core.roster import Roster
from torch_ps.ps.core.shard import Shard

REFUSED: list[tuple[dict[str, Any], type[ProtocolError]]] = [
    ({"worker": "nobody"}, UnknownWorker),
    ({"worker": "a", "session": 0}, UnknownWorker),
    ({"worker": "a", "session": 0, "epoch": 9}, UnknownWorker),
    ({"worker": "a", "bucket": 2}, ProtocolError),
    ({"worker": "a", "bucket": -1}, ProtocolError),
    ({"worker": "a", "weight": -1.0}, ProtocolError),
    ({"worker": "a", "weight": math.nan}, ProtocolError),
    ({"worker": "a", "weight": math.inf}, ProtocolError),
    ({"worker": "a", "step": -1}, ProtocolError),
    ({"worker": "a", "base": -1}, ProtocolError),
    ({"worker": "a", "step": 3}, StepConflict),
    ({"worker": "a", "step": 3, "epoch": 9}, StepConflict),
    ({"worker": "a", "base": 5}, StepConflict),
    ({"worker": "c", "step": 1, "session": 9}, StepConflict),
]


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize(("bad", "error"), REFUSED)
def test_refused_push_leaves_no_trace(mode: str, bad: dict[str, Any], error: type[ProtocolError]) -> None:
    s = shard("a", "b", mode=mode, buckets=2)
    s.push(push("b", epoch=2))  # something parked, something open, something counted
    s.push(push("b", bucket=1))
    before = trace(s)
    with pytest.raises(error):
        s.push(push(**bad))
    assert trace(s) == before


@pytest.mark.parametrize(("worker", "session", "bucket"), [("nobody", 1, 0), ("a", 0, 0), ("a", 1, 1), (None, 1, -1)])
def test_refused_pull_leaves_no_trace(worker: str | None, session: int, bucket: int) -> None:
    s = shard("a")
    before = trace(s)
    with pytest.raises(ProtocolError):
        s.pull(worker, session, bucket)
    assert trace(s) == before


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_push_that_knows_a_newer_roster_waits_for_it(mode: str) -> None:
    s = shard("a", mode=mode)
    assert told(s.push(push("a", epoch=2))) == ["wait a"]
    assert why(s, "a") == ((), "roster epoch 2 has not come from the lead yet; epoch 1 is known")
    assert told(s.set_roster(roster(2, member("a")))) == ["apply 1: a", "release a step 0"]


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_parked_push_that_comes_again_is_counted_once_whatever_roster_it_speaks_of(mode: str) -> None:
    """Taken a second time it was applied, and the parked one was discarded: there was no payload to discard."""
    s = shard("a", mode=mode)
    s.push(push("a", epoch=2))
    assert told(s.push(push("a", epoch=1))) == ["wait a"]
    assert told(s.set_roster(roster(2, member("a")))) == ["apply 1: a", "release a step 0"]


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_repeat_of_a_push_that_was_taken_is_not_parked_though_it_knows_a_newer_roster(mode: str) -> None:
    """A worker that comes back with news from the lead repeats what this shard has: parked, it had no payload."""
    s = shard("a", "b", mode=mode)
    s.push(push("a"))
    again = told(s.push(push("a", epoch=2)))
    assert again == (["wait a"] if mode == "sync" else ["discard a 0", "release a step 0"])
    s.disconnected("a", 1)
    found = told(s.set_roster(roster(2, member("a"))))
    assert found == (["apply 1: a", "evict b 1"] if mode == "sync" else ["evict b 1"])


def test_parked_push_does_not_close_a_step_that_needs_somebody_the_shard_has_not_heard_of() -> None:
    s = shard("a")
    s.push(push("a", epoch=2))
    assert told(s.set_roster(roster(2, member("a"), member("b", session=2)))) == ["wait a"]


def test_pull_of_a_session_that_is_newer_than_the_roster_waits_for_it() -> None:
    s = shard("a")
    assert told(s.pull("b", 2, 0)) == ["wait b"]
    assert told(s.set_roster(roster(2, member("a"), member("b", session=2)))) == ["release b pull"]


def test_parked_calls_of_a_session_that_never_came_are_ended() -> None:
    s = shard("a")
    s.pull("b", 2, 0)
    s.push(push("b", session=2))
    assert told(s.set_roster(roster(3, member("a")))) == ["discard b 0", "evict b 2"]


def test_parked_push_waits_on_through_a_roster_that_is_still_older() -> None:
    s = shard("a")
    s.push(push("a", epoch=3))
    assert s.set_roster(roster(2, member("a"))) == ()
    assert told(s.set_roster(roster(3, member("a")))) == ["apply 1: a", "release a step 0"]


def test_parked_push_is_repeated_without_harm_and_a_second_one_beside_it_is_refused() -> None:
    s = shard("a", mode="async")
    s.push(push("a", 0))
    s.push(push("a", 1, epoch=2))
    assert told(s.push(push("a", 1, epoch=2))) == ["wait a"]
    with pytest.raises(StepConflict, match="while its step 1 waits for roster epoch 2"):
        s.push(push("a", 0, epoch=2))
    assert told(s.set_roster(roster(2, member("a")))) == ["apply 2: a", "release a step 1"]


def test_parked_push_of_a_broken_stream_is_discarded_and_can_be_repeated() -> None:
    s = shard("a")
    s.push(push("a", epoch=2))
    assert told(s.disconnected("a", 1)) == ["discard a 0"]
    assert s.set_roster(roster(2, member("a"))) == ()
    assert told(s.push(push("a", epoch=2))) == ["apply 1: a", "release a step 0"]


def test_push_with_an_older_epoch_is_fine_while_its_session_is_a_member() -> None:
    s = shard("a")
    s.set_roster(roster(5, member("a")))
    assert told(s.push(push("a", epoch=1))) == ["apply 1: a", "release a step 0"]


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_old_session_of_a_worker_that_came_back_is_refused(mode: str) -> None:
    s = shard("a", mode=mode)
    assert told(s.set_roster(roster(2, member("a", session=2)))) == ["evict a 1"]
    with pytest.raises(UnknownWorker, match="session 1 of worker 'a' is not in roster epoch 2; join again"):
        s.push(push("a"))


@pytest.mark.parametrize("epoch", [0, 1])
def test_roster_that_is_not_newer_changes_nothing(epoch: int) -> None:
    s = shard("a")
    before = trace(s)
    assert s.set_roster(Roster(epoch)) == ()
    assert trace(s) == before


def test_observer_is_answered_at_once_and_told_apart_by_its_number() -> None:
    s = shard("a")
    (release,) = s.pull(None, 77, 0)
    assert isinstance(release, Release)
    assert (release.worker, release.session, release.step, release.version) == (None, 77, None, 0)


def test_status_says_who_waits_for_whom_since_when_and_why() -> None:
    s = shard("a", "b", buckets=2)
    s.push(push("a", bucket=1), now=5.0)
    s.push(push("a", bucket=0), now=7.0)
    view = s.status()
    assert [(w.worker, w.rank, w.clock) for w in view.workers] == [("a", 0, 0), ("b", 1, 0)]
    hold = view.workers[0].hold
    assert hold is not None
    assert (hold.bucket, hold.since, hold.waiting_for, hold.reason) == (1, 5.0, ("b",), "step 0 waits for b")
    assert view.workers[1].hold is None
    assert [h.bucket for h in s.holds("a", 1)] == [1, 0]
    assert (view.epoch, view.open, view.open_step, view.versions) == (1, True, 0, (0, 0))


def test_status_shows_a_parked_pull() -> None:
    s = shard("a")
    s.pull("b", 2, 0, now=3.0)
    (hold,) = s.holds("b", 2)
    assert (hold.step, hold.since, hold.reason) == (
        None,
        3.0,
        "roster epoch 2 has not come from the lead yet; epoch 1 is known",
    )


def test_training_begins_with_the_first_push_not_with_a_step_that_closes_empty() -> None:
    s = shard()
    s.set_roster(roster(2, member("a", session=2, first_step=1)))
    assert (s.versions, s.begun) == ((1,), False)
    s.push(push("a", 1, session=2))
    assert s.begun


def test_mode_that_does_not_exist_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="mode must be one of sync, async, ssp; got 'bulk'"):
        Mode(name="bulk")


def test_shard_without_buckets_follows_the_roster() -> None:
    s = Shard(buckets=0, mode=Mode())
    assert s.set_roster(roster(1, member("a"))) == ()
    assert (s.open_step, s.versions) == (0, ())
    with pytest.raises(ProtocolError, match=r"bucket must be in \[0, 0\); got 0"):
        s.pull("a", 1, 0)
