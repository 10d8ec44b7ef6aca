"""The schedules find every planted bug of ``mutants.py``; one that survives shows a hole in the claims."""

from __future__ import annotations

import pytest

from tests.sim.invariants import Violation
from tests.sim.mutants import MUTANTS
from tests.sim.world import World
from torch_ps.common.errors import ProtocolError

NUM_SCHEDULES = 500


def found_by(name: str) -> str | None:
    """What the first schedule that finds the mutant says."""
    for seed in range(NUM_SCHEDULES):
        try:
            World(MUTANTS[name], seed).run()
        except (Violation, ProtocolError) as found:  # a refusal that a well-behaved worker does not deserve counts
            return f"seed {seed}: {type(found).__name__}: {found}"
    return None


@pytest.mark.parametrize("name", MUTANTS)
def test_schedules_find(name: str) -> None:
    assert found_by(name) is not None
