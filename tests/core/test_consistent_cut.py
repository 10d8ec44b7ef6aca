"""When the next cut is, whether the last one is whole, and what the machines of a restored job do."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from tests.core.job import member, push, roster, shard, told
from torch_ps.common.errors import ConfigError, NameTaken, ProtocolError, UnknownWorker
from torch_ps.ps.core.consistent_cut import REPORT_SECONDS, Cut, CutPlanner, Sections
from torch_ps.ps.core.effects import Announce, Apply, Effects, Evict
from torch_ps.ps.core.membership import EPOCHS_PER_LIFE, Membership
from torch_ps.ps.core.modes import Mode
from torch_ps.ps.core.roster import Roster
from torch_ps.ps.core.shard import Shard


def planner(every: int = 0, seconds: float = 0.0, num_shards: int = 2) -> CutPlanner[str]:
    return CutPlanner(every=every, seconds=seconds, num_shards=num_shards, now=0.0)


def records(effects: Effects) -> list[Any]:
    return [effect.record for effect in effects if isinstance(effect, Apply)]


def test_last_cut_counts_the_parts_of_shards_that_were_told_to_stop_before_the_lead() -> None:
    plan = planner(every=10, num_shards=3)
    assert plan.reported(1, 7, "old", 0.0) is None
    assert plan.reported(2, 8, "two", 0.0) is None
    assert not plan.gave_up(8)
    plan.last(0, 8)
    assert plan.reported(0, 8, "zero", 1.0) is None  # that of shard 1 is of another version
    assert plan.reported(1, 8, "one", 1.0) == ("zero", "one", "two")


def test_last_cut_does_not_count_a_report_of_the_part_that_is_written_anew() -> None:
    plan = planner(every=4, num_shards=2)
    assert plan.due(0.0, 2, 2, stale=False) == 4
    assert plan.reported(0, 4, "old", 0.0) is None
    assert plan.awaits_others(0, 4)
    assert not plan.awaits_others(1, 4)
    assert not plan.awaits_others(0, 8)
    plan.last(0, 4)
    assert plan.reported(1, 4, "one", 1.0) is None
    assert plan.reported(0, 4, "zero", 1.0) == ("zero", "one")


def test_next_cut_is_the_first_multiple_that_no_shard_can_have_passed() -> None:
    assert planner(every=10).due(0.0, 0, 2, stale=False) == 10
    assert planner(every=10).due(0.0, 8, 2, stale=False) == 10
    assert planner(every=10).due(0.0, 9, 2, stale=False) == 20
    assert planner(every=10).due(0.0, 6, 4, stale=True) == 20
    assert planner(every=1).due(0.0, 0, 0, stale=True) == 2


def test_cut_by_time_is_due_when_the_time_has_come() -> None:
    p = planner(seconds=5.0)
    assert p.due(4.9, 100, 2, stale=False) is None
    assert p.due(5.0, 100, 2, stale=False) == 102


def test_one_cut_at_a_time_until_all_shards_have_reported() -> None:
    p = planner(every=10)
    assert p.due(0.0, 0, 2, stale=False) == 10
    assert p.due(0.0, 30, 2, stale=False) is None
    assert p.reported(1, 10, "b", 1.0) is None
    assert p.due(1.0, 30, 2, stale=False) is None
    assert p.reported(0, 10, "a", 1.0) == ("a", "b")
    assert p.due(1.0, 30, 2, stale=False) == 40


def test_shard_that_has_come_in_the_place_of_another_says_that_it_has_missed_a_cut() -> None:
    cut, missed = Cut(2), []
    for version, newest in ((10, 9), (10, 11), (20, 20)):  # the second time it knows of it and has passed it
        cut.plan(version, newest)
        missed.append(cut.missed)
    assert missed == [0, 0, 20]


def test_part_that_is_written_stays_so_when_its_server_is_gone() -> None:
    p = planner(every=10)
    p.due(0.0, 0, 2, stale=False)
    p.reported(1, 10, "b", 1.0)
    assert not p.failed(1, 10, 2.0)
    assert p.reported(0, 10, "a", 3.0) == ("a", "b")


def test_failure_of_one_shard_ends_the_cut_and_the_next_one_is_planned() -> None:
    p = planner(every=10)
    p.due(0.0, 0, 2, stale=False)
    p.reported(0, 10, "a", 1.0)
    assert p.failed(1, 10, 1.0)
    assert not p.failed(1, 10, 1.0)
    assert p.reported(0, 10, "a", 1.0) is None
    assert p.gave_up(10)
    assert p.due(1.0, 11, 2, stale=False) == 20


def test_report_that_never_comes_ends_the_cut() -> None:
    p = planner(every=10)
    p.due(0.0, 0, 2, stale=False)
    p.reported(0, 10, "a", 50.0)
    assert p.due(50.0 + REPORT_SECONDS, 11, 2, stale=False) is None
    assert p.due(51.0 + REPORT_SECONDS, 11, 2, stale=False) == 20


def test_reports_of_no_shard_are_refused() -> None:
    with pytest.raises(ProtocolError, match="shard must be in"):
        planner(every=10).reported(2, 10, "c", 0.0)
    with pytest.raises(ProtocolError, match="shard must be in"):
        planner(every=10).failed(-1, 10, 0.0)


def test_a_cut_is_due_by_steps_or_by_time_and_not_by_both() -> None:
    for every, seconds in ((0, 0.0), (5, 5.0), (-1, 0.0)):
        with pytest.raises(ConfigError):
            planner(every, seconds)


def test_buckets_are_recorded_at_the_version_of_the_roster_that_plans_it_and_at_no_other() -> None:
    core = shard("a", buckets=2)
    assert records(core.push(push("a", 0, bucket=0))) == [None]
    core.set_roster(Roster(2, (member("a"),), True, cut=2))
    first = records(core.push(push("a", 1, bucket=0)))
    assert first[0]["version"] == 2
    assert first[0]["ledger"] == {"a": [1, 1, 0, True]}
    assert core.cut.taken[0] == 0
    assert records(core.push(push("a", 0, bucket=1))) == [None]
    assert records(core.push(push("a", 1, bucket=1)))[0]["version"] == 2
    assert core.cut.taken[0] == 2
    assert records(core.push(push("a", 2, bucket=0))) == [None]


def test_restored_shard_answers_a_push_of_before_and_takes_the_next_one() -> None:
    core = shard("a", "b")
    core.set_roster(Roster(2, core.roster.members, True, cut=1))
    core.push(push("a"))
    (record,) = records(core.push(push("b")))
    again = Shard(buckets=1, mode=Mode())
    again.restore([json.loads(json.dumps(record))])
    again.set_roster(roster(1 << 20, member("a"), member("b")))
    assert told(again.push(push("a", 0))) == ["discard a 0", "release a step 0"]
    assert told(again.push(push("a", 1))) == ["wait a"]
    assert [each["version"] for each in again.records()] == [1]
    assert told(again.push(push("b", 1)))[0] == "apply 2: a b"


class Counter:
    """A section: one number."""

    def __init__(self, value: int = 0) -> None:
        self.value = value

    def export(self) -> dict[str, Any]:
        return {"value": self.value}

    def restore(self, data: Mapping[str, Any]) -> None:
        self.value = data["value"]


def test_sections_are_taken_with_the_last_bucket_of_a_cut() -> None:
    counter, sections = Counter(1), Sections()
    sections.add("counter", counter)
    cut = Cut(2, sections)
    cut.plan(5)
    assert cut.passes(5)
    counter.value = 2
    assert not cut.passes(4)
    assert cut.passes(5)
    counter.value = 3
    assert cut.taken == (5, {"counter": {"value": 2}})


def test_section_that_comes_after_the_restart_gets_its_state_and_goes_along_until_then() -> None:
    sections, counter = Sections(), Counter()
    sections.restore({"counter": {"value": 7}})
    assert sections.export() == {"counter": {"value": 7}}
    sections.add("counter", counter)
    assert counter.value == 7
    counter.value = 8
    assert sections.export() == {"counter": {"value": 8}}


# ---------------------------------------------------------------- the roster


def restored(*names: str, quorum: int = 2, started: int = 0) -> Membership:
    before = Membership(quorum=len(names), lease=10.0)
    for rank, name in enumerate(names):
        before.join(name, rank, 0.0, 3)
    lead = Membership(quorum=quorum, lease=10.0, started=started)
    lead.restore(json.loads(json.dumps(before.export())))
    return lead


def test_restored_roster_is_closed_and_its_epoch_is_above_all_that_were_given_out() -> None:
    lead = restored("a", "b")
    assert not lead.roster.open
    assert lead.roster.epoch == 2 + EPOCHS_PER_LIFE
    assert [(m.name, m.session, m.rank) for m in lead.roster.members] == [("a", 1, 0), ("b", 2, 1)]


def test_two_restarts_from_one_checkpoint_give_no_session_twice() -> None:
    first, second = (restored("a", "b", started=at) for at in (1_700_000_000_000, 1_700_000_000_300))
    assert not {first.join(name, None, 0.0, 3)[0].session for name in "abc"} & {
        second.join(name, None, 0.0, 3)[0].session for name in "abc"
    }


def test_restored_roster_opens_when_all_of_before_are_heard_of() -> None:
    lead = restored("a", "b")
    lead.renew("a", 1, 1.0)
    assert lead.tick(1.0, 3) == ()
    lead.renew("b", 2, 2.0)
    (announce,) = lead.tick(2.0, 3)
    assert isinstance(announce, Announce)
    assert announce.roster.open


def test_restored_roster_opens_without_those_whose_lease_runs_out_if_one_has_come_back() -> None:
    lead = restored("a", "b")
    lead.tick(0.0, 3)
    lead.renew("a", 1, 9.0)
    evict, announce = lead.tick(11.0, 3)
    assert isinstance(evict, Evict)
    assert evict.worker == "b"
    assert isinstance(announce, Announce)
    assert announce.roster.open


def test_workers_that_all_join_anew_start_together_at_the_open_step() -> None:
    lead = restored("a", "b")
    first, _ = lead.join("a", 0, 1.0, 3)
    assert not lead.roster.open
    second, _ = lead.join("b", 1, 1.0, 3)
    assert lead.roster.open
    assert (first.first_step, second.first_step) == (3, 3)


def test_worker_of_another_name_takes_the_rank_of_one_that_is_expected_and_not_of_one_that_is_back() -> None:
    lead = restored("a", "b")
    lead.renew("b", 2, 1.0)
    _, effects = lead.join("c", 0, 1.0, 3)
    assert any(isinstance(effect, Evict) and effect.worker == "a" for effect in effects)
    with pytest.raises(NameTaken, match="rank 1 belongs to worker 'b'"):
        lead.join("d", 1, 1.0, 3)
    with pytest.raises(UnknownWorker):
        lead.renew("a", 1, 1.0)


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"epoch": 1, "members": [["a", 2, None, 0]]},
        {"epoch": 3, "members": [["a", "2", None, 0]]},
        {"epoch": 3, "members": [["", 2, None, 0]]},
        {"epoch": 3, "members": [["a", 2]]},
        {"epoch": None, "members": []},
    ],
)
def test_roster_that_cannot_be_right_is_refused_and_leaves_no_trace(data: Mapping[str, Any]) -> None:
    lead = Membership(quorum=1, lease=10.0)
    with pytest.raises((KeyError, TypeError, ValueError)):
        lead.restore(data)
    assert lead.roster.epoch == 0
    assert lead.num_sessions == 0
