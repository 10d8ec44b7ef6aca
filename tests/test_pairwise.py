"""The combinations that stand for all of them hold every pair, and are few."""

from itertools import combinations, product

import pytest

from tests.support.pairwise import pairwise


@pytest.mark.parametrize("sizes", [(2, 2), (5, 2, 2), (3, 2, 2), (4, 2, 2, 2), (3, 3, 3, 3)])
def test_every_pair_of_values_of_two_factors_is_in_a_combination(sizes: tuple[int, ...]) -> None:
    factors = [[(factor, value) for value in range(size)] for factor, size in enumerate(sizes)]
    chosen = pairwise(*factors)
    for first, second in combinations(factors, 2):
        for pair in product(first, second):
            assert any(set(pair) <= set(combination) for combination in chosen)
    most = sorted(sizes)[-2:]
    assert len(chosen) <= 1.5 * most[0] * most[1]
    assert chosen == pairwise(*factors)
