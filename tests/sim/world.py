"""A simulated job around the core: a lead, shards, workers, streams that break, and rosters that come late.

Rules of this file
  1. One seed is one schedule: every choice comes from one ``random.Random``. The clock is a number.
  2. The shell here is the simplest one that obeys the contract of ``torch_ps.ps.core``. Workers behave as the client
     library does: they pull everything after a join, push all buckets, go on when all are answered, and repeat what was
     not answered.
  3. Faults are drawn like any other event. After the last fault everybody has to go on.

    worker --up--> stream --> shard --down--> worker        each arrow is an event, so anything can break in between
    lead --roster--> other shards                           late, twice, or out of order

Source: the simulator of FoundationDB.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from tests.sim.invariants import InvariantChecker, Payload, Violation, claim
from torch_ps.common.errors import UnknownWorker
from torch_ps.ps.core.effects import Announce, Apply, Discard, Effects, Evict, Release, Wait
from torch_ps.ps.core.membership import Membership
from torch_ps.ps.core.modes import Mode
from torch_ps.ps.core.policy import Push
from torch_ps.ps.core.roster import Roster
from torch_ps.ps.core.shard import Shard

LEASE = 10.0
Request = Push | int  # a pull is its bucket
Event = Callable[[], object]


@dataclass(eq=False)
class Stream:
    """One Exchange between one life of a worker and one shard."""

    worker: str
    session: int
    shard: int
    up: deque[Request] = field(default_factory=deque)
    down: deque[tuple[Release, int]] = field(default_factory=deque)  # with the epoch that the shell stamps on it
    broken: bool = False  # nothing gets through any more; the server may not have noticed
    refused: bool = False  # ended by the server: this session is over
    orphan: bool = False  # its worker is dead; what it had sent still arrives


@dataclass(eq=False)
class Worker:
    """One name; it may live several times."""

    name: str
    rank: int | None
    alive: bool = False
    frozen: bool = False
    session: int = 0  # 0: not joined
    epoch: int = 0
    rounds: int = 0
    streams: dict[int, Stream] = field(default_factory=dict)
    next_step: dict[tuple[int, int], int] = field(default_factory=dict)
    base: dict[tuple[int, int], int] = field(default_factory=dict)
    pending: dict[tuple[int, int], Request] = field(default_factory=dict)

    def forget(self) -> None:
        self.session = 0
        for memory in (self.streams, self.next_step, self.base, self.pending):
            memory.clear()


@dataclass(frozen=True)
class Parts:
    """What the world is made of; a mutant swaps one."""

    mode: Mode
    shard: type[Shard] = Shard
    membership: type[Membership] = Membership


class World:
    """One job under one seed."""

    def __init__(self, parts: Parts, seed: int) -> None:
        self.random = random.Random(seed)
        num_shards, self.num_buckets = self.random.choice([(1, 1), (1, 2), (2, 1), (2, 2), (3, 1)])
        num_workers = self.random.randint(1, 4)
        self.quorum = self.random.randint(1, num_workers)
        self.checker = InvariantChecker(parts.mode, num_shards=num_shards)
        self.lead = parts.membership(quorum=self.quorum, lease=LEASE)
        self.shards = [parts.shard(buckets=self.num_buckets, mode=parts.mode) for _ in range(num_shards)]
        self.rosters: list[deque[Roster]] = [deque() for _ in self.shards]
        self.open_streams: list[dict[tuple[str, int], Stream]] = [{} for _ in self.shards]  # as the server sees them
        ranked = self.random.random() < 0.3
        self.workers = [Worker(f"w{i + 8}", num_workers - i if ranked else None) for i in range(num_workers)]
        self.roster_speed = self.random.choice([1.0, 0.3, 0.03])
        self.now = 0.0
        self.buckets = [(s, b) for s in range(num_shards) for b in range(self.num_buckets)]

    # ------------------------------------------------------------ the schedule

    def run(self, num_events: int = 120) -> None:
        for _ in range(num_events):
            events = self.events()
            if not events:
                self.explain_rest()
            faults = self.faults()
            likely = self.random.random() < (0.85 if events else 0.0)
            self.random.choice(events if likely or not faults else faults)()
        self.drain()

    def drain(self) -> None:
        """No more faults: everybody who is here finishes two more rounds."""
        for worker in self.workers:
            worker.frozen = False
        for worker in self.workers:
            if not any(w.alive for w in self.workers) or (
                not worker.alive and (not self.lead.roster.open or self.random.random() < 0.5)
            ):
                worker.alive = True
        goal = {w.name: w.rounds + 2 for w in self.workers if w.alive}
        for i in range(5000):
            events = [*self.events(goal), *([self.tick] if i % 50 == 0 else [])]
            if not events:
                if self.explain_rest():
                    self.tick()
                    continue
                break
            self.random.choice(events)()
        late = {w.name: w.rounds for w in self.workers if w.alive and w.rounds < goal[w.name]}
        claim(not late, f"without any fault left, these do not get on: {late}")
        for shard in range(len(self.shards)):
            self.checker.settled(shard)
        versions = [v for s in self.shards for v in s.versions]
        claim(not self.checker.sync or max(versions) - min(versions) <= 1, f"buckets are out of step: {versions}")

    def explain_rest(self) -> bool:
        """Nothing is on its way: True when time alone goes on (a lease runs out), False when everybody is done.

        Raises:
            Violation: everybody who is alive is parked and nothing is pending that could wake one of them.
        """
        alive = [w for w in self.workers if w.alive and not w.frozen]
        if not any(w.pending for w in alive):
            return False
        here = {(w.name, w.session) for w in alive}
        if any((m.name, m.session) not in here for m in self.lead.roster.members):
            return True
        if not self.lead.roster.open:
            claim(len(alive) < self.quorum, "the quorum is complete and the roster is not open")
            return False
        stuck = {w.name: sorted(w.pending) for w in alive if w.pending}
        raise Violation(f"all live workers are parked for good: {stuck}; versions {[s.versions for s in self.shards]}")

    def events(self, goal: dict[str, int] | None = None) -> list[Event]:
        """Everything that happens by itself. With a ``goal``, workers leave when they have reached it."""
        found: list[Event] = []
        for worker in self.workers:
            if not worker.alive or worker.frozen:
                continue
            if not worker.session:
                found.append(partial(self.join, worker))
                continue
            for stream in list(worker.streams.values()):
                if stream.broken:
                    found.append(partial(self.reconnect, worker, stream))
                elif stream.down:
                    found.append(partial(self.receive, worker, stream))
            if not worker.pending:
                if goal is not None and worker.rounds >= goal[worker.name]:
                    found.append(partial(self.leave, worker))
                else:
                    found.append(partial(self.start_round, worker))
        for streams in self.open_streams:
            for stream in streams.values():
                if stream.broken or (stream.orphan and not stream.up):
                    found.append(partial(self.notice, stream))
                elif stream.up:
                    found.append(partial(self.serve, stream))
        for index in range(1, len(self.shards)):
            if self.rosters[index] and (not found or self.random.random() < self.roster_speed):
                found.append(partial(self.deliver_roster, index))
        return found

    def faults(self) -> list[Event]:
        found: list[Event] = [self.tick, self.observe]
        for worker in self.workers:
            if not worker.alive:
                found += [partial(setattr, worker, "alive", True)] * 3
                continue
            found.append(partial(self.kill, worker))
            found.append(partial(setattr, worker, "frozen", not worker.frozen))
            if worker.session and not worker.frozen:
                found.append(partial(self.leave, worker))
            for stream in worker.streams.values():
                found += [partial(self.cut, stream)] * 2
                if stream.up:
                    found.append(partial(stream.up.append, stream.up[0]))
                if worker.pending and not worker.frozen:
                    found.append(partial(self.repeat, worker, stream))
        return found

    # ------------------------------------------------------------ workers

    def join(self, worker: Worker) -> None:
        member, effects = self.lead.join(worker.name, worker.rank, self.now, self.shards[0].clock)
        self.obey(0, effects)
        worker.session, worker.epoch = member.session, member.session
        for index in range(len(self.shards)):
            self.connect(worker, index)
        order = self.random.sample(self.buckets, len(self.buckets))
        for shard, bucket in order:
            worker.pending[shard, bucket] = bucket
            worker.streams[shard].up.append(bucket)

    def connect(self, worker: Worker, shard: int) -> Stream:
        stream = worker.streams[shard] = Stream(worker.name, worker.session, shard)
        old = self.open_streams[shard].get((worker.name, worker.session))
        if old is not None:
            self.notice(old)
        self.open_streams[shard][worker.name, worker.session] = stream
        return stream

    def reconnect(self, worker: Worker, stream: Stream) -> None:
        if stream.refused:
            for other in worker.streams.values():
                self.cut(other)
            worker.forget()
        else:
            self.repeat(worker, self.connect(worker, stream.shard))

    def repeat(self, worker: Worker, stream: Stream) -> None:
        """Send again what has not been answered."""
        stream.up.extend(request for (shard, _), request in worker.pending.items() if shard == stream.shard)

    def start_round(self, worker: Worker) -> None:
        steps = set(worker.next_step.values())
        in_step = len(steps) == 1 or not self.checker.sync or self.checker.mode.backup_workers
        claim(bool(in_step), f"{worker.name} is out of step with itself: {worker.next_step}")
        weight = float(self.random.randint(0, 3))
        for shard, bucket in self.random.sample(self.buckets, len(self.buckets)):
            at = (shard, bucket)
            step, base = min(steps), worker.base[at]  # as the client does: what is ahead hears that it is late
            push = Push(worker.name, worker.session, step, bucket, base, weight, worker.epoch)
            worker.pending[at] = push
            worker.streams[shard].up.append(push)

    def receive(self, worker: Worker, stream: Stream) -> None:
        answer, epoch = stream.down.popleft()
        worker.epoch = max(worker.epoch, epoch)
        at = (stream.shard, answer.bucket)
        request = worker.pending.get(at)
        if request is None or (None if isinstance(request, int) else request.step) != answer.step:
            return  # the answer to a repeat of something that has been answered
        del worker.pending[at]
        worker.next_step[at], worker.base[at] = answer.next_step, answer.version
        if not worker.pending and answer.step is not None:
            worker.rounds += 1

    def kill(self, worker: Worker) -> None:
        worker.alive = worker.frozen = False
        for stream in worker.streams.values():
            if self.random.random() < 0.5:
                self.cut(stream)
            stream.orphan = True
        worker.forget()

    def leave(self, worker: Worker) -> None:
        self.obey(0, self.lead.leave(worker.name, worker.session, self.now, self.shards[0].clock))
        self.kill(worker)

    def cut(self, stream: Stream) -> None:
        stream.broken = True
        stream.up.clear()
        stream.down.clear()

    # ------------------------------------------------------------ servers

    def tick(self) -> None:
        self.now += LEASE * 0.4
        for stream in list(self.open_streams[0].values()):
            worker = next(w for w in self.workers if w.name == stream.worker)
            if worker.alive and not worker.frozen and not stream.broken and not stream.orphan:
                try:
                    self.lead.renew(stream.worker, stream.session, self.now)
                except UnknownWorker:
                    self.refuse(stream)
        self.obey(0, self.lead.tick(self.now, self.shards[0].clock))

    def observe(self) -> None:
        shard, bucket = self.random.choice(self.buckets)
        self.obey(shard, self.shards[shard].pull(None, 1, bucket))
        self.shards[shard].status()

    def deliver_roster(self, shard: int) -> None:
        """Usually the next one; sometimes the newest first, sometimes one twice."""
        waiting = self.rosters[shard]
        dice = self.random.random()
        roster = waiting.pop() if dice < 0.2 else waiting[0] if dice < 0.3 else waiting.popleft()
        self.follow(shard, roster)

    def follow(self, shard: int, roster: Roster) -> None:
        core = self.shards[shard]
        if roster.epoch > core.roster.epoch:
            self.checker.follows(shard, roster)
        effects = core.set_roster(roster)
        self.checker.follows(shard, core.roster)
        self.obey(shard, effects)

    def notice(self, stream: Stream) -> None:
        """The server finds out that a stream is gone."""
        self.cut(stream)
        worker, session = stream.worker, stream.session
        del self.open_streams[stream.shard][worker, session]
        asked = self.checker.books[stream.shard].asked
        asked -= {request for request in asked if request[:2] == (worker, session)}
        self.obey(stream.shard, self.shards[stream.shard].disconnected(worker, session), decided=False)

    def refuse(self, stream: Stream) -> None:
        self.notice(stream)
        stream.refused = True

    def serve(self, stream: Stream) -> None:
        request, index = stream.up.popleft(), stream.shard
        worker, session, shard, watch = stream.worker, stream.session, self.shards[index], self.checker
        step = None if isinstance(request, int) else request.step
        bucket = request if isinstance(request, int) else request.bucket
        asked = watch.books[index].asked
        key, put, asking = (worker, session, bucket, step or 0), False, (worker, session, bucket, step) not in asked
        if not isinstance(request, int):
            put = watch.holding(index, key, Payload(request.base, request.weight))
        asked.add((worker, session, bucket, step))
        try:
            if index == 0:
                self.lead.renew(worker, session, self.now)
            if isinstance(request, int):
                effects = shard.pull(worker, session, request, self.now)
            else:
                effects = shard.push(request, self.now)
        except UnknownWorker:
            if put:
                del watch.books[index].held[key]
            if asking:
                asked.remove((worker, session, bucket, step))
            self.refuse(stream)
            return
        claim(bool(effects), f"{worker} asks for bucket {bucket} and hears nothing")
        needs = session if isinstance(request, int) else max(session, request.epoch)
        self.obey(index, effects, parked=needs > shard.roster.epoch)

    def obey(self, shard: int, effects: Effects, *, parked: bool = False, decided: bool = True) -> None:
        """``parked``: the request has to wait for a roster. ``decided`` False: what is discarded may come again."""
        for effect in effects:
            match effect:
                case Apply():
                    self.checker.applies(shard, effect)
                case Release():
                    self.checker.releases(shard, effect)
                    if effect.worker is not None:
                        stream = self.open_streams[shard][effect.worker, effect.session]
                        if not stream.broken:
                            stream.down.append((effect, self.shards[shard].roster.epoch))
                case Wait():
                    holds = self.shards[shard].holds(effect.worker, effect.session)
                    held = [hold for hold in holds if (hold.bucket, hold.step) == (effect.bucket, effect.step)]
                    self.checker.waits(shard, effect, held, parked)
                case Discard():
                    self.checker.discards(shard, effect, decided)
                case Evict():
                    gone = self.open_streams[shard].get((effect.worker, effect.session))
                    if gone is not None:
                        self.refuse(gone)
                case Announce():
                    self.checker.announced(effect.roster)
                    for index in range(1, len(self.shards)):
                        self.rosters[index].append(effect.roster)
                    self.follow(0, effect.roster)
