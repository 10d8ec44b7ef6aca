"""What the core tells the shell to do: frozen facts, obeyed in the order returned.

Rules for the shell
  1. Hold the payload of a push that the core took (did not refuse) under (worker, session, bucket, step) before
     obeying the effects; if one is held already (a repeat), keep the first.
  2. ``Apply`` takes the payloads of its contributions out of hold at once, when it is queued, not when it runs. Every
     payload ends in exactly one ``Apply`` or ``Discard``.
  3. Per bucket, ``Apply`` and ``Release`` run in FIFO order, so an answer carries at least the version it names. The
     core decides ahead of the work and never hears when an ``Apply`` ended.
  4. Every answer on the wire is stamped with the shard's newest roster epoch; workers send back the newest they saw.

    push --> Apply ............ Release(applied=True)       counted now
         --> Wait ...> Apply .. Release(applied=True)       counted when the others have come
         --> Discard .......... Release(applied=True)       a repeat of something that was applied before
         --> Discard .......... Release(applied=False)      late or too old: dropped
         --> Wait ...> Discard, Evict                       its session left the roster meanwhile

Source: the effect style is that of h11's events and of etcd raft's Ready().
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch_ps.ps.core.roster import Roster


@dataclass(frozen=True, slots=True)
class Contribution:
    """One push inside an ``Apply``; names the held payload together with the bucket."""

    worker: str
    session: int
    step: int
    weight: float
    staleness: int


#: (worker, session, step) of the one push, or ("", 0, step) of a step of all, whose buckets form one update.
Group = tuple[str, int, int]


@dataclass(frozen=True, slots=True)
class Apply:
    """One optimizer step on one bucket.

    Attributes:
        version: of the bucket after this step; exactly one more than before.
        contributions: in rank order. Where their weights sum to 0 (or there are none: a step that nobody was left to
            make) the bucket's values stay as they are and only the version advances.
        lr_scale: factor on the learning rate of this step, > 0 and <= 1.
        group: which Applies, of all buckets and shards, form one update. A group of one worker may stay incomplete when
            that worker leaves; any other becomes complete.
        record: what a checkpoint keeps of the bucket's progress right after this step; None: this version is no cut.
        progress: the same for a standby, on the lead's first bucket with the samples; None: there is none.
    """

    bucket: int
    version: int
    contributions: tuple[Contribution, ...]
    reason: str
    lr_scale: float = 1.0
    group: Group = field(default=("", 0, 0), compare=False, kw_only=True)
    record: dict[str, Any] | None = field(default=None, compare=False, kw_only=True)
    progress: dict[str, Any] | None = field(default=None, compare=False, kw_only=True)


@dataclass(frozen=True, slots=True)
class Release:
    """Answer one push or pull with fresh parameters.

    Attributes:
        worker: None for an observer; ``session`` is then the number it came with, to tell observers apart.
        step: the push that is answered; None answers a pull.
        version: of the parameters that go out.
        next_step: the step that this worker pushes next on this bucket, whatever the mode.
        staleness: version at apply - base, of the push that is answered; 0 for a pull.
        samples: sum of the weights that this bucket has absorbed so far, over the whole job.
        applied: False: the push came late or was too old and was dropped.
        contributors: workers whose gradients made ``version``, in rank order.
        stable: ``version`` stays the newest until this worker has pushed, so it may read the parameters where they are.
    """

    worker: str | None
    session: int
    bucket: int
    step: int | None
    version: int
    next_step: int
    staleness: int
    samples: float
    applied: bool
    contributors: tuple[str, ...]
    reason: str
    stable: bool = False


@dataclass(frozen=True, slots=True)
class Wait:
    """The answer to a push (or, with step None, a pull) is held back; ``waiting_for`` names workers in rank order."""

    worker: str
    session: int
    bucket: int
    step: int | None
    waiting_for: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class Discard:
    """Forget the payload held for this push; it is not and will not be applied (again)."""

    worker: str
    session: int
    bucket: int
    step: int
    reason: str


@dataclass(frozen=True, slots=True)
class Evict:
    """This session is no longer in the roster: close its streams with ``UnknownWorker(reason)``, if any are open."""

    worker: str
    session: int
    reason: str


@dataclass(frozen=True, slots=True)
class Announce:
    """The lead has a new roster: hand it to its own shard first, then to everyone who watches."""

    roster: Roster
    reason: str


Effect = Apply | Release | Wait | Discard | Evict | Announce
Effects = tuple[Effect, ...]
