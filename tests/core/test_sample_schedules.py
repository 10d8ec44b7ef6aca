"""Seeded schedules of workers that ask, push, die and come back: every sample is trained on once an epoch."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest

from tests.core.job import covering, member, push, roster
from torch_ps.ps.core.dataset_progress import DatasetSpec
from torch_ps.ps.core.modes import Mode
from torch_ps.ps.core.ranges import num_positions
from torch_ps.ps.core.sample_assigner import Later, Over, Portion, SampleAssigner, SampleRequest
from torch_ps.ps.core.shard import Shard


@pytest.mark.parametrize("seed", range(300))
def test_every_sample_is_trained_on_once_an_epoch_whatever_happens(seed: int) -> None:
    """Workers ask, push, repeat, give back, die and come back, answers and pushes are dropped: as the seed draws it."""
    dice = random.Random(seed)
    stale = dice.choice([None, 0, 1])
    mode = Mode(name=dice.choice(["async", "sync", "ssp"]))
    mode = Mode(name="async", max_staleness=stale) if mode.name == "async" else Mode(name=mode.name, slack=0)
    size, epochs = dice.randint(1, 60), dice.randint(1, 3)
    world = World(mode, size, epochs, dice)
    world.run(faults=dice.randint(0, 40))
    assert world.trained == {(e, p): 1 for e in range(epochs) for p in range(size)}
    assert not world.data.claims  # nothing is kept of pushes that were decided


class World:
    """Workers around one core. What a push covers counts when the core says that it is applied."""

    def __init__(self, mode: Mode, size: int, epochs: int, dice: random.Random) -> None:
        self.mode, self.size, self.epochs, self.dice = mode, size, epochs, dice
        self.data = SampleAssigner(mode)
        self.core = Shard(buckets=1, mode=mode, data=self.data)
        self.epoch, self.set = 0, DatasetSpec("", size, 0, True)
        self.lives: dict[str, dict[str, Any]] = {}
        self.trained: Counter[tuple[int, int]] = Counter()
        self.open: dict[tuple[str, int, int], list[tuple[int, int]]] = {}
        for name in ("a", "b", "c")[: dice.randint(1, 3)]:
            self.join(name)

    def join(self, name: str) -> None:
        self.epoch += 1
        first = self.core.clock + (1 if self.lives else 0)
        self.lives[name] = {
            "member": member(name, self.epoch, first),
            "batch": self.dice.randint(1, 7),
            "have": [],
            "fetched": 0,
            "begun": 0,
            "number": None,
            "waiting": None,
            "over": False,
        }
        self.follow()

    def kill(self, name: str) -> None:
        del self.lives[name]
        self.epoch += 1
        self.follow()

    def follow(self) -> None:
        self.obey(self.core.set_roster(roster(self.epoch, *(w["member"] for w in self.lives.values()))))

    def run(self, faults: int) -> None:
        for _ in range(20000):
            if all(w["over"] for w in self.lives.values()):
                break
            if faults and self.dice.random() < 0.15:
                faults -= 1
                self.fault()
            name = self.dice.choice(sorted(self.lives))
            self.move(name, self.lives[name])
        assert all(w["over"] for w in self.lives.values()), self.data.export()
        for name in list(self.lives):  # the end: whoever has nothing more leaves
            self.kill(name)

    def fault(self) -> None:
        names, absent = sorted(self.lives), sorted({"a", "b", "c"} - set(self.lives))
        what = self.dice.random()
        if what < 0.4 and len(names) > 1:
            self.kill(self.dice.choice(names))
        elif what < 0.7 and absent:
            self.join(self.dice.choice(absent))
        else:
            name = self.dice.choice(names)
            worker = self.lives[name]
            if worker["waiting"] is not None and self.dice.random() < 0.5:
                self.obey(self.core.push(worker["waiting"]))  # a repeat
            elif not worker["over"]:
                worker["have"], worker["fetched"] = [], worker["begun"]
                self.data.give_back(name, worker["member"].session, self.set, worker["begun"])

    def move(self, name: str, worker: dict[str, Any]) -> None:
        who: Any = worker["member"]
        if worker["waiting"] is not None or (who.first_step > self.core.clock and self.mode.holds_others_up):
            return
        if worker["over"]:
            self.kill(name) if len(self.lives) > 1 else None
            return
        batch: list[tuple[int, int]] = []
        if not worker["have"]:
            answer = self.core.request_samples(
                SampleRequest(
                    name,
                    who.session,
                    self.set,
                    worker["batch"],
                    self.epochs,
                    worker["fetched"],
                    number=worker["number"],
                )
            )
            if self.dice.random() < 0.1:
                return  # it is lost on its way
            match answer:
                case Portion():
                    if answer.number != worker["number"]:
                        worker["number"], worker["fetched"], worker["begun"] = answer.number, 0, 0
                    worker["have"] = [(answer.epoch, p) for start, stop in answer.ranges for p in range(start, stop)]
                    worker["fetched"] += num_positions(answer.ranges)
                case Over():
                    worker["over"] = True
                    return
                case Later():
                    return
        batch, worker["have"] = worker["have"][: worker["batch"]], worker["have"][worker["batch"] :]
        worker["begun"] += len(batch)
        step = next(w.clock for w in self.core.status().workers if w.worker == name)
        base = max(0, self.core.open_step - (0 if self.mode.holds_others_up else self.dice.randint(0, 2)))
        made = push(name, step, base=base, session=who.session, epoch=self.epoch)
        if worker["begun"]:
            made = covering(made, worker["begun"], worker["number"])
        worker["waiting"] = made
        self.open[name, who.session, step] = batch
        self.obey(self.core.push(made))

    def obey(self, effects: Any) -> None:
        for effect in effects:
            match type(effect).__name__:
                case "Apply":
                    for c in effect.contributions:
                        self.trained.update(self.open.pop((c.worker, c.session, c.step), []))
                case "Release" if effect.worker in self.lives:
                    worker = self.lives[effect.worker]
                    if worker["member"].session == effect.session and effect.step is not None:
                        worker["waiting"] = None
