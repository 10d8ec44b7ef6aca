"""Mean norms: when the norm of a step's mean gradient can be computed, and from whose gradients.

A worker that clips by that norm asks for it before it pushes the step. Nothing is applied or kept: the gradients of the
question are measured, and the step goes on as if nobody had asked.

    ask(step 4) of a --> waits for b;  ask(step 4) of b ---> both are answered: norm of the mean of a and b
    ask(step 4) of a --> waits for b;  push(step 4) of b --> a is answered: b is not in the mean, which a hears

Rules of this file
  1. A question names its step and its round: how many norms of that step this worker has had. A loop that drops a
     gradient after it was measured asks again for the same step, in the next round.
  2. A round is decided once, when every worker that its step requires has asked, has pushed the step, or asks for a
     later round. It needs an open roster. Backup workers may be missing, but not everybody.
  3. Each worker of a decided round gets the same answer, whenever it asks and however often. A single gradient is not
     measured, so whoever asks late in a round of one worker is answered alone.
  4. A worker that is late, or not in the step yet, is answered alone: its push will not count, so it waits for nobody.
  5. A question ends with its stream, as its worker may change the gradient from then on; it asks again on the next.

Source: ``torch.distributed.fsdp.FullyShardedDataParallel.clip_grad_norm_``, which is collective in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch_ps.common.errors import ProtocolError, StepConflict, UnknownWorker
from torch_ps.ps.core.policy import Hold, name_list
from torch_ps.ps.core.roster import Roster

#: Step and round of a question.
RoundKey = tuple[int, int]


@dataclass(frozen=True, slots=True)
class NormQuestion:
    """One worker's question for the norm of a step's mean gradient.

    Attributes:
        round: number of norms of this step that the worker has had, >= 0.
        power: type of the norm, > 0; inf for the largest absolute value.
        weight: weight of its gradient in the mean, finite and >= 0.
        epoch: newest roster epoch that the worker has seen.
    """

    worker: str
    session: int
    step: int
    round: int
    power: float
    weight: float
    epoch: int

    @property
    def key(self) -> RoundKey:
        return self.step, self.round


@dataclass(frozen=True, slots=True)
class NormAnswer:
    """Answer one worker.

    Attributes:
        asked: questions whose gradients are in the mean, in rank order; only the worker's own if it is answered alone.
        without: workers whose gradients the step has and the mean has not, as they have pushed without asking.
    """

    worker: str
    session: int
    key: RoundKey
    asked: tuple[NormQuestion, ...]
    without: tuple[str, ...]


class StepView(Protocol):
    """What a shard knows of its steps."""

    roster: Roster

    @property
    def versions(self) -> tuple[int, ...]:
        """Version of each bucket."""

    def pushed_weight(self, worker: str, step: int) -> float | None:
        """Largest weight of a worker's pushes of this step, or of the later one that it has reached; None: no push."""


@dataclass(frozen=True, slots=True)
class _Decided:
    asked: tuple[NormQuestion, ...]
    without: tuple[str, ...]


class MeanNorms:
    """The questions of one shard, which each call gets. After a call that changes the shard, ask for what is ``due``.

    Args:
        backups: number of workers that a step does not wait for, >= 0.

    Attributes:
        waiting: the question of each worker that waits for an answer, and since when.
    """

    def __init__(self, *, backups: int) -> None:
        self._backups = backups
        self.waiting: dict[str, tuple[NormQuestion, float]] = {}
        self._decided: dict[RoundKey, _Decided] = {}

    def ask(self, question: NormQuestion, shard: StepView, now: float) -> tuple[NormAnswer, ...]:
        """Take a question, which replaces an earlier one of its worker; returns the answers that are due.

        Raises:
            UnknownWorker: (worker, session) is not in the roster; join again.
            StepConflict: the step is ahead of the open one.
            ProtocolError: a number out of its range, or another worker asks for another norm in this round.
        """
        worker, session = question.worker, question.session
        if not question.power > 0:
            raise ProtocolError(f"worker {worker!r} asks for a norm of type {question.power:g}; it has to be > 0")
        if not (math.isfinite(question.weight) and question.weight >= 0):
            raise ProtocolError(f"weight of worker {worker!r} must be finite and >= 0; got {question.weight}")
        if session <= shard.roster.epoch and not _is_member(question, shard):
            raise UnknownWorker(
                f"session {session} of worker {worker!r} is not in roster epoch {shard.roster.epoch}; join again"
            )
        open_step = min(shard.versions, default=0)
        if question.step > open_step:
            raise StepConflict(f"worker {worker!r} asks for the norm of step {question.step}; step {open_step} is open")
        for other, _ in self.waiting.values():
            if other.worker != worker and other.key == question.key and other.power != question.power:
                raise ProtocolError(
                    f"worker {worker!r} asks for the norm of type {question.power:g} of step {question.step}, worker "
                    f"{other.worker!r} for that of type {other.power:g}; all have to clip by the same norm"
                )
        self.waiting[worker] = question, now
        return self.due(shard)

    def due(self, shard: StepView) -> tuple[NormAnswer, ...]:
        """The answers that can be given now; the questions that they answer are forgotten."""
        roster = shard.roster
        for question, _ in list(self.waiting.values()):
            if question.session <= roster.epoch and not _is_member(question, shard):
                del self.waiting[question.worker]
        open_step = min(shard.versions, default=0)
        self._decided = {key: decided for key, decided in self._decided.items() if key[0] >= open_step}
        for key in sorted({question.key for question, _ in self.waiting.values()} - set(self._decided)):
            self._decide(key, shard)
        last = max((turn for _, turn in self._decided), default=0)
        # Nobody can still miss an answer of a round before the last one: all have asked in the next one since.
        self._decided = {key: decided for key, decided in self._decided.items() if key[1] >= last - 1}
        answers = []
        for question, _ in list(self.waiting.values()):
            if _needs(question) > roster.epoch:
                continue
            decided = self._decided.get(question.key)
            late = decided is not None and len(decided.asked) == 1 and decided.asked[0].worker != question.worker
            if late or (decided is None and not _takes_part(question, shard)):
                decided = _Decided((question,), ())
            if decided is not None:
                del self.waiting[question.worker]
                worker, session = question.worker, question.session
                answers.append(NormAnswer(worker, session, question.key, decided.asked, decided.without))
        return tuple(answers)

    def disconnected(self, worker: str, session: int) -> None:
        """Forget the question of a session whose stream broke."""
        held = self.waiting.get(worker)
        if held is not None and held[0].session == session:
            del self.waiting[worker]

    def holds(self, shard: StepView) -> tuple[Hold, ...]:
        """Every answer that is held back."""
        holds = []
        for question, since in self.waiting.values():
            step, missing = question.step, self._missing(question.key, shard)
            whom = name_list(tuple(missing)) if missing else "the first quorum"
            reason = f"the norm of step {step} waits for {whom}"
            holds.append(Hold(question.worker, question.session, 0, step, since, tuple(missing), reason))
        return tuple(holds)

    def _decide(self, key: RoundKey, shard: StepView) -> None:
        """Decide a round if it can be."""
        roster, (step, _) = shard.roster, key
        required = roster.required(step)
        spare = min(self._backups, max(len(required) - 1, 0))
        asked = [self.waiting[worker][0] for worker in required if self._asks(worker, key, shard)]
        if not (roster.open and asked) or step < max(shard.versions) or len(self._missing(key, shard)) > spare:
            return
        names = {question.worker for question in asked}
        without = tuple(w for w in required if w not in names and shard.pushed_weight(w, step))
        self._decided[key] = _Decided(tuple(asked), without)

    def _missing(self, key: RoundKey, shard: StepView) -> Sequence[str]:
        """Workers that the round still waits for, in rank order."""
        required = shard.roster.required(key[0])
        return [w for w in required if not self._asks(w, key, shard) and not self._has_gone_on(w, key, shard)]

    def _asks(self, worker: str, key: RoundKey, shard: StepView) -> bool:
        held = self.waiting.get(worker)
        return held is not None and held[0].key == key and _needs(held[0]) <= shard.roster.epoch

    def _has_gone_on(self, worker: str, key: RoundKey, shard: StepView) -> bool:
        """Whether a worker will not ask in this round any more."""
        held = self.waiting.get(worker)
        return shard.pushed_weight(worker, key[0]) is not None or (held is not None and held[0].key > key)


def _takes_part(question: NormQuestion, shard: StepView) -> bool:
    """Whether the push of this step can count."""
    in_time = question.step >= max(shard.versions)
    return in_time and question.worker in shard.roster.required(question.step)


def _is_member(question: NormQuestion, shard: StepView) -> bool:
    member = shard.roster.member(question.worker)
    return member is not None and member.session == question.session


def _needs(question: NormQuestion) -> int:
    """Oldest roster epoch that can judge this question."""
    return max(question.epoch, question.session)
