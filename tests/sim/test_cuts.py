"""No shard passes a cut unaware, in any schedule; a cut that is planned too near is found."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.sim.invariants import Violation, claim
from tests.sim.world import Event, Parts, World
from torch_ps.ps.core.consistent_cut import CutPlanner
from torch_ps.ps.core.effects import Apply, Effects
from torch_ps.ps.core.modes import Mode

NUM_SCHEDULES = 400

MODES = [
    Mode(),
    Mode(backup_workers=1),
    Mode(name="async"),
    Mode(name="async", max_staleness=2),
    Mode(name="ssp", slack=2),
]

#: Where the next cut is, of the lead's version, the sessions so far and whether pushes are applied one by one.
When = Callable[[int, int, bool], int]


def planner(version: int, sessions: int, stale: bool) -> int:
    found = CutPlanner[None](every=1, seconds=0, num_shards=1, now=0).due(0, version, sessions, stale=stale)
    assert found is not None
    return found


class CutWorld(World):
    """The world of ``world.py``, whose lead plans cuts; at most one at a time."""

    def __init__(self, mode: Mode, seed: int, when: When = planner) -> None:
        super().__init__(Parts(mode), seed)
        self.when, self.planned, self.num_whole = when, 0, 0
        self.left: set[tuple[int, int]] = set()

    def faults(self) -> list[Event]:
        return [*super().faults(), *([self.plan] * 4 if not self.planned else [])]

    def plan(self) -> None:
        lead = self.shards[0]
        self.planned = self.when(lead.open_step, self.lead.num_sessions, self.checker.mode.stale)
        passed = [shard for shard, core in enumerate(self.shards) if max(core.versions) >= self.planned]
        claim(not passed, f"shards {passed} have passed version {self.planned} before it is planned")
        self.left = set(self.buckets)
        self.obey(0, self.lead.plan_cut(self.planned))

    def obey(self, shard: int, effects: Effects, *, parked: bool = False, decided: bool = True) -> None:
        for effect in effects:
            if not isinstance(effect, Apply):
                continue
            cut = bool(self.planned) and effect.version == self.planned
            claim(cut == (effect.record is not None), f"shard {shard} at version {effect.version}: cut is {cut}")
            if cut and effect.record is not None:
                claim(effect.record["version"] == effect.version, "a record is of another version")
                claim(
                    {c.worker for c in effect.contributions} <= set(effect.record["ledger"]), "a push is not on record"
                )
                self.left.remove((shard, effect.bucket))
                if not self.left:
                    version, _ = self.shards[0].cut.taken
                    claim(version == self.planned, f"the lead has the sections of version {version}")
                    self.planned, self.num_whole = 0, self.num_whole + 1
        super().obey(shard, effects, parked=parked, decided=decided)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_every_shard_has_the_record_of_every_cut(mode: Mode, schedule_share: float) -> None:
    num_whole, num_schedules = 0, int(schedule_share * NUM_SCHEDULES)
    for seed in range(num_schedules):
        world = CutWorld(mode, seed)
        try:
            world.run()
        except Exception as error:
            error.add_note(f"mode {mode}, seed {seed}")
            raise
        num_whole += world.num_whole
    assert num_whole > num_schedules / 4  # cuts do become whole


@pytest.mark.parametrize(
    ("mode", "when"),
    [
        (Mode(), lambda version, sessions, stale: version + 1),
        (Mode(name="async"), lambda version, sessions, stale: version + 2),
    ],
    ids=["sync", "async"],
)
def test_cut_that_is_too_near_is_missed_by_some_shard(mode: Mode, when: When) -> None:
    for seed in range(NUM_SCHEDULES):
        try:
            CutWorld(mode, seed, when).run()
        except Violation:
            return
    pytest.fail("no schedule has missed it")
