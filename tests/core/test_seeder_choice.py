"""Whose parameters a job begins with: the lowest rank of the first quorum where a run can be repeated."""

import itertools

import pytest

from torch_ps.ps.core.seeder_choice import SeederChoice


def chosen(order: list[int | None], quorum: int, *, by_rank: bool = True) -> int | None:
    """The first of the workers that may seed, when they come in this order."""
    choice = SeederChoice(quorum=quorum, by_rank=by_rank)
    here: list[int | None] = []
    for rank in order:
        choice.add(f"w{rank}", rank)
        here.append(rank)
        if able := [each for each in here if choice.may_seed(each)]:
            return able[0]
    raise AssertionError(choice.reason())


@pytest.mark.parametrize("order", list(itertools.permutations((0, 1, 2))))
def test_rank_0_seeds_in_whatever_order_the_quorum_comes(order: tuple[int, ...]) -> None:
    assert chosen(list(order), 3) == 0


@pytest.mark.parametrize("order", [(3, 1), (1, 3)])
def test_lowest_rank_of_the_quorum_seeds_where_rank_0_is_not_in_it(order: tuple[int, ...]) -> None:
    assert chosen(list(order), 2) == 1


def test_one_worker_is_a_quorum_of_one() -> None:
    assert chosen([5], 1) == 5


def test_where_pushes_are_applied_one_by_one_the_first_that_comes_seeds() -> None:
    assert chosen([2, 0], 2, by_rank=False) == 2


def test_worker_without_a_rank_seeds_at_once() -> None:
    assert chosen([None, 0], 2) is None


def test_candidate_that_went_away_does_not_count_and_two_of_one_rank_count_once() -> None:
    choice = SeederChoice(quorum=2, by_rank=True)
    choice.add("w1", 1)
    choice.add("other", 1)
    assert not choice.may_seed(1)
    choice.remove("other", 1)
    choice.add("w2", 2)
    assert choice.may_seed(1)
    assert not choice.may_seed(2)
    choice.remove("w1", 1)
    assert not choice.may_seed(2)
    assert choice.reason() == (
        "1 of 2 workers have not joined the job, which begins with the parameters of the lowest rank of them; w2 did"
    )
