"""Loops with a data set per epoch: after a rollback, those that go on and those that begin anew never wait in a circle.

A loop that lives through a rollback goes on with the data set that it reads, although samples of an earlier one are
free again. One that begins anew asks for every data set in turn, and so for what is left of the earlier one.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.core.job import covering, member, push, roster
from torch_ps.ps.core.dataset_progress import DatasetSpec
from torch_ps.ps.core.modes import Mode
from torch_ps.ps.core.ranges import num_positions
from torch_ps.ps.core.roster import Member
from torch_ps.ps.core.sample_assigner import Idle, Later, Over, Portion, SampleAssigner, SampleRequest
from torch_ps.ps.core.shard import Shard

MODES = (Mode(name="sync"), Mode(name="ssp", slack=0), Mode(name="ssp", slack=1), Mode(name="async"))


@dataclass
class Loop:
    """The training loop of one worker; ``at`` is the number of its data set in ``Job.sets``."""

    member: Member
    at: int = 0
    number: int | None = None
    have: int = 0
    fetched: int = 0
    begun: int = 0
    waits: bool = False

    def next_set(self, at: int) -> None:
        self.at, self.number, self.have, self.fetched, self.begun = at, None, 0, 0, 0


@dataclass
class Job:
    """Loops around one core, which starts again from its last checkpoint."""

    mode: Mode
    sets: list[DatasetSpec]
    epoch: int = 0
    loops: dict[str, Loop] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._start()
        self.keep()

    def _start(self) -> None:
        self.data = SampleAssigner(self.mode)
        self.core = Shard(buckets=1, mode=self.mode, data=self.data)

    def keep(self) -> None:
        self.kept = json.dumps([self.data.export(), self.core.records()])

    def roll_back(self) -> None:
        self._start()
        data, records = json.loads(self.kept)
        self.data.restore(data)
        self.core.restore(records)
        for name, loop in list(self.loops.items()):
            self.join(name, loop.at)

    def join(self, name: str, at: int = 0) -> None:
        self.epoch += 1
        first = self.core.clock + bool(self.loops and self.core.roster.members)
        self.loops[name] = Loop(member(name, self.epoch, first), at)
        self.follow()

    def leave(self, name: str) -> None:
        del self.loops[name]
        self.epoch += 1
        self.follow()

    def follow(self) -> None:
        now = [loop.member for loop in self.loops.values() if loop.member.session > 0]
        self._obey(self.core.set_roster(roster(self.epoch, *now)))

    def move(self, name: str) -> None:
        """Let one worker go on; nothing happens where it waits."""
        loop = self.loops[name]
        who = loop.member
        if loop.waits or (self.mode.holds_others_up and who.first_step > self.core.clock):
            return
        if loop.at == len(self.sets):
            self.leave(name)
            return
        if not loop.have:
            request = SampleRequest(name, who.session, self.sets[loop.at], 2, 1, loop.fetched, number=loop.number)
            match self.core.request_samples(request):
                case Portion(number, _, ranges):
                    if number != loop.number:
                        loop.number, loop.fetched, loop.begun = number, 0, 0
                    loop.have = num_positions(ranges)
                    loop.fetched += loop.have
                case Over():
                    loop.next_set(loop.at + 1)
                    return
                case Later():
                    return
                case Idle():
                    pass
        batch = min(loop.have, 2)
        loop.have, loop.begun = loop.have - batch, loop.begun + batch
        step = next(w.clock for w in self.core.status().workers if w.worker == name)
        made = push(name, step, weight=float(batch), base=self.core.open_step, session=who.session)
        if loop.number is not None and loop.begun:
            made = covering(made, loop.begun, loop.number)
        loop.waits = True
        self._obey(self.core.push(made))

    def _obey(self, effects: Any) -> None:
        for effect in effects:
            loop = self.loops.get(getattr(effect, "worker", None) or "")
            if type(effect).__name__ == "Release" and loop and loop.member.session == effect.session:
                loop.waits = False


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: f"{mode.name}-{mode.slack}")
def test_every_loop_ends_whatever_is_rolled_back_and_whoever_begins_anew(mode: Mode) -> None:
    for seed in range(60):
        dice = random.Random(seed)
        job = Job(mode, [DatasetSpec(f"epoch {at}", dice.randint(1, 30), 0, True) for at in range(dice.randint(2, 6))])
        for name in ("a", "b", "c")[: dice.randint(2, 3)]:
            job.join(name)
        faults = dice.randint(1, 6)
        for _ in range(20_000):
            if not job.loops:
                break
            if dice.random() < 0.02:
                job.keep()
            if faults and dice.random() < 0.03:
                faults -= 1
                if dice.random() < 0.5:
                    job.roll_back()
                elif len(job.loops) > 1:
                    name = dice.choice(sorted(job.loops))
                    job.leave(name)
                    job.join(name)
            job.move(dice.choice(sorted(job.loops)))
        assert not job.loops, (seed, {name: loop.at for name, loop in job.loops.items()}, job.data.export())
