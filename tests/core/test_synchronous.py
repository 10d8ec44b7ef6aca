"""Synchronous steps: what closes them, what is answered, what a leaver takes along."""

from __future__ import annotations

import pytest

from tests.core.job import member, push, roster, shard, told, why
from torch_ps.common.errors import StepConflict
from torch_ps.ps.core.effects import Apply, Contribution, Release, Wait
from torch_ps.ps.core.modes import Mode
from torch_ps.ps.core.shard import Shard


def test_last_push_closes_the_step() -> None:
    s = shard("a", "b")
    assert s.push(push("b", 0)) == (Wait("b", 1, 0, 0),)
    assert why(s, "b") == (("a",), "step 0 waits for a")
    assert s.push(push("a", 0, weight=3)) == (
        Apply(0, 1, (Contribution("a", 1, 0, 3, 0), Contribution("b", 1, 0, 1, 0)), "step 0 closed with 2 of 2 pushes"),
        Release("a", 1, 0, 0, 1, 1, 0, 4, True, ("a", "b"), "step 0 closed with 2 of 2 pushes", True),
        Release("b", 1, 0, 0, 1, 1, 0, 4, True, ("a", "b"), "step 0 closed with 2 of 2 pushes", True),
    )
    assert s.versions == (1,)


def test_contributions_come_in_rank_order_whatever_the_order_of_arrival() -> None:
    s = shard("w10", "w2", "w1")
    s.push(push("w10"))
    s.push(push("w1"))
    assert told(s.push(push("w2")))[0] == "apply 1: w1 w2 w10"


def test_buckets_close_on_their_own_and_the_open_step_is_the_slowest() -> None:
    s = shard("a", buckets=2)
    assert told(s.push(push("a", bucket=1))) == ["apply 1: a", "release a step 0"]
    assert (s.versions, s.open_step) == ((0, 1), 0)


def test_push_repeated_while_the_step_is_open_counts_once() -> None:
    s = shard("a", "b")
    s.push(push("a"))
    assert told(s.push(push("a"))) == ["wait a"]
    assert told(s.push(push("b"))) == ["apply 1: a b", "release a step 0", "release b step 0"]


def test_push_repeated_after_a_lost_answer_is_answered_not_applied() -> None:
    s = shard("a", "b")
    s.push(push("a"))
    s.push(push("b"))
    assert told(s.push(push("a"))) == ["discard a 0", "release a step 0"]
    assert s.versions == (1,)


def test_late_push_is_dropped_and_answered_with_fresh_parameters() -> None:
    s = shard("a")
    s.push(push("a"))
    s.set_roster(roster(2, member("a"), member("b", session=2, first_step=2)))
    discard, release = s.push(push("b", 0, session=2))
    assert told((discard, release)) == ["discard b 0", "release b step 0 dropped"]
    assert isinstance(release, Release)
    assert (release.version, release.next_step, release.staleness) == (1, 1, 1)


@pytest.mark.parametrize(("step", "base"), [(1, 1), (7, 0), (0, 1)])
def test_push_of_a_step_ahead_or_from_a_wrong_base_is_refused(step: int, base: int) -> None:
    s = shard("a", "b")
    with pytest.raises(StepConflict, match="worker 'a' pushed step"):
        s.push(push("a", step, base=base))


def test_weights_of_zero_still_close_the_step() -> None:
    s = shard("a")
    assert told(s.push(push("a", weight=0))) == ["apply 1: a", "release a step 0"]


def test_nothing_closes_before_the_first_quorum() -> None:
    s = shard()
    s.set_roster(roster(2, member("a"), is_open=False))
    assert told(s.push(push("a"))) == ["wait a"]
    assert why(s, "a") == ((), "step 0 waits for the first quorum; a pushed it")
    assert told(s.set_roster(roster(3, member("a"), member("b", session=3)))) == []
    assert told(s.push(push("b", session=3))) == ["apply 1: a b", "release a step 0", "release b step 0"]


def test_quorum_that_completes_closes_what_was_waiting() -> None:
    s = shard()
    s.set_roster(roster(2, member("a"), is_open=False))
    s.push(push("a"))
    assert told(s.set_roster(roster(3, member("a")))) == ["apply 1: a", "release a step 0"]


def test_newcomer_waits_for_its_first_step_and_starts_with_fresh_parameters() -> None:
    s = shard("a")
    s.set_roster(roster(2, member("a"), member("b", session=2, first_step=1)))
    assert told(s.pull("b", 2, 0)) == ["wait b"]
    assert told(s.push(push("a"))) == ["apply 1: a", "release a step 0", "release b pull"]
    assert told(s.push(push("a", 1))) == ["wait a"]


def test_push_before_the_first_step_is_dropped_and_answered_when_that_step_is_open() -> None:
    s = shard("a")
    s.set_roster(roster(2, member("a"), member("b", session=2, first_step=1)))
    assert told(s.push(push("b", 0, session=2))) == ["discard b 0", "wait b"]
    assert told(s.push(push("a"))) == ["apply 1: a", "release a step 0", "release b step 0 dropped"]


def test_leaver_takes_its_open_pushes_along_and_what_is_complete_closes() -> None:
    s = shard("a", "b", "c", buckets=2)
    s.push(push("c", bucket=0))
    s.push(push("a", bucket=1))
    s.push(push("b", bucket=1))
    effects = s.set_roster(roster(2, member("a"), member("b")))
    assert told(effects) == ["discard c 0", "apply 1: a b", "release a step 0", "release b step 0", "evict c 1"]


def test_step_whose_workers_have_all_left_closes_empty_so_that_newcomers_are_in_step() -> None:
    s = shard("a", "b", buckets=2)
    s.push(push("a", bucket=0))
    s.push(push("b", bucket=0))  # bucket 0 has closed step 0, bucket 1 has not
    s.set_roster(roster(2, member("a"), member("b"), member("c", session=2, first_step=1)))
    assert told(s.pull("c", 2, 1)) == ["wait c"]
    effects = s.set_roster(roster(3, member("c", session=2, first_step=1)))
    assert told(effects) == ["apply 1", "release c pull", "evict a 1", "evict b 1"]
    assert s.versions == (1, 1)


def test_nothing_closes_while_nobody_is_there() -> None:
    s = shard("a", "b")
    s.push(push("a"))
    assert told(s.set_roster(roster(2))) == ["discard a 0", "evict a 1", "evict b 1"]
    assert s.versions == (0,)


def test_worker_whose_stream_broke_is_counted_but_not_answered() -> None:
    s = shard("a", "b")
    s.push(push("a"))
    assert s.disconnected("a", 1) == ()
    assert told(s.push(push("b"))) == ["apply 1: a b", "release b step 0"]


def test_worker_that_repeats_on_a_new_stream_is_answered_again() -> None:
    s = shard("a", "b")
    s.push(push("a"))
    s.disconnected("a", 1)
    assert told(s.push(push("a"))) == ["wait a"]
    assert told(s.push(push("b"))) == ["apply 1: a b", "release a step 0", "release b step 0"]


def test_parked_pull_of_a_broken_stream_is_forgotten() -> None:
    s = shard("a")
    s.set_roster(roster(2, member("a"), member("b", session=2, first_step=1)))
    s.pull("b", 2, 0)
    s.disconnected("b", 2)
    assert told(s.push(push("a"))) == ["apply 1: a", "release a step 0"]


def backups(*names: str, count: int = 1) -> Shard:
    core = Shard(buckets=1, mode=Mode(backup_workers=count))
    core.set_roster(roster(1, *(member(name) for name in names)))
    return core


def test_step_closes_with_the_first_pushes_in_rank_order_and_the_backup_worker_is_late() -> None:
    s = backups("a", "b", "c")
    assert told(s.push(push("c"))) == ["wait c"]
    assert why(s, "c") == (("a", "b"), "step 0 waits for 1 of a, b")
    assert told(s.push(push("b"))) == ["apply 1: b c", "release b step 0", "release c step 0"]
    discard, release = s.push(push("a"))
    assert told((discard, release)) == ["discard a 0", "release a step 0 dropped"]
    assert isinstance(release, Release)
    assert (release.version, release.next_step, release.staleness) == (1, 1, 1)


def test_parameters_may_be_read_where_they_are_unless_a_step_can_close_without_the_reader() -> None:
    for s, stable in ((shard("a", "b"), True), (backups("a", "b"), False)):
        s.push(push("a"))
        releases = [effect for effect in s.push(push("b")) if isinstance(effect, Release)]
        releases += [effect for effect in s.pull("a", 1, 0) if isinstance(effect, Release)]
        assert releases
        assert {release.stable for release in releases} == {stable}


def test_step_needs_one_push_however_many_backup_workers_there_are() -> None:
    s = backups("a", "b", count=5)
    assert told(s.push(push("b"))) == ["apply 1: b", "release b step 0"]


def test_worker_that_was_late_is_in_time_for_the_next_step() -> None:
    s = backups("a", "b")
    s.push(push("a"))
    s.push(push("b"))
    assert told(s.push(push("b", 1))) == ["apply 2: b", "release b step 1"]


def test_leaver_is_not_counted_among_those_a_step_may_lack() -> None:
    s = backups("a", "b", "c")
    s.push(push("a"))
    assert told(s.set_roster(roster(2, member("a"), member("b")))) == ["apply 1: a", "release a step 0", "evict c 1"]
