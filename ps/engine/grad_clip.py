"""--clip-norm: clips the mean gradient of one update by its norm over all buckets of all shards.

The core gives each ``Apply`` the *group* of Applies that form one update. A shard computes the mean and squared norm of
a bucket when the core decides its Apply, not when its lane reaches it: two asynchronous pushes may stand in different
orders on different lanes, and lanes that waited for each other's norms in their own order would deadlock.

    Apply --> mean, |mean|^2 (apply thread) --> all buckets of this shard --> the lead --> all shards --+
    lane, in its order: optimizer step with mean x coefficient <-- coefficient <-- |all means|^2 -------+

Rules of this file
  1. The lead decides each group once, and every shard follows. A repeated report gets the same reply.
  2. The lead collects what can be: groups of members and of all, at a step near the one that comes next. So what it
     holds is bounded by the workers, whatever a shard reports.
  3. A group of a worker that left the roster before all its buckets arrived can never be complete. It is dropped: its
     buckets keep their values and only their versions advance. No response shows that, as the worker is gone. Every
     other group becomes complete: a synchronous step closes on all buckets, if necessary without those who left.
  4. Squares are summed in float64 and the coefficient is rounded to fp32 once, so its bits do not depend on the number
     of shards (except for a tie in the last of 53 bits, about one in ten million steps).

Memory: one copy of the model for each update whose norm is pending: its means.

Source: Pascanu et al., ICML 2013, arXiv:1211.5063; ``torch.nn.utils.clip_grad_norm_`` for the coefficient.
"""

import asyncio
import math
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace

import torch

from torch_ps.common.errors import ProtocolError
from torch_ps.common.optimizer_spec import Hyper
from torch_ps.common.plan import Plan
from torch_ps.common.wire.field_ranges import MAX_SQUARE
from torch_ps.ps.core.effects import Apply, UpdateKey
from torch_ps.ps.core.roster import Roster
from torch_ps.ps.engine.parameter_store import Gradient, Mean, NonFinite, Store
from torch_ps.ps.engine.written_weights import PushedWrites

#: Added to the norm, as in torch.
EPSILON = 1e-6
#: Number of decided norms that the lead keeps for repeated reports.
REMEMBERED = 4096
#: Steps around the next one of its worker in which the lead collects a group; shards are one step apart.
WINDOW = 16

#: Reports a shard's squared norm of a group to the lead; returns that of all shards, None: the group is dropped.
RequestNorm = Callable[[UpdateKey, float], Awaitable[float | None]]

#: Gives the step that a member, or for "" the job, comes to next.
NextStep = Callable[[str], int]

#: Called with a group, its squared norm (None: dropped) and a function that replies to the shards.
BeforeAnswer = Callable[[UpdateKey, float | None, Callable[[], None]], None]


@dataclass(eq=False, slots=True)
class Update:
    """One bucket's part of a group, a job of its lane.

    Attributes:
        mean: Mean gradient; None: no gradient counts.
        left_out: Gradients that are not finite.
        coefficient: Factor on the mean, in [0, 1]; with 0 there is no step, None: still unknown.
        written: Weights that the loops of its workers have written; none if the update is dropped.
    """

    bucket: int
    apply: Apply
    hyper: Hyper
    mean: Mean | None = None
    left_out: list[NonFinite] = field(default_factory=list)
    coefficient: float | None = None
    written: tuple[PushedWrites, ...] = ()


@dataclass(slots=True)
class _Group:
    updates: list[Update] = field(default_factory=list)
    squares: list[float] = field(default_factory=list)


class GradientClipper:
    """A shard's side of clipping. Everything but ``_measure`` runs on the event loop.

    Args:
        norm: Largest norm of an update, > 0.
        num_buckets: Number of buckets of this shard that an optimizer updates.
        store: Parameters of the shard.
        executor: Apply threads.
        request_norm: Obtains the squared norm of a group over all shards.
        on_ready: Called with a bucket whose oldest update may have received its coefficient.
        on_lost: Called with an ``Apply`` whose mean could not be computed, and the exception; its bucket keeps its
            values.
        on_failure: Called with an exception that ends the shard.
    """

    def __init__(
        self,
        norm: float,
        num_buckets: int,
        store: Store,
        executor: Executor,
        request_norm: RequestNorm,
        *,
        on_ready: Callable[[int], None],
        on_lost: Callable[[Apply, Exception], None],
        on_failure: Callable[[BaseException], None],
    ) -> None:
        self._norm, self._num_buckets, self._store, self._executor = norm, num_buckets, store, executor
        self._request_norm = request_norm
        self._measured = store.beside(self._measure)
        self._on_ready, self._on_lost, self._on_failure = on_ready, on_lost, on_failure
        self._groups: dict[UpdateKey, _Group] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def add(
        self,
        bucket: int,
        apply: Apply,
        gradients: Sequence[Gradient],
        hyper: Hyper,
        written: tuple[PushedWrites, ...],
    ) -> Update:
        """Start on one bucket's ``Apply`` of a group; returns the job that waits in the lane."""
        update = Update(bucket, apply, hyper, written=written)
        self._groups.setdefault(apply.group, _Group()).updates.append(update)
        self._spawn(self._take(update, gradients))
        return update

    def set_roster(self, roster: Roster) -> None:
        """Drop the groups that can never be complete here; the lead cannot complete them either."""
        for key, group in list(self._groups.items()):
            if _gone(key, roster) and len(group.updates) < self._num_buckets:
                del self._groups[key]
                self._settle(group, None)

    async def _take(self, update: Update, gradients: Sequence[Gradient]) -> None:
        loop, key = asyncio.get_running_loop(), update.apply.group
        try:
            square = await loop.run_in_executor(self._executor, self._measured, update, gradients)
        except Exception as error:  # noqa: BLE001 - it only reads
            self._on_lost(update.apply, error)
            update.mean, square = None, 0.0
        group = self._groups.get(key)
        if group is None:
            return  # dropped by a roster
        group.squares.append(square)
        if len(group.squares) == self._num_buckets:
            del self._groups[key]
            self._settle(group, await self._request_norm(key, math.fsum(group.squares)))

    def _measure(self, update: Update, gradients: Sequence[Gradient]) -> float:
        mean, update.left_out = self._store.mean(update.bucket, gradients)
        if mean is None:
            return 0.0
        update.mean = replace(mean, values=mean.values.clone())
        return float(torch.linalg.vector_norm(mean.values, dtype=torch.float64)) ** 2

    def _settle(self, group: _Group, square: float | None) -> None:
        coefficient = 0.0 if square is None else min(1.0, self._norm / (math.sqrt(square) + EPSILON))
        for update in group.updates:
            update.coefficient = coefficient
            if square is None:
                update.written = ()
            self._on_ready(update.bucket)

    def _spawn(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._on_failure(error)


class NormCollector:
    """The lead's side of clipping: collects a group's squared norms from all shards and decides the group.

    Args:
        shards: Shards that hold buckets which an optimizer updates.
        before_answer: Called with each decision and a function that replies to the shards.
        next_step: Gives the step near which groups are collected.

    Attributes:
        answers: Squared norms by group, the last ``REMEMBERED``; None: the group was dropped.
    """

    def __init__(self, shards: Sequence[int], before_answer: BeforeAnswer, next_step: NextStep) -> None:
        self._before_answer, self._next_step = before_answer, next_step
        self._shards = frozenset(shards)
        self._roster = Roster()
        self._reported: dict[UpdateKey, dict[int, float]] = {}
        self._waiting: dict[UpdateKey, asyncio.Future[float | None]] = {}
        self.answers: OrderedDict[UpdateKey, float | None] = OrderedDict()
        self._deciding: set[UpdateKey] = set()

    async def report(self, group: UpdateKey, shard: int, square: float) -> float | None:
        """Take a shard's squared norm and wait for that of all shards; None: the group is dropped.

        Raises:
            ProtocolError: the shard holds no such bucket, ``square`` is not a squared norm, or the step is far off.
        """
        if shard not in self._shards or not 0.0 <= square <= MAX_SQUARE:
            raise ProtocolError(f"shard {shard} cannot report a squared norm of {square}")
        if group in self.answers:
            return self.answers[group]
        if group in self._deciding:
            return await asyncio.shield(self._waiting[group])
        if group not in self._reported:
            if not _gone(group, self._roster):
                self._check(group)
            elif len(self._shards) > 1:
                return None
        reported = self._reported.setdefault(group, {})
        reported[shard] = square
        waiting = self._waiting.setdefault(group, asyncio.get_running_loop().create_future())
        if len(reported) == len(self._shards):
            self._decide(group, math.fsum(reported.values()))
        return await asyncio.shield(waiting)

    def set_roster(self, roster: Roster) -> None:
        """Drop the groups of workers that left."""
        self._roster = roster
        for group in [group for group in self._reported if _gone(group, roster)]:
            self._decide(group, None)

    def _check(self, group: UpdateKey) -> None:
        worker, session, step = group
        if not worker and session:
            raise ProtocolError(f"a step of all workers has no session; got {session}")
        if abs(step - (near := self._next_step(worker))) > WINDOW:
            whose = f"worker {worker!r}" if worker else "all workers"
            raise ProtocolError(f"the norm of step {step} of {whose} is asked for, and step {near} is next")

    def _decide(self, group: UpdateKey, square: float | None) -> None:
        del self._reported[group]
        self._deciding.add(group)
        self._before_answer(group, square, lambda: self._answer(group, square))

    def _answer(self, group: UpdateKey, square: float | None) -> None:
        self._deciding.discard(group)
        self.answers[group] = square
        while len(self.answers) > REMEMBERED:
            self.answers.popitem(last=False)
        self._waiting.pop(group).set_result(square)


class Clipping:
    """--clip-norm of one shard: how it obtains norms and, on the lead, what collects them.

    Args:
        norm: Largest norm of an update; 0: no clipping.
        index: Index of the shard; 0 is the lead.
        request_norm: Requests norms from the lead; None on the lead.
        before_answer: Called on the lead with each decision and a function that replies to the shards.
    """

    def __init__(self, norm: float, index: int, request_norm: RequestNorm | None, before_answer: BeforeAnswer) -> None:
        self.norm, self._index = norm, index
        self.request_norm: RequestNorm = request_norm or self._report
        self._before_answer = before_answer
        self.norms: NormCollector | None = None  # on the lead of a job that clips

    def begin(self, plan: Plan, roster: Roster, next_step: NextStep) -> None:
        """Start to collect norms for the buckets of a model, near the steps that ``next_step`` gives."""
        if self._index == 0 and self.norm:
            shards = [bucket.shard for bucket in plan.buckets if bucket.rule == "optimizer"]
            self.norms = NormCollector(shards, self._before_answer, next_step)
            self.norms.set_roster(roster)

    def set_roster(self, roster: Roster) -> None:
        """Lead: drop the groups of workers that left."""
        if self.norms is not None:
            self.norms.set_roster(roster)

    async def report(self, group: UpdateKey, shard: int, square: float) -> float | None:
        """Lead: as ``NormCollector.report``.

        Raises:
            ProtocolError: this job does not clip, or the report is impossible.
        """
        if self.norms is None:
            raise ProtocolError(
                f"shard {self._index} collects no norms; give all shards the same --clip-norm, the lead too"
            )
        return await self.norms.report(group, shard, square)

    async def _report(self, group: UpdateKey, square: float) -> float | None:
        return await self.report(group, self._index, square)


def _gone(group: UpdateKey, roster: Roster) -> bool:
    """Whether the group belongs to one worker whose session has left the roster."""
    worker, session, _ = group
    member = roster.member(worker) if worker else None
    return bool(worker) and (member is None or member.session != session)
