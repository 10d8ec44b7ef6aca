"""Sending ahead is tried against sending at ``step``, and the faster way is kept."""

import itertools

from torch_ps.worker.optim.ahead_choice import KEPT, PAIRS, AheadChoice


def run(choice: AheadChoice, steps: int, seconds: dict[bool, float], now: float = 0.0) -> tuple[list[bool], float]:
    """The ways of ``steps`` steps, each of which takes the seconds of its way, and the time after them."""
    ways = []
    for _ in range(steps):
        choice.begin(now)
        ways.append(choice.ahead)
        now += seconds[choice.ahead]
    return ways, now


def test_trial_takes_both_ways_in_turn_from_the_first_step_on() -> None:
    ways, _ = run(AheadChoice(), 2 * PAIRS, {True: 1.0, False: 1.0})
    assert ways == [True, False] * PAIRS


def test_faster_way_is_kept_until_the_next_trial() -> None:
    for faster in (True, False):
        ways, _ = run(AheadChoice(), 2 * PAIRS + KEPT + 2, {faster: 0.9, not faster: 1.0})
        assert ways[2 * PAIRS :] == [faster] * KEPT + [True, False]


def test_gain_within_the_noise_sends_at_step() -> None:
    ways, _ = run(AheadChoice(), 2 * PAIRS + 1, {True: 0.99, False: 1.0})
    assert not ways[-1]


def test_one_long_pause_decides_nothing() -> None:
    choice = AheadChoice()
    _, now = run(choice, PAIRS, {True: 0.5, False: 1.0})
    ways, _ = run(choice, PAIRS + 1, {True: 0.5, False: 1.0}, now + 1000)
    assert ways[-1]


def test_same_outcome_is_kept_longer_each_time_and_another_one_as_long_as_the_first() -> None:
    choice, trial = AheadChoice(), 2 * PAIRS
    ways, now = run(choice, 2 * trial + 3 * KEPT, {True: 0.5, False: 1.0})
    ways += run(choice, trial + KEPT, {True: 1.0, False: 0.5}, now)[0]
    runs = [(way, len(list(same))) for way, same in itertools.groupby(ways)]
    # A trial begins with True, which lengthens the run before it, and ends with False.
    assert [each for each in runs if each[1] > 1] == [(True, KEPT + 1), (True, 2 * KEPT + 1), (False, KEPT + 1)]


def test_gradients_that_change_after_backward_end_a_trial_at_once() -> None:
    choice = AheadChoice()
    choice.begin(0.0)
    assert choice.ahead
    assert choice.end(used=49, sent=100)
    ways, _ = run(choice, KEPT + 1, {True: 0.1, False: 1.0}, 1.0)
    assert ways == [False] * (KEPT - 1) + [True, False]


def test_gradients_that_mostly_stay_do_not_end_a_trial() -> None:
    choice = AheadChoice()
    choice.begin(0.0)
    assert not choice.end(used=50, sent=100)
    assert not choice.end(used=0, sent=0)
