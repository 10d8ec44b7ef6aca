"""One shard's part in a job: its members, its engine, and what becomes of a roster that was decided.

    lead:    Join, Leave, tick --> Membership --effects--> listeners (the standby knows) --> in force: engine, watchers
    others:  WatchRoster -------------------------------->

Rules of this file
  1. It decides nothing about steps: the core does. It touches no tensor: the engine does.
  2. A wait for a worker or for the lead has a deadline and says what it waits for. A wait for the standby ends with it:
     a standby that is silent for a lease is given up.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor
from typing import Any

from torch_ps.common import schema
from torch_ps.common.codecs.pulled_copies import Copies
from torch_ps.common.errors import ModelMismatch, NameTaken, NotInitialised, ProtocolError, PsError, UnknownWorker
from torch_ps.common.plan import plan
from torch_ps.common.schema import Model
from torch_ps.ps.core.consistent_cut import Sections
from torch_ps.ps.core.effects import Announce, Effect, Evict
from torch_ps.ps.core.incarnation import Incarnation
from torch_ps.ps.core.membership import Membership, tick_seconds
from torch_ps.ps.core.roster import Roster, parse_roster
from torch_ps.ps.core.sample_assigner import SampleAssigner
from torch_ps.ps.core.seeder_choice import SeederChoice
from torch_ps.ps.core.shard import Shard
from torch_ps.ps.engine.advisories import Advice
from torch_ps.ps.engine.delay_compensation import Compensator
from torch_ps.ps.engine.engine import Engine
from torch_ps.ps.engine.grad_clip import Clipping, RequestNorm
from torch_ps.ps.engine.shard_state import ShardState, restore
from torch_ps.ps.job.conditions import Conditions
from torch_ps.ps.job.listeners import JobListener, JobListeners
from torch_ps.ps.job.roster_feed import RosterFeed
from torch_ps.ps.job.sample_requests import SampleRequests
from torch_ps.ps.job.seeding import Seeding
from torch_ps.ps.job.settings import JobSettings
from torch_ps.ps.job.speakers import Speakers, digest_of
from torch_ps.ps.observability.shard_metrics import Metrics
from torch_ps.ps.observability.trace_collector import ShardTrace
from torch_ps.ps.transport.streams import Streams

log = logging.getLogger("torch_ps.ps")

#: Seconds that another shard may take to hear of a new roster from the lead.
ROSTER_DEADLINE = 20.0


class Job:
    """The state of one shard between its sockets and its engine. All methods run on the event loop.

    Args:
        incarnation: Start of the servers that this one belongs to.
        executor: Threads that work on buckets, ``settings.apply_threads`` of them.
        on_failure: Called, on any thread, with an error after which the shard cannot go on.
        request_norm: Requests the norm of an update from the lead; None on the lead.
        trace: Trace of this shard; None traces nothing.

    Attributes:
        engine: The engine, from the moment the model is known.
        membership, data: On the lead, the members and their leases, and which samples are whose; None elsewhere.
        speakers: Secrets by which it knows who speaks for which session.
        copies: After a restart or a takeover, what workers with lossy pulls have, by name, until they are back.
        resumed_version: Version of the checkpoint that the job went on from; 0 for none.
        resumed_from: Place of that checkpoint, for messages; "" for none.
    """

    def __init__(
        self,
        settings: JobSettings,
        *,
        incarnation: Incarnation,
        executor: Executor,
        metrics: Metrics,
        on_failure: Callable[[BaseException], None],
        request_norm: RequestNorm | None = None,
        trace: ShardTrace | None = None,
    ) -> None:
        self.settings, self.incarnation, self.metrics = settings, incarnation, metrics
        self.trace = trace or ShardTrace()
        self.streams = Streams(metrics)
        self.speakers = Speakers()
        self.rosters = RosterFeed(metrics, 2 * settings.max_workers + settings.num_shards)
        self.sample_requests = SampleRequests()
        self.advice = Advice(settings.mode, metrics)
        self.engine: Engine | None = None
        self.membership: Membership | None = None
        self.data: SampleAssigner | None = None
        self.sections = Sections()
        if settings.index == 0:
            self.membership = Membership(
                quorum=settings.quorum,
                lease=settings.lease,
                limit=settings.max_workers,
                started=int(1000 * time.time()),
            )
            self.data = SampleAssigner(settings.mode)
            self.sections.add("roster", self.membership)
            self.sections.add("data", self.data)
        self.copies: dict[str, Copies] = {}
        self.resumed_version, self.resumed_from = 0, ""
        self.started = self._ticked = time.monotonic()
        self._executor, self._on_failure = executor, on_failure
        self._listeners = JobListeners()
        self.clipping = Clipping(settings.clip_norm, settings.index, request_norm, self._listeners.on_norm_decided)
        self._conditions = Conditions(f"shard {settings.index}")
        choice = SeederChoice(quorum=settings.quorum, by_rank=not settings.mode.stale)
        self.seeding = Seeding(self._conditions, choice)

    def add_listener(self, listener: JobListener) -> None:
        """Have ``listener`` hear of everything that happens from now on."""
        self._listeners.add(listener)

    @property
    def roster(self) -> Roster:
        """The roster in force."""
        return self.rosters.roster

    @property
    def lead(self) -> Membership:
        """The members and their leases.

        Raises:
            ProtocolError: This shard is not the lead.
        """
        if self.membership is None:
            raise ProtocolError(f"shard {self.settings.index} is not the lead; ask shard 0")
        return self.membership

    @property
    def model(self) -> Model | None:
        """The model, once its parameters are there."""
        return self.engine.model if self.engine and self.seeding.initialised else None

    # -------------------------------------------------------------- membership

    async def join(
        self, worker: str, rank: int | None, model: Model, secret: bytes, seconds: float
    ) -> tuple[int, bool]:
        """Make ``worker`` a member. Returns its session, and whether it has to seed the parameters.

        Args:
            secret: Secret of the new session; with that of a member this is a repeat, and that session goes on.

        Raises:
            ProtocolError: The name, the rank or the secret is not one.
            ModelMismatch: The job trains another model.
            NameTaken: A connected worker has this name, or another one this rank.
            WaitTimeout: The parameters were not there within ``seconds``.
        """
        lead, deadline = self.lead, time.monotonic() + seconds
        digest = digest_of(secret, f"worker {worker!r}")
        repeats = self.seeding.repeats(worker, lead.roster, digest, model)  # of the seeder, for whom the others wait
        if not repeats:
            model = await self._until_decided(worker, rank, model, deadline)
        seeds = "" if self.seeding.initialised else schema.digest_of(model)
        old = lead.roster.member(worker)
        if self.streams.connected(worker) and (old is None or old.digest != digest):
            raise NameTaken(f"a worker named {worker!r} is connected to this job; choose another name")
        member, effects = lead.join(worker, rank, time.monotonic(), self._open_step(), digest=digest, seeds=seeds)
        if not self.seeding.initialised:
            self.seeding.choose(member.key, model)
        self._announce(effects)
        await self._conditions.until(
            lambda: self.roster.epoch >= member.session,
            deadline,
            f"the standby has not said that it knows worker {worker!r}",
        )
        self.advice.check_settings(model, len(self.roster.members))
        log.info("worker %s joins (session %d); roster: %s", worker, member.session, _size(self.roster))
        return member.session, not self.seeding.initialised

    async def _until_decided(self, worker: str, rank: int | None, model: Model, deadline: float) -> Model:
        """As ``Seeding.until_decided``; the refusal of another model says what to do about it."""
        try:
            return await self.seeding.until_decided(worker, rank, model, deadline)
        except ModelMismatch as error:
            if not self.resumed_from:
                raise ModelMismatch(f"{error}; every worker of a job trains the same model") from None
            raise ModelMismatch(
                f"{error}; the job has the model of version {self.resumed_version} of the checkpoint in "
                f"{self.resumed_from}: train that model, or start the servers with another --checkpoint"
            ) from None

    def leave(self, worker: str, session: int) -> None:
        """Lead: take a worker out of the roster; one that is not in it changes nothing."""
        effects = self.lead.leave(worker, session, time.monotonic(), self._open_step())
        if effects:
            self._announce(effects)
            log.info("worker %s leaves; roster: %s", worker, _size(self.lead.roster))

    def tick(self) -> None:
        """Lead, every ``tick_seconds``: drop the workers whose lease has run out while this process ran."""
        lease = self.settings.lease
        before, self._ticked = self._ticked, time.monotonic()
        if (late := self._ticked - before - tick_seconds(lease)) > lease / 8:
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
        """Take over a roster from the lead; an older one than that in force changes nothing."""
        if roster.epoch < self.roster.epoch:
            return
        self._announce((Announce(roster, "the lead has announced it"),))

    def _announce(self, effects: Iterable[Effect]) -> None:
        """Have decided effects take effect: now, or when the standby knows of them."""
        effects = tuple(effects)
        rosters = [effect.roster for effect in effects if isinstance(effect, Announce)]
        if rosters:
            self._listeners.on_roster_decided(rosters[-1], lambda: self._take_effect(effects))
        else:
            self._take_effect(effects)

    def _take_effect(self, effects: Iterable[Effect]) -> None:
        for effect in effects:
            match effect:
                case Announce():
                    self._put_in_force(effect.roster)
                case Evict():
                    self.streams.evict(effect)
        if seeder := self.seeding.drop_seeder(self.is_member):
            log.warning("worker %s left before it had sent the parameters; another one may", seeder)
        self._conditions.notify()
        self.sample_requests.wake()

    def _put_in_force(self, roster: Roster) -> None:
        self.rosters.roster = roster  # the engine's answers name its epoch
        self.speakers.learn(roster.members)
        if self.engine is not None:
            self.engine.set_roster(roster)
            cut = self.engine.core.cut
            missed, cut.missed = cut.missed, 0
            if missed:
                self._listeners.on_cut_missed(missed)
        if roster.epoch < self.roster.epoch:
            return  # what the engine sent let a newer one come into force meanwhile, which has done the rest
        self.clipping.set_roster(roster)
        self.rosters.publish(roster)

    # -------------------------------------------------------------- the engine

    def begin(self, model: Model) -> Engine:
        """Build the engine for a model; there are no parameters yet."""
        settings = self.settings
        whole = plan(model, settings.bucket_bytes, settings.num_shards)
        buckets = whole.of_shard(settings.index)
        self.clipping.begin(whole, self.roster, self._next_step)
        monitor = self.advice.monitor(model, buckets, lambda: len(self.roster.members)) if self.membership else None
        self.engine = Engine(
            model,
            buckets,
            Shard(buckets=len(buckets), mode=settings.mode, sections=self.sections, data=self.data),
            self._executor,
            self.metrics,
            self.streams,
            clip_norm=self.clipping.norm,
            compensator=Compensator.of(settings.mode),
            request_norm=self.clipping.request_norm,
            on_failure=self._on_failure,
            advise=self.advice.say,
            monitor=monitor,
            equal_gradients=self.advice.equal_gradients() if self.membership else None,
            device=settings.device,
            trace=self.trace,
        )
        self._listeners.on_engine_built(self.engine)
        return self.engine

    def finish_seeding(self) -> None:
        """A worker has sent the last of the parameters."""
        self.seeding.finish()
        self._listeners.on_parameters_ready()

    def restore(self, model: Model, state: ShardState, sections: Mapping[str, Mapping[str, Any]]) -> None:
        """Begin with a state that was kept, before anything is asked of this job.

        Args:
            sections: Sections of the checkpoint on the lead; empty elsewhere.

        Raises:
            KeyError, TypeError, ValueError: A record or a section is not what was exported.
        """
        self.sections.restore(sections)
        engine = self.begin(model)
        self.copies = restore(engine, state)
        if self.membership is not None and self.data is not None:
            self.rosters.roster = self.membership.roster
            self.speakers.learn(self.roster.members)
            self.data.begin_after(self.roster.epoch)
            engine.set_roster(self.roster)
            self.clipping.set_roster(self.roster)
        self.resumed_version = state.version
        self.seeding.finish(model)

    def take_over(self, copies: Mapping[str, Copies], told: Mapping[str, Any], data: Mapping[str, Any]) -> None:
        """Serve from now on, with an engine that has the state of a primary.

        Args:
            copies: What workers with lossy pulls have, by name.
            told: On the lead, ``Membership.hand_over``; elsewhere, the roster in the same form.
            data: On the lead, ``SampleAssigner.hand_over``.

        Raises:
            KeyError, TypeError, ValueError: ``told`` or ``data`` is not that.
        """
        engine = self.engine
        if engine is None:
            raise ValueError("there is no state to go on from")
        self.copies = dict(copies)
        self._ticked = time.monotonic()
        self.seeding.finish(engine.model)
        if self.membership is None or self.data is None:
            self.follow(parse_roster(told))
        else:
            effects = self.membership.take_over(told)
            self.data.take_over(data)
            self._announce(effects)
        self._conditions.notify()

    def stop(self, error: PsError, *, well: bool) -> None:
        """End every open stream, so that none has to be cancelled when the server ends.

        Args:
            error: What the peers get.
            well: Whether the server was told to stop, and no other one goes on in its place.
        """
        self.streams.close(error)
        self._listeners.on_stop(error)
        self.rosters.stop(error, well=well)

    # -------------------------------------------------------------- what there is

    def working(self) -> Engine:
        """The engine, once the parameters are there.

        Raises:
            NotInitialised: They are not.
        """
        if self.engine is None or not self.seeding.initialised:
            raise NotInitialised(
                f"shard {self.settings.index} has no parameters yet; one worker has to call init first"
            )
        return self.engine

    def is_member(self, worker: str, session: int) -> bool:
        """Whether this session of a worker is in the roster in force."""
        member = self.roster.member(worker)
        return member is not None and member.session == session

    def _next_step(self, worker: str) -> int:
        return self.engine.core.next_step(worker) if self.engine is not None else 0

    def _open_step(self) -> int:
        return self.engine.core.clock if self.engine is not None else 0

    # -------------------------------------------------------------- waiting

    async def until_member(self, worker: str, session: int, secret: bytes) -> None:
        """Wait until this shard has heard from the lead whether the session is of a member; check that it speaks.

        Raises:
            UnknownWorker: It is not, or shows another secret.
            WaitTimeout: The lead has announced nothing within ``ROSTER_DEADLINE``.
        """
        if self.membership is None and session > self.roster.epoch:
            await self._conditions.until(
                lambda: session <= self.roster.epoch,
                time.monotonic() + ROSTER_DEADLINE,
                "the lead has not announced this worker",
            )
        self.speakers.check(worker, session, secret)
        if not self.is_member(worker, session):  # an elector that has left
            raise UnknownWorker(f"worker {worker!r} (session {session}) is not in the roster; join again")

    async def until_samples_recorded(self) -> None:
        """Lead: wait until the standby, if there is one, knows which samples are whose now."""
        if self.engine is not None and self.engine.work.recorder is not None:
            recorded = asyncio.Event()
            self.engine.tell_data(recorded.set)
            await recorded.wait()


def _size(roster: Roster) -> str:
    """How many members there are. Their names, in each line about each of N workers, would be N squared names."""
    count = len(roster.members)
    return f"{count} worker{'' if count == 1 else 's'}" if count else "empty"
