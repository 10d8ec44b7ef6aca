"""Seeded random schedules over the core: lost answers, repeats, broken streams, workers that die, freeze and return.

A failure names its seed; ``World(Parts(mode), seed).run()`` is that schedule again.
"""

from __future__ import annotations

import pytest

from tests.sim.world import Parts, World
from torch_ps.ps.core.modes import Mode

NUM_SCHEDULES = 600

MODES = [
    Mode(),
    Mode(backup_workers=1),
    Mode(backup_workers=2),
    Mode(name="async"),
    Mode(name="async", max_staleness=2, staleness_lr="inverse"),
    Mode(name="ssp"),
    Mode(name="ssp", slack=1),
    Mode(name="ssp", slack=3, max_staleness=1),
]


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_no_schedule_breaks_a_claim(mode: Mode, schedule_share: float) -> None:
    parts = Parts(mode)
    applied, num_schedules = 0, int(schedule_share * NUM_SCHEDULES)
    for seed in range(num_schedules):
        world = World(parts, seed)
        try:
            world.run()
        except Exception as error:
            error.add_note(f"mode {mode}, seed {seed}")
            raise
        applied += sum(len(books.applied) for books in world.checker.books)
    assert applied > 8 * num_schedules  # the schedules do train, they do not only fail


def test_a_seed_is_a_schedule() -> None:
    def history(seed: int) -> list[object]:
        world = World(Parts(Mode()), seed)
        world.run()
        return [(books.applied, books.samples) for books in world.checker.books]

    assert history(7) == history(7)
    assert history(7) != history(8)
