"""A few combinations in place of all: each pair of values of any two factors is in at least one of them.

Source: D. Cohen et al., The AETG System: An Approach to Testing Based on Combinatorial Design, 1997: the greedy choice.
"""

from collections.abc import Iterator, Sequence
from itertools import combinations, product
from typing import Any


def pairwise(*factors: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Combinations of one value of each factor, in a fixed order.

    Args:
        factors: two or more, each with its values.
    """
    numbers = list(product(*(range(len(factor)) for factor in factors)))
    missing = {pair for combination in numbers for pair in _pairs(combination)}
    chosen = []
    while missing:
        best = max(numbers, key=lambda combination: sum(pair in missing for pair in _pairs(combination)))
        missing -= set(_pairs(best))
        chosen.append(best)
    return [tuple(factor[i] for factor, i in zip(factors, each, strict=True)) for each in sorted(chosen)]


def _pairs(combination: tuple[int, ...]) -> Iterator[tuple[tuple[int, int], ...]]:
    """Pairs of (factor, value) in a combination."""
    return combinations(enumerate(combination), 2)
