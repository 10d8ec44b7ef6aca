"""One start of the servers: who is of it, and who may take the place of a shard."""

import contextlib

import pytest

from torch_ps.common.errors import ConfigError, Overloaded, ProtocolError, Refused, Restarted
from torch_ps.ps.core.incarnation import MAX_OF_HOST, Incarnation

X, Y = 7, 8
LEASE = 15.0
HERE, THERE = "10.0.0.1", "10.0.0.2"


def lead(num_shards: int = 3) -> Incarnation:
    return Incarnation(X, 0, num_shards, lease=LEASE)


def test_call_of_another_incarnation_is_refused_and_says_what_to_do() -> None:
    lead().check(X, "worker 'w0'")
    with pytest.raises(Restarted, match=r"'w0' is of another start .* than shard 0; start all servers together with"):
        lead().check(Y, "worker 'w0'")


@pytest.mark.parametrize("number", [0, Y])
def test_call_that_names_none_is_refused_like_one_of_another(number: int) -> None:
    with pytest.raises(Restarted):
        lead().check(number, "an observer")


def test_shard_whose_answer_was_lost_may_ask_again() -> None:
    job = lead()
    job.enter(1, 3, "a0", HERE, 0.0)
    job.close()
    job.enter(1, 3, "a0", HERE, 0.0)


def test_until_a_worker_takes_part_another_process_may_take_a_place() -> None:
    job = lead()
    job.enter(1, 3, "a0", HERE, 0.0)
    job.enter(1, 3, "a1", HERE, 0.0)
    job.close()
    job.enter(1, 3, "a1", HERE, 0.0)
    with pytest.raises(Refused, match="shard 1 cannot start alone"):
        job.enter(1, 3, "a0", HERE, 0.0)


def test_process_that_enters_beside_another_does_not_take_its_voice() -> None:
    job = lead()
    job.enter(1, 3, "a0", HERE, 0.0)
    assert job.follow(1, "a0")
    for number in range(1, MAX_OF_HOST):
        job.enter(1, 3, f"a{number}", HERE, 0.0)
    for now in (LEASE, LEASE + 0.1):
        for number in range(2 * MAX_OF_HOST):
            with contextlib.suppress(Overloaded):
                job.enter(1, 3, f"b{now}-{number}", HERE, now)
    job.enter(1, 3, "a0", HERE, 2 * LEASE)
    assert len(job.digests[1]) == MAX_OF_HOST
    assert job.digests[1][-1] == "a0"


def test_host_from_which_many_have_entered_keeps_out_itself_alone_and_for_a_lease() -> None:
    job = lead()
    for number in range(MAX_OF_HOST):
        job.enter(1, 3, f"a{number}", HERE, 1.0)
    with pytest.raises(Overloaded, match=rf"16 processes of {HERE} have entered as shard 1 .* silent for 15 s makes"):
        job.enter(1, 3, "b", HERE, 1.0 + LEASE)
    job.enter(1, 3, "c", THERE, 1.0)
    job.enter(1, 3, "b", HERE, 1.1 + LEASE)
    assert {"b", "c"} < set(job.digests[1])
    assert len(job.digests[1]) == MAX_OF_HOST + 1


def test_place_of_a_shard_that_follows_no_more_is_free_after_a_lease() -> None:
    job = lead()
    assert not job.follow(1, "a0")
    for number in range(MAX_OF_HOST):
        job.enter(1, 3, f"a{number}", HERE, 0.0)
        assert job.follow(1, f"a{number}")
    job.unfollow(1, "a5", 100.0)
    for now in (99.0 + LEASE, 100.0 + LEASE):
        with pytest.raises(Overloaded):
            job.enter(1, 3, "b", HERE, now)
    job.enter(1, 3, "b", HERE, 100.1 + LEASE)
    assert "a5" not in job.digests[1]


@pytest.mark.parametrize("shard", [1, 2])
def test_once_a_worker_takes_part_no_other_process_takes_a_place(shard: int) -> None:
    job = lead()
    job.enter(1, 3, "a0", HERE, 0.0)
    job.close()
    for _ in range(2):  # and trying does not help
        with pytest.raises(Refused, match=f"shard {shard} cannot start alone: .* together with --resume"):
            job.enter(shard, 3, "a1", HERE, 0.0)


def test_who_goes_on_from_the_state_of_another_has_no_place_to_give() -> None:
    job = Incarnation(X, 0, 3, lease=LEASE, continued=True)
    job.check(X, "shard 1")
    with pytest.raises(Refused):
        job.enter(1, 3, "a0", HERE, 0.0)


@pytest.mark.parametrize(("shard", "num_shards"), [(0, 3), (3, 3), (1, 2), (1, 4)])
def test_shard_that_the_job_does_not_have_is_refused(shard: int, num_shards: int) -> None:
    with pytest.raises(ConfigError, match="the lead's job has 3 shards"):
        lead().enter(shard, num_shards, "a0", HERE, 0.0)


def test_shard_that_is_asked_for_a_place_sends_to_the_lead() -> None:
    with pytest.raises(ProtocolError, match="shard 1 is not the lead; ask shard 0"):
        Incarnation(X, 1, 3, lease=LEASE).enter(2, 3, "a0", HERE, 0.0)
