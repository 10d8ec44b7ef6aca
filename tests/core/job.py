"""Short words for tests of the core: a roster, a shard that follows it, a push; and what an object is made of."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch_ps.ps.core.effects import Apply, Discard, Effects, Evict, Release, Wait
from torch_ps.ps.core.modes import Mode
from torch_ps.ps.core.policy import Push
from torch_ps.ps.core.roster import Member, Roster, rank_order
from torch_ps.ps.core.shard import Shard


def roster(epoch: int, *members: Member, is_open: bool = True) -> Roster:
    return Roster(epoch, rank_order(members), is_open)


def member(name: str, session: int = 1, first_step: int = 0, rank: int | None = None) -> Member:
    return Member(name, session, rank, first_step)


def shard(*names: str, mode: str = "sync", buckets: int = 1) -> Shard:
    """A shard whose roster, epoch 1, holds ``names``, each with session 1."""
    core = Shard(buckets=buckets, mode=Mode(name=mode))
    core.set_roster(roster(1, *(member(name) for name in names)))
    return core


def push(
    worker: str,
    step: int = 0,
    *,
    base: int | None = None,
    bucket: int = 0,
    weight: float = 1.0,
    session: int = 1,
    epoch: int = 1,
) -> Push:
    return Push(worker, session, step, bucket, step if base is None else base, weight, epoch)


def covering(a_push: Push, samples: int, number: int = 0) -> Push:
    """The same push, of the samples of a data set that its worker has begun so far."""
    return dataclasses.replace(a_push, covers=((number, samples),))


def told(effects: Effects) -> list[str]:
    """Effects in a word or two each, for tests that are about the order of things."""
    lines = []
    for effect in effects:
        match effect:
            case Apply():
                lines.append(f"apply {effect.version}: {' '.join(c.worker for c in effect.contributions)}".rstrip(": "))
            case Release():
                what = "pull" if effect.step is None else f"step {effect.step}"
                lines.append(f"release {effect.worker} {what}{'' if effect.applied else ' dropped'}")
            case Wait():
                lines.append(f"wait {effect.worker}")
            case Discard():
                lines.append(f"discard {effect.worker} {effect.step}")
            case Evict():
                lines.append(f"evict {effect.worker} {effect.session}")
            case _:
                lines.append(type(effect).__name__.lower())
    return lines


def why(core: Shard, worker: str, session: int = 1) -> tuple[tuple[str, ...], str]:
    """Whom the one answer waits for that is held back from a worker, and the same as a sentence."""
    (hold,) = core.holds(worker, session)
    return hold.waiting_for, hold.reason


def trace(thing: Any) -> Any:
    """Everything an object is made of, as plain data: two traces are equal iff nothing has changed."""
    if isinstance(thing, dict):
        return [(trace(k), trace(v)) for k, v in thing.items()]
    if isinstance(thing, list | tuple):
        return [trace(t) for t in thing]
    if isinstance(thing, set | frozenset):
        return sorted(thing)
    if hasattr(thing, "__dict__"):
        return type(thing).__name__, trace(vars(thing))
    if hasattr(thing, "__slots__"):
        return type(thing).__name__, [(name, trace(getattr(thing, name))) for name in thing.__slots__]
    return thing
