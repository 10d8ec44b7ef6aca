"""One shard's part in a job: who takes part, which model is trained, and whether its parameters are there.

    lead:    Join -> seed? --yes--> Seed on every shard, the lead last --> initialised
                          --no---> waits until initialised; takes over when the seeding worker dies
    others:  Seed, and the roster from the lead

Rules of this file
  1. Decides nothing about steps: the core does. Touches no tensor: the engine does.
  2. Every wait has a deadline and says what it waits for.
"""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor
from typing import Any

import torch

from torch_ps.common import schema
from torch_ps.common.codecs.pulled_copies import Copies
from torch_ps.common.errors import NameTaken, NotInitialised, ProtocolError, PsError, Restarted, UnknownWorker
from torch_ps.common.plan import plan
from torch_ps.common.schema import Model
from torch_ps.ps.core.consistent_cut import Sections
from torch_ps.ps.core.effects import Announce, Effect, Evict
from torch_ps.ps.core.failover.elected import ElectedSeat
from torch_ps.ps.core.failover.seat import Seat
from torch_ps.ps.core.incarnation import Incarnation
from torch_ps.ps.core.membership import Membership, tick_seconds
from torch_ps.ps.core.modes import Mode
from torch_ps.ps.core.roster import Roster, parse_roster
from torch_ps.ps.core.sample_assigner import SampleAssigner
from torch_ps.ps.core.shard import Shard
from torch_ps.ps.engine.advisories import Advice
from torch_ps.ps.engine.delay_compensation import Compensator
from torch_ps.ps.engine.engine import Engine
from torch_ps.ps.engine.grad_clip import Clipping, RequestNorm
from torch_ps.ps.engine.parameter_store import CPU
from torch_ps.ps.engine.state import Kept, KeptFacts, ShardState, restore
from torch_ps.ps.job.conditions import Conditions
from torch_ps.ps.job.lead_address import LeadAddress
from torch_ps.ps.job.sample_requests import SampleRequests
from torch_ps.ps.job.seat_driver import SeatDriver
from torch_ps.ps.observability.metrics import Metrics
from torch_ps.ps.observability.trace_collector import ShardTrace
from torch_ps.ps.transport.streams import RosterQueue, Streams

log = logging.getLogger("torch_ps.ps")

#: Seconds that another shard may take to hear of a new roster from the lead.
ROSTER_DEADLINE = 20.0
#: Seconds for which it counts that a worker has asked a standby to take over; workers repeat it several times a second.
PATIENCE_SECONDS = 5.0


def elected(name: str, primary: str) -> Seat:
    """Who serves is decided by the workers."""
    return ElectedSeat(name, primary, patience=PATIENCE_SECONDS)


class Job:
    """The state of one shard between its sockets and its engine. All methods run on the event loop.

    Args:
        index, num_shards: which shard this is; 0 is the lead.
        incarnation: the start of the servers that it is of.
        max_workers: most members of the roster.
        bucket_bytes: fp32 bytes that a bucket holds at most.
        clip_norm: largest norm of an update; 0 is none.
        ask_norm: how another shard than the lead asks it for the norm of an update.
        device: that holds parameters and optimizer state.
        name: of this life of this server, see ``torch_ps.common.wire.terms``.
        primary: of the server whose standby this is.
        lead: where another shard than the lead finds it.
        trace: of the steps that are traced.
        apply_threads: of the executor.
    """

    def __init__(
        self,
        *,
        mode: Mode,
        index: int,
        num_shards: int,
        incarnation: Incarnation,
        quorum: int,
        lease: float,
        bucket_bytes: int,
        executor: Executor,
        metrics: Metrics,
        on_failure: Callable[[BaseException], None],
        max_workers: int = 256,
        clip_norm: float = 0.0,
        ask_norm: RequestNorm | None = None,
        device: torch.device = CPU,
        name: str = "server/0",
        primary: str = "",
        seat: Callable[[str, str], Seat] = elected,
        lead: LeadAddress | None = None,
        trace: ShardTrace | None = None,
        apply_threads: int = 1,
    ) -> None:
        self.mode, self.index, self.num_shards, self.incarnation = mode, index, num_shards, incarnation
        self.quorum, self.lease, self.bucket_bytes = quorum, lease, bucket_bytes
        self.clipping = Clipping(clip_norm, index, ask_norm)
        self.trace = trace or ShardTrace()
        self.metrics = metrics
        self.streams = Streams(metrics)
        self.engine: Engine | None = None
        self.initialised = False
        self.roster = Roster()
        self.lead_at = lead  # where the others find the lead; None: this is it
        started = int(1000 * time.time())
        members = Membership(quorum=quorum, lease=lease, limit=max_workers, started=started)
        self.membership = members if index == 0 else None
        self.data = SampleAssigner(mode) if index == 0 else None  # which samples are whose
        self.sample_requests = SampleRequests()
        self.started = self._ticked = time.monotonic()
        self.port = 0  # that this shard listens at, once it does
        self.watchers: set[RosterQueue] = set()
        self.advice = Advice(mode, metrics)
        self.sections = Sections()  # what else belongs to a checkpoint
        if self.membership is not None:
            self.sections.add("roster", self.membership)
        if self.data is not None:
            self.sections.add("data", self.data)
        self.on_begun: Callable[[Engine], None] = lambda engine: None
        self.on_anew: Callable[[], None] = lambda: None  # called when the engine is another one
        self.on_stop: Callable[[PsError], None] = lambda error: None  # called when all open streams end
        self.on_initialised: Callable[[], None] = lambda: None
        self.on_alone: Callable[[Restarted], None] | None = None  # called when another shard was started anew, alone
        self.seat_driver = SeatDriver(seat, name, primary, self.streams)
        self.seat_driver.on_configuration.append(lambda configuration: self._show_roster())
        self.closed = ""  # why this process does not serve: it is a standby, or another one serves
        #: Called with a roster that was decided and with what makes it take effect.
        self.before_roster: Callable[[Roster, Callable[[], None]], None] = lambda roster, then: then()
        self.on_kept: Callable[[Kept], None] = _not_kept  # lead: called with what has become of a shard's part
        self.on_missed: Callable[[int], None] = lambda version: None  # called with a version that cannot be kept here
        self.kept: KeptFacts | None = None  # how the checkpoints do
        self.lag: Callable[[], tuple[int, float]] = lambda: (0, 0.0)  # of the standby: records, seconds
        self.replicated: Callable[[], tuple[int, bool]] = lambda: (0, False)  # here, of a primary: version, all
        self.resumed_version = 0
        self.copies: dict[str, Copies] = {}  # restored, of workers that are not back yet
        self._executor, self._on_failure, self._device = executor, on_failure, device
        self.apply_threads = apply_threads
        self._conditions = Conditions(f"shard {index}")
        self._model: Model | None = None  # lead: of the worker that seeds or has seeded
        self.seeder = ("", 0)

    @property
    def lead(self) -> Membership:
        if self.membership is None:
            raise ProtocolError(f"shard {self.index} is not the lead; ask shard 0")
        return self.membership

    @property
    def model(self) -> Model | None:
        return self.engine.model if self.engine and self.initialised else None

    # -------------------------------------------------------------- membership

    async def join(self, worker: str, rank: int | None, model: Model, seconds: float) -> tuple[int, bool]:
        """Become a worker of the job. Returns its session, and whether it has to seed the parameters.

        Raises:
            ModelMismatch: the job trains another model.
            NameTaken: a connected worker has this name, or another one this rank.
            WaitTimeout: the parameters were not there within ``seconds``.
        """
        lead, deadline = self.lead, time.monotonic() + seconds
        while True:
            if self._model is not None:
                schema.check_same(self._model, model, worker)
                model = self._model if model == self._model else model  # so that many who wait hold one
            if self.initialised or self._model is None:
                break
            await self._conditions.until(
                lambda: self.initialised or self._model is None,
                deadline,
                f"worker {self.seeder[0]!r} has not sent the first parameters",
            )
        if self.streams.connected(worker):
            raise NameTaken(f"a worker named {worker!r} is connected to this job; choose another name")
        member, effects = lead.join(worker, rank, time.monotonic(), self._open_step())
        if not self.initialised:
            self._model = model
            self.seeder = (worker, member.session)
        self._announce(effects)
        await self._conditions.until(
            lambda: self.roster.epoch >= member.session,
            deadline,
            f"the standby has not said that it knows worker {worker!r}",
        )
        self.advice.check_settings(model, len(self.roster.members))
        log.info("worker %s joins (session %d); roster: %s", worker, member.session, _names(self.roster))
        return member.session, not self.initialised

    def leave(self, worker: str, session: int) -> None:
        effects = self.lead.leave(worker, session, time.monotonic(), self._open_step())
        if effects:
            self._announce(effects)
            log.info("worker %s leaves; roster: %s", worker, _names(self.lead.roster))

    def _show_roster(self) -> None:
        for queue in self.watchers:
            queue.put_nowait(self.roster)

    def stop(self, error: PsError) -> None:
        """End every open stream, so that none has to be cancelled when the server ends."""
        self.streams.close(error)
        self.on_stop(error)
        for queue in self.watchers:
            queue.put_nowait(None)

    def tick(self) -> None:
        """Lead, every ``tick_seconds``: drop the workers whose lease has run out while this process ran."""
        before, self._ticked = self._ticked, time.monotonic()
        if (late := self._ticked - before - tick_seconds(self.lease)) > self.lease / 8:
            log.warning("this process stood still for %.1f s, in which no worker's lease ran out", late)
            self.lead.stood_still(late, self._ticked)
        effects = self.lead.tick(self._ticked, self._open_step())
        for effect in effects:
            if isinstance(effect, Evict):
                self.metrics.lost.inc()
                log.warning("worker %s is dropped: %s", effect.worker, effect.reason)
        self._announce(effects)

    def plan_cut(self, version: int) -> None:
        """Lead: have every shard copy its state at ``version``."""
        self._announce(self.lead.plan_cut(version))

    def follow(self, roster: Roster) -> None:
        """Take over a roster from the lead; one of a lead that does not know of newer ones changes nothing."""
        if roster.epoch < self.roster.epoch:
            return
        self._announce((Announce(roster, "the lead has announced it"),))

    def _announce(self, effects: Iterable[Effect]) -> None:
        """Have decided effects take effect: now, or when the standby knows of them."""
        effects = tuple(effects)
        rosters = [effect.roster for effect in effects if isinstance(effect, Announce)]
        if rosters:
            self.before_roster(rosters[-1], lambda: self._take_effect(effects))
        else:
            self._take_effect(effects)

    def _take_effect(self, effects: Iterable[Effect]) -> None:
        for effect in effects:
            match effect:
                case Announce():
                    self.roster = effect.roster
                    self.metrics.roster.set(len(self.roster.members))
                    self.metrics.epoch.set(self.roster.epoch)
                    if self.engine is not None:
                        self._follow(self.engine, effect.roster)
                    self.clipping.set_roster(effect.roster)
                    self._show_roster()
                case Evict():
                    self.streams.evict(effect)
        if self._model is not None and not self.initialised and not self.is_member(*self.seeder):
            log.warning("worker %s left before it had sent the parameters; another one may", self.seeder[0])
            self._model = None
        self._conditions.notify()
        self.sample_requests.wake()

    def _follow(self, engine: Engine, roster: Roster) -> None:
        engine.set_roster(roster)
        cut = engine.core.cut
        missed, cut.missed = cut.missed, 0
        if missed:
            self.on_missed(missed)

    # -------------------------------------------------------------- the engine

    def begin(self, model: Model) -> Engine:
        """Build the engine for a model; there are no parameters yet."""
        whole = plan(model, self.bucket_bytes, self.num_shards)
        buckets = whole.of_shard(self.index)
        self.clipping.begin(whole, self.roster)
        monitor = self.advice.monitor(model, buckets, lambda: len(self.roster.members)) if self.membership else None
        self.engine = Engine(
            model,
            buckets,
            Shard(buckets=len(buckets), mode=self.mode, sections=self.sections, data=self.data),
            self._executor,
            self.metrics,
            self.streams,
            clip_norm=self.clipping.norm,
            compensator=Compensator.of(self.mode),
            request_norm=self.clipping.request_norm,
            on_failure=self._on_failure,
            monitor=monitor,
            device=self._device,
            trace=self.trace,
        )
        self.on_begun(self.engine)
        self.on_anew()
        return self.engine

    def restore(self, model: Model, state: ShardState, sections: Mapping[str, Mapping[str, Any]]) -> None:
        """Begin with a state that was kept, before anything is asked of this job.

        Args:
            sections: the lead's.

        Raises:
            KeyError, TypeError, ValueError: a record or a section is not what was exported.
        """
        self.sections.restore(sections)
        engine = self.begin(model)
        self.copies = restore(engine, state)
        if self.membership is not None and self.data is not None:
            self.roster = self.membership.roster
            self.data.begin_after(self.roster.epoch)
            engine.set_roster(self.roster)
        self._model, self.initialised, self.resumed_version = model, True, state.version

    def take_over(self, copies: Mapping[str, Copies], told: Mapping[str, Any], data: Mapping[str, Any]) -> None:
        """Serve from now on, with an engine that has the state of a primary.

        Args:
            copies: what workers with lossy pulls have, by name.
            told: the lead's ``Membership.hand_over``, or of another shard the roster in the same form.
            data: the lead's ``SampleAssigner.hand_over``.

        Raises:
            KeyError, TypeError, ValueError: ``told`` or ``data`` is not that.
        """
        engine = self.engine
        if engine is None:
            raise ValueError("there is no state to go on from")
        self.copies, self._model, self.initialised = dict(copies), engine.model, True
        self._ticked = time.monotonic()
        if self.membership is None or self.data is None:
            self.follow(parse_roster(told))
        else:
            effects = self.membership.take_over(told)
            self.data.take_over(data)
            self._announce(effects)
        self._conditions.notify()

    # -------------------------------------------------------------- what there is

    def working(self) -> Engine:
        """The engine, once the parameters are there.

        Raises:
            NotInitialised: they are not.
        """
        if self.engine is None or not self.initialised:
            raise NotInitialised(f"shard {self.index} has no parameters yet; one worker has to call init first")
        return self.engine

    async def data_is_known(self) -> None:
        """Lead: wait until the standby, if there is one, knows which samples are whose now."""
        if self.engine is not None and self.engine.work.recorder is not None:
            known = asyncio.Event()
            self.engine.tell_data(known.set)
            await known.wait()

    # -------------------------------------------------------------- waiting

    async def until_initialised(self) -> None:
        """Wait for the parameters, for as long as the caller lives."""
        await self._conditions.until(lambda: self.initialised, math.inf, "no parameters")

    def seeded(self) -> None:
        """The parameters are there."""
        self.initialised = True
        self._conditions.notify()
        self.on_initialised()

    async def until_member(self, worker: str, session: int) -> None:
        if self.membership is None and session > self.roster.epoch:
            deadline = time.monotonic() + ROSTER_DEADLINE
            await self._conditions.until(
                lambda: session <= self.roster.epoch, deadline, "the lead has not announced this worker"
            )
        if not self.is_member(worker, session):
            raise UnknownWorker(f"worker {worker!r} (session {session}) is not in the roster; join again")

    def is_member(self, worker: str, session: int) -> bool:
        member = self.roster.member(worker)
        return member is not None and member.session == session

    def _open_step(self) -> int:
        return self.engine.core.clock if self.engine is not None else 0


def _names(roster: Roster) -> str:
    return ", ".join(member.name for member in roster.members) or "empty"


def _not_kept(kept: Kept) -> None:
    raise ProtocolError(f"shard {kept.shard} keeps checkpoints, the lead does not; give all the same --checkpoint")
