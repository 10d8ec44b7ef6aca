"""Shard: the machine of one server. It admits calls, parks those that are ahead of their roster, and asks the policies.

Rules of this file
  1. What all modes share is here: who may push, which roster a push speaks of, what is parked until that roster comes.
     When a push is applied and answered is decided by the policy of its bucket.
  2. Check everything, then change something: a refused call leaves no trace.
  3. Parked calls are bounded: one push and one pull per session and bucket. While a push is parked no other push of
     its session and bucket is taken, whatever roster that one speaks of; a repeat changes nothing. A repeat of a push
     that was taken is not parked: what is parked has a payload of its own.
  4. The call that decides a push of the lead's first bucket settles the samples that the push covers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch_ps.common.errors import ProtocolError, StepConflict, UnknownWorker
from torch_ps.common.lowest import Lowest
from torch_ps.ps.core.consistent_cut import Cut, Sections
from torch_ps.ps.core.dataset_progress import DatasetSpec
from torch_ps.ps.core.effects import Apply, Discard, Effect, Effects, Evict, Wait
from torch_ps.ps.core.mean_norms import MeanNorms, NormAnswer, NormQuestion
from torch_ps.ps.core.modes import Mode
from torch_ps.ps.core.policy import Hold, Policy, Push
from torch_ps.ps.core.roster import Member, Roster
from torch_ps.ps.core.sample_assigner import Idle, Later, SampleAssigner, SampleRequest, SampleResponse


@dataclass(frozen=True, slots=True)
class MemberView:
    """One member as this shard sees it.

    Attributes:
        clock: step that it pushes next, on the bucket where it is farthest behind.
        hold: answer that it has waited for longest; None where it does not wait.
    """

    worker: str
    session: int
    rank: int
    clock: int
    hold: Hold | None


@dataclass(frozen=True, slots=True)
class CoreView:
    """One look at a shard, as plain data for ``ps-status``."""

    epoch: int
    open: bool
    open_step: int
    versions: tuple[int, ...]
    workers: tuple[MemberView, ...]


@dataclass(frozen=True, slots=True)
class _Parked:
    """A push, or a pull where ``push`` is None, that speaks of a roster which has not come yet."""

    push: Push | None
    since: float


class Shard:
    """The machine of one server.

    Args:
        buckets: number of buckets of this shard, >= 0; the lead has at least one. They are numbered from 0.
        mode: mode of the job, the same on every shard.
        sections: further state of this process that belongs to a cut; None is no such state.
        data: assigner of samples, on the lead; None elsewhere.
    """

    def __init__(
        self, *, buckets: int, mode: Mode, sections: Sections | None = None, data: SampleAssigner | None = None
    ) -> None:
        self.roster = Roster()
        self.cut = Cut(buckets, sections)
        self._data = data
        self._policies = [mode.policy(b) for b in range(buckets)]
        for policy in self._policies:
            policy.ledger.cut = self.cut
        self._clocks = self._read_clocks()
        self._members: dict[str, Member] = {}
        self._parked: dict[tuple[str, int, int, bool], _Parked] = {}  # (worker, session, bucket, is a push)
        self._pushed: dict[tuple[str, int], tuple[int, float]] = {}  # last step, and its largest weight
        self._stale = mode.stale
        self._norms = None if mode.stale else MeanNorms(backups=mode.backup_workers)

    @property
    def open_step(self) -> int:
        """Smallest version of a bucket. In mode sync this is the step that is open."""
        return min(self.versions, default=0)

    @property
    def clock(self) -> int:
        """Number of steps that every member has finished here. The lead counts first steps from its own."""
        return self._clocks.value

    def _read_clocks(self) -> Lowest:
        return Lowest(policy.clock for policy in self._policies)

    def next_step(self, worker: str) -> int:
        """Step of the next push of a member to the first bucket of this shard; for "", the version of that bucket.

        Raises:
            UnknownWorker: there is no member of this name.
        """
        if not self._policies:
            return 0
        if not worker:
            return self._policies[0].ledger.version
        return self._policies[0].next_step(self.roster.members[self.roster.rank_of(worker)])

    @property
    def samples(self) -> float:
        """Sum of the weights that the first bucket has absorbed."""
        return self._policies[0].ledger.samples if self._policies else 0.0

    @property
    def versions(self) -> tuple[int, ...]:
        return tuple([p.ledger.version for p in self._policies])

    @property
    def begun(self) -> bool:
        """Whether a push has been applied. Versions alone do not say so, as a step may close empty."""
        return any(p.ledger.num_pushes for p in self._policies)

    def records(self) -> list[dict[str, Any]]:
        """The ledger of each bucket in order, see ``Ledger.as_dict``."""
        return [policy.ledger.as_dict() for policy in self._policies]

    def replicate(self, bucket: int) -> dict[str, Any]:
        """Have every ``Apply`` of this bucket say what is new in its ledger, and return the ledger of now."""
        return self._policies[bucket].ledger.replicate()

    def data(self, *, whole: bool) -> dict[str, Any] | None:
        """The assigner of samples, or what has changed in it, as plain data for a standby; None on other shards."""
        if self._data is None:
            return None
        return self._data.hand_over() if whole else self._data.changes()

    def replicate_none(self) -> None:
        """Stop ``replicate``: there is no standby any more."""
        for policy in self._policies:
            policy.ledger.replicate_none()
        if self._data is not None:
            self._data.track_none()

    def restore(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Go on from the records of a cut, one per bucket in order; before the first roster.

        Raises:
            KeyError, TypeError, ValueError: a record is not what an ``Apply`` carries.
        """
        for policy, record in zip(self._policies, records, strict=True):
            policy.ledger.restore(record)
        self._clocks = self._read_clocks()

    def set_roster(self, roster: Roster) -> Effects:
        """Follow the lead to a new roster. A roster that is not newer changes nothing."""
        if roster.epoch <= self.roster.epoch:
            return ()
        self.cut.plan(roster.cut, max(self.versions, default=0))
        before, self.roster = self.roster, roster
        self._members = {m.name: m for m in roster.members}
        effects: list[Effect] = []
        for policy in self._policies:
            effects += policy.set_roster(roster)
        self._clocks = self._read_clocks()
        gone = {(m.name, m.session) for m in before.members if not self._is_member(m.name, m.session)}
        self._pushed = {key: last for key, last in self._pushed.items() if self._is_member(*key)}
        for key, parked in list(self._parked.items()):
            worker, session, bucket, _ = key
            push = parked.push
            if (session if push is None else _needs(push)) > roster.epoch:
                continue
            del self._parked[key]
            if self._is_member(worker, session):
                policy = self._policies[bucket]
                if push is None:
                    effects += policy.pull(self._members[worker], parked.since)
                else:
                    effects += self._count_push(policy, push, parked.since)
                continue
            gone.add((worker, session))
            if push is not None:
                effects.append(Discard(worker, session, bucket, push.step, self._unknown(worker, session)))
        effects += [Evict(w, s, self._unknown(w, s)) for w, s in sorted(gone)]
        settled = self._settled(tuple(effects))
        if self._data is not None:
            self._data.keep({(m.name, m.session) for m in roster.members})
        return settled

    def push(self, push: Push, now: float = 0.0) -> Effects:
        """Take one gradient.

        Raises:
            UnknownWorker: (worker, session) is not in the roster; join again.
            StepConflict: the step or the base does not fit this bucket.
            ProtocolError: a number out of its range.
        """
        policy = self._policy(push.bucket)
        if not (math.isfinite(push.weight) and push.weight >= 0):
            raise ProtocolError(f"weight of worker {push.worker!r} must be finite and >= 0; got {push.weight}")
        if push.step < 0 or push.base < 0:
            raise ProtocolError(
                f"step and base of worker {push.worker!r} must be >= 0; got {push.step} and {push.base}"
            )
        self._admit(push.worker, push.session)
        policy.check(push)
        data = self._data if push.bucket == 0 else None
        if data is not None and push.covers:
            data.check(push.worker, push.session, push.covers)
        key = (push.worker, push.session, push.bucket, True)
        parked = self._parked.get(key)
        first = push if parked is None or parked.push is None else parked.push
        if first.step != push.step:
            raise StepConflict(
                f"worker {push.worker!r} pushed step {push.step} of bucket {push.bucket} while its step "
                f"{first.step} waits for roster epoch {_needs(first)}"
            )
        if parked is None and (_needs(push) <= self.roster.epoch or policy.taken(push)):
            if data is not None and push.covers:
                data.claim(push.worker, push.session, push.step, push.covers)
            return self._settled(self._count_push(policy, push, now))
        self._parked.setdefault(key, _Parked(push, now))
        return (Wait(push.worker, push.session, push.bucket, push.step),)

    def pull(self, worker: str | None, session: int, bucket: int, now: float = 0.0) -> Effects:
        """Ask for parameters. An observer, ``worker`` None, is answered at once and gets its ``session`` back.

        Raises:
            UnknownWorker: (worker, session) is not in the roster; join again.
            ProtocolError: no such bucket.
        """
        policy = self._policy(bucket)
        if worker is None:
            version = policy.ledger.version
            return (policy.ledger.answer(None, session, None, next_step=version, reason="an observer looks on"),)
        self._admit(worker, session)
        if session <= self.roster.epoch:
            return policy.pull(self._members[worker], now)
        self._parked.setdefault((worker, session, bucket, False), _Parked(None, now))
        return (Wait(worker, session, bucket, None),)

    def ask_norm(self, question: NormQuestion, now: float = 0.0) -> tuple[NormAnswer, ...]:
        """Ask for the norm of a step's mean gradient; returns the answers that are due, see ``mean_norms.py``.

        Raises:
            UnknownWorker: (worker, session) is not in the roster; join again.
            StepConflict: the step is ahead of the open one.
            ProtocolError: a number out of its range, or this mode averages no gradients.
        """
        if self._norms is None:
            raise ProtocolError(
                f"worker {question.worker!r} asks for the norm of a mean, and this job applies each push by itself"
            )
        return self._norms.ask(question, self, now)

    @property
    def norms_waiting(self) -> bool:
        """Whether a worker waits for a norm."""
        return self._norms is not None and bool(self._norms.waiting)

    def norms_due(self) -> tuple[NormAnswer, ...]:
        """Answers that are due after pushes or a new roster."""
        return self._norms.due(self) if self._norms is not None and self._norms.waiting else ()

    def request_samples(self, ask: SampleRequest) -> SampleResponse:
        """Give samples to a worker, on the lead.

        Raises:
            UnknownWorker: (worker, session) is not in the roster; join again.
            ProtocolError: a number out of its range, or this is not the lead.
        """
        answer = self._lead_data(ask.worker, ask.session).ask(ask, self.roster, self.clock)
        if isinstance(answer, Later) and any(self._waits_in_step_for(ask.worker, name) for name in answer.waiting_for):
            return Idle(answer.waiting_for, answer.reason)
        return answer

    def _waits_in_step_for(self, worker: str, name: str) -> bool:
        """Whether ``name`` cannot ask for samples before ``worker`` pushes a step that it has not pushed."""
        step = self.next_step(worker)
        return (
            not self._stale and self.pushed_weight(worker, step) is None and self.pushed_weight(name, step) is not None
        )

    def return_samples(self, worker: str, session: int, data: DatasetSpec, received: int) -> None:
        """Free the samples of a worker that stops reading, but the ``received`` ones, on the lead.

        Raises:
            UnknownWorker: (worker, session) is not in the roster.
            ProtocolError: this is not the lead.
        """
        self._lead_data(worker, session).give_back(worker, session, data, received)

    def _lead_data(self, worker: str, session: int) -> SampleAssigner:
        if self._data is None:
            raise ProtocolError("this shard gives out no data; ask the lead, shard 0")
        if not self._is_member(worker, session):
            raise UnknownWorker(self._unknown(worker, session))
        return self._data

    def disconnected(self, worker: str, session: int) -> Effects:
        """Forget the answers held for a session whose stream broke; its pushes of open steps stay valid.

        A parked push was not counted yet: it is discarded, and the worker repeats it on its next stream. Call this
        before anything that arrives on that stream.
        """
        for policy in self._policies:
            policy.disconnected(worker, session)
        if self._norms is not None:
            self._norms.disconnected(worker, session)
        effects: list[Effect] = []
        for key, parked in list(self._parked.items()):
            if key[:2] == (worker, session):
                del self._parked[key]
                if parked.push is not None:
                    reason = f"the stream of {worker} broke before roster epoch {_needs(parked.push)} came"
                    effects.append(Discard(worker, session, key[2], parked.push.step, reason))
        return tuple(effects)

    def pushed_weight(self, worker: str, step: int) -> float | None:
        """Largest weight of a member's pushes of this step, or of the later one that it has reached; None: no push."""
        member = self._members.get(worker)
        last, weight = self._pushed.get(member.key, (-1, 0.0)) if member is not None else (-1, 0.0)
        return weight if last >= step else None

    def holds(self, worker: str, session: int) -> tuple[Hold, ...]:
        """Every answer that is held back from this session, the longest first."""
        return tuple(h for h in self._holds() if (h.worker, h.session) == (worker, session))

    def status(self) -> CoreView:
        """One look at this shard."""
        oldest: dict[tuple[str, int], Hold] = {}
        for hold in self._holds():
            oldest.setdefault((hold.worker, hold.session), hold)
        workers = tuple(
            MemberView(
                m.name,
                m.session,
                rank,
                min((p.next_step(m) for p in self._policies), default=m.first_step),
                oldest.get((m.name, m.session)),
            )
            for rank, m in enumerate(self.roster.members)
        )
        return CoreView(self.roster.epoch, self.roster.open, self.open_step, self.versions, workers)

    def _holds(self) -> list[Hold]:
        holds = [hold for policy in self._policies for hold in policy.holds()]
        holds += self._norms.holds(self) if self._norms is not None else ()
        for (worker, session, bucket, _), parked in self._parked.items():
            step, needs = (None, session) if parked.push is None else (parked.push.step, _needs(parked.push))
            holds.append(Hold(worker, session, bucket, step, parked.since, (), self._behind(needs)))
        return sorted(holds, key=lambda h: h.since)

    def _settled(self, effects: Effects) -> Effects:
        """Settle the samples of every push of the first bucket that these effects decide."""
        data = self._data
        if data is None:
            return effects
        for effect in effects:
            match effect:
                case Apply(bucket=0):
                    for c in effect.contributions if data.claims else ():
                        data.settle(c.worker, c.session, c.step, applied=True)
                    if effect.record is not None:
                        self.cut.note("data", data.export())
                    if effect.progress is not None:
                        effect.progress["data"] = data.changes()
                case Discard(bucket=0):
                    data.settle(effect.worker, effect.session, effect.step, applied=False)
        return effects

    def _count_push(self, policy: Policy, push: Push, now: float) -> Effects:
        self._note_pushed(push)
        effects = policy.push(push, self._members[push.worker], now)
        self._clocks[push.bucket] = policy.clock
        return effects

    def _note_pushed(self, push: Push) -> None:
        key = push.worker, push.session
        step, weight = self._pushed.get(key, (-1, 0.0))
        if push.step >= step:
            self._pushed[key] = push.step, max(push.weight, weight if push.step == step else 0.0)

    def _policy(self, bucket: int) -> Policy:
        if not 0 <= bucket < len(self._policies):
            raise ProtocolError(f"bucket must be in [0, {len(self._policies)}); got {bucket}")
        return self._policies[bucket]

    def _admit(self, worker: str, session: int) -> None:
        """Refuse a session that is not a member, unless its roster may still come."""
        if session <= self.roster.epoch and not self._is_member(worker, session):
            raise UnknownWorker(self._unknown(worker, session))

    def _is_member(self, worker: str, session: int) -> bool:
        member = self._members.get(worker)
        return member is not None and member.session == session

    def _unknown(self, worker: str, session: int) -> str:
        return f"session {session} of worker {worker!r} is not in roster epoch {self.roster.epoch}; join again"

    def _behind(self, epoch: int) -> str:
        return f"roster epoch {epoch} has not come from the lead yet; epoch {self.roster.epoch} is known"


def _needs(push: Push) -> int:
    """Oldest roster epoch that can judge this push."""
    return max(push.epoch, push.session)
