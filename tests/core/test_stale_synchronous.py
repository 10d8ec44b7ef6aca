"""Bounded staleness: who is answered, who is held back, and what newcomers and leavers do to the floor."""

from __future__ import annotations

import pytest

from tests.core.job import member, push, roster, told, why
from torch_ps.common.errors import StepConflict
from torch_ps.ps.core.effects import Release
from torch_ps.ps.core.modes import Mode
from torch_ps.ps.core.shard import Shard
from torch_ps.ps.core.synchronous import Synchronous


def ssp(*names: str, slack: int = 1, **settings: int) -> Shard:
    core = Shard(buckets=1, mode=Mode(name="ssp", slack=slack, **settings))  # type: ignore[arg-type]
    core.set_roster(roster(1, *(member(name) for name in names)))
    return core


def test_worker_may_lead_by_the_slack_and_waits_one_step_later() -> None:
    s = ssp("a", "b")
    assert told(s.push(push("a", 0))) == ["apply 1: a", "release a step 0"]
    assert told(s.push(push("a", 1))) == ["apply 2: a", "wait a"]
    assert why(s, "a") == (("b",), "a at clock 2 waits for b at clock 0; slack is 1")


def test_push_of_the_slowest_frees_those_who_waited_with_its_own_update_in_the_answer() -> None:
    s = ssp("a", "b")
    s.push(push("a", 0))
    s.push(push("a", 1))
    effects = s.push(push("b", 0))
    assert told(effects) == ["apply 3: b", "release a step 1", "release b step 0"]
    freed = effects[1]
    assert isinstance(freed, Release)
    assert (freed.version, freed.next_step, freed.staleness, freed.applied) == (3, 2, 0, True)


def test_slack_zero_is_made_by_the_synchronous_policy() -> None:
    assert isinstance(Mode(name="ssp", slack=0).policy(0), Synchronous)
    assert told(ssp("a", "b", slack=0).push(push("a", 0))) == ["wait a"]


def test_slowest_that_leaves_frees_those_who_waited() -> None:
    s = ssp("a", "b")
    s.push(push("a", 0))
    s.push(push("a", 1))
    assert told(s.set_roster(roster(2, member("a")))) == ["release a step 1", "evict b 1"]


def test_newcomer_starts_above_the_floor_and_holds_nobody_back() -> None:
    s = ssp("a", "b")
    for step in range(3):
        s.push(push("a", step))
        s.push(push("b", step))
    assert s.clock == 3
    s.set_roster(roster(2, member("a"), member("b"), member("c", session=2, first_step=s.clock + 1)))
    (release,) = s.pull("c", 2, 0)
    assert isinstance(release, Release)
    assert release.next_step == 4
    s.push(push("b", 3))
    assert told(s.push(push("a", 3)))[-1] == "release a step 3"


def test_push_before_the_first_step_is_dropped_and_answered() -> None:
    s = ssp("a")
    s.push(push("a", 0))
    s.set_roster(roster(2, member("a"), member("b", session=2, first_step=2)))
    assert told(s.push(push("b", 0, session=2))) == ["discard b 0", "release b step 0 dropped"]


def test_nobody_runs_away_before_the_first_quorum() -> None:
    s = Shard(buckets=1, mode=Mode(name="ssp", slack=1))
    s.set_roster(roster(1, member("a"), is_open=False))
    assert told(s.push(push("a", 0))) == ["apply 1: a", "release a step 0"]
    assert told(s.push(push("a", 1))) == ["apply 2: a", "wait a"]
    assert why(s, "a") == ((), "a at clock 2 waits for the first quorum; slack is 1")


def test_repeat_of_a_held_push_waits_on_and_is_answered_once() -> None:
    s = ssp("a", "b")
    s.push(push("a", 0))
    s.push(push("a", 1))
    assert told(s.push(push("a", 1))) == ["discard a 1", "wait a"]
    assert told(s.push(push("b", 0))) == ["apply 3: b", "release a step 1", "release b step 0"]


def test_pull_of_a_worker_that_is_ahead_waits_too() -> None:
    s = ssp("a", "b")
    s.push(push("a", 0))
    s.push(push("a", 1))
    s.disconnected("a", 1)
    assert told(s.pull("a", 1, 0)) == ["wait a"]
    assert [h.waiting_for for h in s.holds("a", 1)] == [("b",)]
    assert told(s.push(push("b", 0))) == ["apply 3: b", "release a pull", "release b step 0"]


def test_gap_in_the_steps_is_refused() -> None:
    s = ssp("a")
    with pytest.raises(StepConflict, match="its next step is 0"):
        s.push(push("a", 1, base=0))


def test_refused_push_counts_as_a_step_so_that_nobody_waits_for_it() -> None:
    s = ssp("a", "b", max_staleness=0)
    s.push(push("a", 0))
    s.push(push("a", 1, base=1))
    assert told(s.push(push("b", 0, base=0))) == ["discard b 0", "release a step 1", "release b step 0 dropped"]
