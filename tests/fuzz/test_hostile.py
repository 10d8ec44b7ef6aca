"""Hostile members find nothing in a few sequences, and planted bugs in two minutes; ``make hostile`` goes on."""

import pytest

from tests.fuzz.hostile import search
from tests.fuzz.mutants import MUTANTS, found


def test_hostile_members_end_nothing() -> None:
    assert search(0.0, 1, sequences=4) == 4


@pytest.mark.tier("all")
@pytest.mark.parametrize("name", MUTANTS)
def test_hostile_members_find(name: str) -> None:
    assert found(name, 100.0) != ""
