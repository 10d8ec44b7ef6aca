"""Sending ahead is tried against sending at ``step``, and the faster way is kept."""

import itertools

from torch_ps.worker.optim.ahead_choice import BLOCK, KEPT, TRIAL, UNCOUNTED, AheadChoice


def run(choice: AheadChoice, steps: int, seconds: dict[bool, float], now: float = 0.0) -> tuple[list[bool], float]:
    """The ways of ``steps`` steps, each of which takes the seconds of its way, and the time after them."""
    ways = []
    for _ in range(steps):
        choice.begin(now)
        ways.append(choice.ahead)
        now += seconds[choice.ahead]
    return ways, now


def blocks(ways: list[bool]) -> list[tuple[bool, int]]:
    """Each way and how many steps in a row went this way."""
    return [(way, len(list(same))) for way, same in itertools.groupby(ways)]


def test_trial_takes_blocks_of_both_ways_from_the_first_step_on() -> None:
    ways, _ = run(AheadChoice(), TRIAL, {True: 1.0, False: 1.0})
    assert blocks(ways) == [(True, BLOCK), (False, BLOCK)] * 2


def test_faster_way_is_kept_until_the_next_trial() -> None:
    for faster in (True, False):
        ways, _ = run(AheadChoice(), TRIAL + KEPT + 2 * BLOCK, {faster: 0.9, not faster: 1.0})
        assert ways[TRIAL:] == [faster] * KEPT + [True] * BLOCK + [False] * BLOCK


def test_steps_right_after_a_change_of_the_way_do_not_count() -> None:
    choice, now = AheadChoice(), 0.0
    for step in range(TRIAL + 1):
        choice.begin(now)
        in_block = step % BLOCK
        now += {True: 0.5, False: 1.0}[choice.ahead] if in_block >= UNCOUNTED else {True: 9.0, False: 0.1}[choice.ahead]
    assert choice.ahead


def test_gain_within_the_noise_sends_at_step() -> None:
    ways, _ = run(AheadChoice(), TRIAL + 1, {True: 0.99, False: 1.0})
    assert not ways[-1]


def test_one_long_pause_decides_nothing() -> None:
    choice = AheadChoice()
    _, now = run(choice, BLOCK, {True: 0.5, False: 1.0})
    ways, _ = run(choice, TRIAL - BLOCK + 1, {True: 0.5, False: 1.0}, now + 1000)
    assert ways[-1]


def test_same_outcome_is_kept_longer_each_time_and_another_one_as_long_as_the_first() -> None:
    choice = AheadChoice()
    ways, now = run(choice, 2 * TRIAL + 3 * KEPT, {True: 0.5, False: 1.0})
    ways += run(choice, TRIAL + KEPT, {True: 1.0, False: 0.5}, now)[0]
    # A trial begins with a block of True, which lengthens the run before it, and ends with a block of False.
    kept = [(way, steps - BLOCK) for way, steps in blocks(ways) if steps > BLOCK]
    assert kept == [(True, KEPT), (True, 2 * KEPT), (False, KEPT)]


def test_gradients_that_change_after_backward_end_a_trial_at_once() -> None:
    choice = AheadChoice()
    choice.begin(0.0)
    assert choice.ahead
    assert choice.end(used=49, sent=100)
    ways, _ = run(choice, KEPT + 1, {True: 0.1, False: 1.0}, 1.0)
    assert ways == [False] * (KEPT - 1) + [True, True]


def test_gradients_that_mostly_stay_do_not_end_a_trial() -> None:
    choice = AheadChoice()
    choice.begin(0.0)
    assert not choice.end(used=50, sent=100)
    assert not choice.end(used=0, sent=0)
