"""Stability limits: the closed form, published values, and the recurrence itself.

Source: Levin and May, 1976, for plain SGD.
"""

from itertools import pairwise
from math import inf, pi, sin

import pytest

from torch_ps.ps.core.lr_stability import Reading, limit, momentum_advice, swing
from torch_ps.ps.core.modes import Mode

MOMENTA = (0.0, 0.5, 0.9, 0.99)
DELAYS = (0, 1, 2, 3, 7, 15, 31)


def growth(product: float, staleness: int, momentum: float, nesterov: bool) -> float:
    """How much wider x_{t+1} = x_t + mu (x_t - x_{t-1}) - a ... swings after some thousand steps, by torch's update."""
    steps = 200 * (staleness + 1 + int(1 / (1 - momentum)))
    x, velocity = [1.0] * (staleness + 1), 0.0
    for _ in range(2 * steps):
        gradient = product * x[-1 - staleness]
        velocity = momentum * velocity + gradient
        x.append(x[-1] - (gradient + momentum * velocity if nesterov else velocity))
        if abs(x[-1]) > 1e100:
            return inf
    return max(map(abs, x[-steps // 4 :])) / max(map(abs, x[steps // 4 : steps // 2]))


@pytest.mark.parametrize("staleness", DELAYS)
def test_without_momentum_the_limit_is_the_closed_form(staleness: int) -> None:
    assert limit(staleness) == pytest.approx(2 * sin(pi / (2 * (2 * staleness + 1))), rel=1e-12)
    assert swing(staleness) == pytest.approx(2 * staleness + 1)


@pytest.mark.parametrize(("staleness", "published"), [(1, 0.1), (2, 0.0512), (3, 0.0348), (7, 0.0158)])
def test_limits_of_heavy_ball_are_the_published_ones(staleness: int, published: float) -> None:
    assert limit(staleness, 0.9) == pytest.approx(published, abs=5e-5)


@pytest.mark.parametrize("momentum", MOMENTA)
def test_with_one_version_of_staleness_heavy_ball_is_stable_below_one_minus_momentum(momentum: float) -> None:
    assert limit(1, momentum) == pytest.approx(1 - momentum, rel=1e-9)


@pytest.mark.parametrize("momentum", MOMENTA)
def test_fresh_gradients_have_the_limits_of_the_textbook(momentum: float) -> None:
    assert limit(0, momentum) == pytest.approx(2 * (1 + momentum))
    assert limit(0, momentum, nesterov=True) == pytest.approx(2 * (1 + momentum) / (1 + 2 * momentum))


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("momentum", MOMENTA[:3])
@pytest.mark.parametrize("staleness", DELAYS[:5])
def test_recurrence_shrinks_below_the_limit_and_grows_above_it(staleness: int, momentum: float, nesterov: bool) -> None:
    edge = limit(staleness, momentum, nesterov=nesterov)
    assert growth(0.97 * edge, staleness, momentum, nesterov) < 1
    assert growth(1.03 * edge, staleness, momentum, nesterov) > 1


@pytest.mark.parametrize("nesterov", [False, True])
def test_limit_falls_with_staleness_also_between_whole_numbers(nesterov: bool) -> None:
    for momentum in MOMENTA:
        limits = [limit(tenth / 10, momentum, nesterov=nesterov) for tenth in range(400)]
        assert all(later < earlier for earlier, later in pairwise(limits))


def test_limit_falls_with_momentum_where_gradients_are_stale() -> None:
    limits = [limit(4, hundredth / 100) for hundredth in range(100)]
    assert all(later < earlier for earlier, later in pairwise(limits))


def test_very_old_gradients_have_a_limit_too() -> None:
    assert limit(10_000) == pytest.approx(pi / 20_001, rel=1e-6)
    assert 0 < limit(10_000, 0.9) < limit(10_000)


def test_nothing_is_stable_with_momentum_one() -> None:
    assert limit(0, 1.0) == limit(3, 1.5) == 0


def test_sentence_says_what_is_wrong_and_what_to_set() -> None:
    reading = Reading(
        rate=0.3, product=0.3 * 4.1, curvature=4.1, num_workers=8, staleness=7.0, momentum=0.9, nesterov=False
    )
    assert reading.ratio == pytest.approx(0.3 * 4.1 / 0.01575, rel=1e-3)
    assert reading.sentence() == (
        "learning rate 0.3 with 8 workers (mean staleness 7) and momentum 0.9 is above the limit 0.00384 at the "
        "curvature 4.1 seen so far, and the parameters swing wider and wider; set the learning rate (--lr) below "
        "0.00384, or 1 worker at most"
    )


def test_sentence_names_only_remedies_that_would_do() -> None:
    words = Reading(rate=0.3, product=0.3, curvature=1.0, num_workers=8, staleness=7.0).sentence()
    assert words.endswith("set the learning rate (--lr) below 0.209, or --staleness-lr inverse, or 5 workers at most")
    scaled = Reading(rate=3.2, product=0.4, curvature=1.0, num_workers=8, staleness=7.0, scaled=True).sentence()
    assert scaled.endswith("set the learning rate (--lr) below 1.67")


@pytest.mark.parametrize(
    ("momentum", "num_workers", "said"), [(0.9, 3, True), (0.95, 8, True), (0.9, 2, False), (0.89, 8, False)]
)
def test_high_momentum_with_more_than_two_workers_is_advised_against(
    momentum: float, num_workers: int, said: bool
) -> None:
    assert (momentum_advice(momentum, num_workers) is not None) == said


@pytest.mark.parametrize(
    ("mode", "said"),
    [
        (Mode(name="async"), True),
        (Mode(name="ssp", slack=1), True),
        (Mode(name="ssp", slack=0), False),
        (Mode(name="sync"), False),
        (Mode(name="async", staleness_lr="inverse"), False),
    ],
    ids=str,
)
def test_advice_is_for_modes_whose_gradients_are_stale_and_whose_rate_is_not_scaled(mode: Mode, said: bool) -> None:
    assert (mode.advice(0.9, 3) is not None) == said
