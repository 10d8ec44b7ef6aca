"""Who takes part: ranks, first steps, sessions and leases."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.core.job import member, told, trace
from torch_ps.common.errors import ConfigError, NameTaken, ProtocolError, UnknownWorker
from torch_ps.ps.core.effects import Announce, Effects, Evict
from torch_ps.ps.core.membership import Membership, tick_seconds
from torch_ps.ps.core.roster import Member, rank_order


def lead(*names: str, quorum: int = 1, lease: float = 10.0) -> Membership:
    m = Membership(quorum=quorum, lease=lease)
    for name in names:
        m.join(name, None, 0.0, 0)
    return m


def names(m: Membership) -> list[str]:
    return [each.name for each in m.roster.members]


def reason(effects: Effects) -> str:
    announce = effects[-1]
    assert isinstance(announce, Announce)
    return announce.reason


@pytest.mark.parametrize(
    ("given", "ordered"),
    [
        (["w10", "w2", "w1"], ["w1", "w2", "w10"]),
        (["b", "a", "a1", "a1b"], ["a", "a1", "a1b", "b"]),
        (["w02", "w2", "w1x10", "w1x9"], ["w1x9", "w1x10", "w02", "w2"]),
        (["7", "10", "x"], ["7", "10", "x"]),
    ],
)
def test_names_rank_in_natural_order(given: list[str], ordered: list[str]) -> None:
    assert [m.name for m in rank_order(member(name) for name in given)] == ordered


def test_ranks_asked_for_come_first() -> None:
    m = lead("w1", "w0")
    m.join("z", 5, 0.0, 0)
    m.join("y", 2, 0.0, 0)
    assert names(m) == ["y", "z", "w0", "w1"]
    assert [m.roster.rank_of(name) for name in names(m)] == [0, 1, 2, 3]
    with pytest.raises(UnknownWorker, match="worker 'v' is not in roster epoch 4; join first"):
        m.roster.rank_of("v")


def test_roster_opens_with_the_quorum_and_stays_open() -> None:
    m = lead("a", quorum=2)
    assert not m.roster.open
    m.join("b", None, 0.0, 0)
    assert m.roster.open
    m.leave("a", 1, 0.0, 3)
    assert m.roster.open


def test_all_of_the_first_quorum_start_at_the_open_step_and_later_ones_a_step_after_it() -> None:
    m = Membership(quorum=2, lease=10)
    assert m.join("a", None, 0.0, 4)[0] == Member("a", 1, None, 4)
    assert m.join("b", None, 0.0, 4)[0] == Member("b", 2, None, 4)
    c, effects = m.join("c", None, 0.0, 6)
    assert c == Member("c", 3, None, 7)
    assert reason(effects) == "c joined, first step 7"
    assert m.roster.required(6) == ("a", "b")
    assert m.roster.required(7) == ("a", "b", "c")


def test_joining_again_ends_the_old_session_in_the_same_epoch() -> None:
    m = lead("a", "b")
    again, effects = m.join("a", None, 0.0, 5)
    assert again == Member("a", 3, None, 6)
    assert told(effects) == ["evict a 1", "announce"]
    assert (m.roster.epoch, names(m)) == (3, ["a", "b"])
    with pytest.raises(UnknownWorker, match="session 1 of worker 'a'"):
        m.renew("a", 1, 1.0)


def test_joining_again_with_the_digest_of_the_session_is_a_repeat_and_renews_its_lease() -> None:
    m = Membership(quorum=1, lease=10)
    first, _ = m.join("a", 0, 0.0, 0, digest="d1", seeds="m1")
    before = m.roster
    assert m.join("a", 0, 8.0, 5, digest="d1") == (first, ())
    assert (m.roster, m.num_joins, m.silent_for("a", 8.0)) == (before, 1, 0.0)
    again, effects = m.join("a", 0, 9.0, 5, digest="d2")
    assert again == Member("a", 2, 0, 6, "d2")
    assert told(effects) == ["evict a 1", "announce"]


def test_members_keep_their_digests_over_a_restart_and_a_takeover() -> None:
    m = Membership(quorum=1, lease=10)
    m.join("a", 0, 0.0, 0, digest="d1", seeds="m1")
    for kept in (m.export(), m.hand_over()):
        restarted, successor = Membership(quorum=1, lease=10), Membership(quorum=1, lease=10)
        restarted.restore(kept)
        assert restarted.roster.members == (Member("a", 1, 0, 0, "d1"),)
        successor.take_over({**m.hand_over(), **kept})
        assert successor.roster.members == restarted.roster.members
    old = Membership(quorum=1, lease=10)
    old.restore({"epoch": 1, "members": [["a", 1, 0, 0]]})  # as versions without digests have written it
    assert old.roster.members == (Member("a", 1, 0, 0),)


REFUSED: list[tuple[str, int | None, bool, type[ProtocolError], str]] = [
    ("a", None, False, NameTaken, "worker 'a' is in the job already and alive; choose another name"),
    (
        "c",
        0,
        True,
        NameTaken,
        "rank 0 belongs to worker 'r', last heard of 2.0 s ago; .* its lease of 10 s has run out",
    ),
    ("a", 0, True, NameTaken, "rank 0 belongs to worker 'r'"),
    ("c", -1, True, ProtocolError, "rank of worker 'c' must be >= 0; got -1"),
    ("", None, True, ProtocolError, "a worker's name has 1 to 100 printable characters"),
    ("x" * 101, None, True, ProtocolError, "a worker's name has 1 to 100 printable characters"),
    ("  ", None, True, ProtocolError, "a worker's name has 1 to 100 printable characters"),
    ("a\nb", None, True, ProtocolError, "a worker's name has 1 to 100 printable characters"),
]


@pytest.mark.parametrize(("name", "rank", "replace", "error", "says"), REFUSED)
def test_refused_join_leaves_no_trace(
    name: str, rank: int | None, replace: bool, error: type[ProtocolError], says: str
) -> None:
    m = lead("a", "b")
    m.join("r", 0, 0.0, 0)
    before = trace(m)
    with pytest.raises(error, match=says):
        m.join(name, rank, 2.0, 0, replace=replace)
    assert trace(m) == before


def test_next_life_of_a_worker_may_have_its_own_rank_again() -> None:
    m = lead()
    m.join("a", 0, 0.0, 0)
    assert m.join("a", 0, 0.0, 0)[0].rank == 0


def test_leaving_twice_is_leaving_once() -> None:
    m = lead("a", "b")
    assert reason(m.leave("a", 1, 0.0, 2)) == "a left in step 2"
    assert m.leave("a", 1, 0.0, 2) == ()
    assert m.leave("b", 1, 0.0, 2) == ()  # another life's session
    assert names(m) == ["b"]


def test_silence_longer_than_the_lease_evicts_in_one_epoch() -> None:
    m = lead("a", "b", "c")
    m.renew("b", 2, 4.0)
    assert m.tick(10.0, 7) == ()
    effects = m.tick(10.5, 7)
    assert told(effects) == ["evict a 1", "evict c 3", "announce"]
    assert "no sign of life from a for 10.5 s (lease 10 s)" in reason(effects)
    assert (names(m), m.roster.epoch) == (["b"], 4)
    assert m.silent_for("b", 10.5) == 6.5


def test_clock_that_jumps_back_does_not_shorten_a_lease() -> None:
    m = lead("a")
    m.renew("a", 1, 9.0)
    m.renew("a", 1, 3.0)
    assert m.tick(18.0, 0) == ()


@settings(deadline=None)
@given(
    lease=st.floats(0.01, 1000),
    seen=st.floats(0, 1000),
    phase=st.floats(0, 1),
    jitter=st.lists(st.floats(0.5, 1), min_size=20, max_size=20),
)
def test_silent_worker_is_dropped_within_its_lease_and_one_tick(
    lease: float, seen: float, phase: float, jitter: list[float]
) -> None:
    """Whenever ticks begin, as long as none is more than ``tick_seconds`` after the one before."""
    m = lead("a", "b", quorum=2, lease=lease)
    m.renew("b", 2, seen)
    step = tick_seconds(lease)
    now = seen + phase * step
    for each in itertools.cycle(jitter):
        m.renew("a", 1, now)
        effects = m.tick(now, 7)
        if effects:
            break
        assert now - seen <= lease
        now += each * step
    assert lease < now - seen <= (lease + step) * (1 + 1e-9)
    assert names(m) == ["a"]
    assert [type(effect) for effect in effects] == [Evict, Announce]
    assert m.roster.required(7) == ("a",)  # who goes on at once, with the step that is open
    assert step <= lease / 8  # so well within one more lease


def test_evicted_worker_has_to_join_again() -> None:
    m = lead("a")
    m.tick(11.0, 0)
    with pytest.raises(UnknownWorker, match="join again"):
        m.renew("a", 1, 11.0)
    with pytest.raises(UnknownWorker):
        m.silent_for("a", 11.0)
    assert m.join("a", None, 12.0, 0)[0].session == 3


@pytest.mark.parametrize(("quorum", "lease"), [(0, 1.0), (-1, 1.0), (1, 0.0), (1, -1.0), (1, float("nan"))])
def test_settings_out_of_range_are_refused(quorum: int, lease: float) -> None:
    with pytest.raises(ConfigError):
        Membership(quorum=quorum, lease=lease)


def test_silence_while_the_lead_stood_still_is_nobodys() -> None:
    m = lead("a", "b")  # heard of at 0
    m.renew("b", 2, 24.0)  # of the first to be read when the lead has run again
    m.stood_still(20.0, 25.0)
    assert m.silent_for("a", 25.0) == 5.0
    assert m.silent_for("b", 25.0) == 0.0
    assert m.tick(30.0, 0) == ()
    assert isinstance(m.tick(30.5, 0)[0], Evict)
