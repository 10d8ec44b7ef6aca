"""Effects: what the core tells the shell to do. Frozen values, obeyed in the order in which they are returned.

The rules for the shell are in the docstring of ``torch_ps.ps.core``.

    push --> Apply ............ Release(applied=True)       counted now
         --> Wait ...> Apply .. Release(applied=True)       counted when the others have come
         --> Discard .......... Release(applied=True)       a repeat of something that was applied before
         --> Discard .......... Release(applied=False)      late or too old: dropped
         --> Wait ...> Discard, Evict                       its session left the roster meanwhile

Source: the events of h11 and the ``Ready`` of etcd's raft, which their callers carry out in the same way.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch_ps.ps.core.roster import Roster


@dataclass(frozen=True, slots=True)
class Contribution:
    """One push inside an ``Apply``. With the bucket it names the payload that is held.

    Attributes:
        step: the worker's step, counted from 0.
        weight: finite, >= 0; usually the number of samples.
        staleness: version at apply - base, >= 0.
    """

    worker: str
    session: int
    step: int
    weight: float
    staleness: int


#: Names one update over all buckets and shards: (worker, session, step) of a push that is applied alone, or ("", 0,
#: step) of a synchronous step.
UpdateKey = tuple[str, int, int]


@dataclass(frozen=True, slots=True)
class Apply:
    """One optimizer step on one bucket.

    Attributes:
        version: version of the bucket after this step; exactly one more than before.
        contributions: pushes in rank order. Where their weights sum to 0, or nobody was left to make the step, the
            values of the bucket stay as they are and only the version advances.
        lr_scale: factor on the learning rate of this step, > 0 and <= 1.
        group: the update that this bucket is a part of. An update of one worker may stay incomplete when that worker
            leaves; any other becomes complete.
        record: the bucket's ledger right after this step, for a checkpoint; None where this version is no cut.
        progress: what is new in it for a standby, with the samples on the lead's first bucket; None without a standby.
    """

    bucket: int
    version: int
    contributions: tuple[Contribution, ...]
    reason: str
    lr_scale: float = 1.0
    group: UpdateKey = field(default=("", 0, 0), compare=False, kw_only=True)
    record: dict[str, Any] | None = field(default=None, compare=False, kw_only=True)
    progress: dict[str, Any] | None = field(default=None, compare=False, kw_only=True)


@dataclass(frozen=True, slots=True)
class Release:
    """Answer one push or pull with fresh parameters.

    Attributes:
        worker: name of the worker; None is an observer, whose ``session`` is the number that it came with.
        step: step of the push that is answered; None answers a pull.
        version: version of the parameters that go out.
        next_step: step that this worker pushes next on this bucket, whatever the mode.
        staleness: version at apply - base of the push that is answered; 0 for a pull.
        samples: sum of the weights that this bucket has absorbed, over the whole job.
        applied: whether the gradient is used; False where the push came late or was too old.
        contributors: workers whose gradients made ``version``, in rank order.
        stable: whether ``version`` stays the newest until this worker has pushed; then it may read the parameters in
            place.
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
    """The answer to a push is held back, or with ``step`` None to a pull. ``Shard.holds`` says for whom it waits."""

    worker: str
    session: int
    bucket: int
    step: int | None


@dataclass(frozen=True, slots=True)
class Discard:
    """Forget the payload of this push: it will not be applied, or has been applied before."""

    worker: str
    session: int
    bucket: int
    step: int
    reason: str


@dataclass(frozen=True, slots=True)
class Evict:
    """End the streams of this session, if there are any, with ``UnknownWorker(reason)``: it has left the roster."""

    worker: str
    session: int
    reason: str


@dataclass(frozen=True, slots=True)
class Announce:
    """Hand the lead's new roster to its own shard first, then to the other shards."""

    roster: Roster
    reason: str


Effect = Apply | Release | Wait | Discard | Evict | Announce
Effects = tuple[Effect, ...]
