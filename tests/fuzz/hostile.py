"""Hostile members of a job, as a state machine: well-formed frames with hostile content, to a whole server.

    python -m tests.fuzz.hostile --seconds 600 --seed 1

One worker, h0, is honest. Others join, push, repeat, park, ask, leave and break their streams, with fields changed to
what nobody would send (``messages.py``). After each of these

  1. nothing has raised but a ``PsError``, on any path, and the server goes on;
  2. the stream of h0 is open, and its next push is answered, if need be once the others have left;
  3. parameters are finite, unless a hyperparameter was sent;
  4. no push is applied twice, and versions, pushes and samples are those of what was applied;
  5. what a checkpoint and a standby get can be written: finite numbers in JSON.

Rules 2 to 5 hold for whatever the others send, as all of it is refused, or in range. ``mutants.py`` has bugs that it
has to find.
"""

import asyncio
import itertools
import json
import logging
import math
import random
import struct
import tempfile
import time
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import click
from hypothesis import HealthCheck, Phase, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.fuzz.messages import changed
from tests.fuzz.server import Context, Link, Server
from torch_ps.common import schema, version
from torch_ps.common.errors import PsError
from torch_ps.common.optimizer_spec import Hyper
from torch_ps.common.options.server_config import ServerConfig
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.plan import Bucket, plan
from torch_ps.common.schema import Group, Model, TensorSpec
from torch_ps.common.wire.frames import pack

#: Two buckets that an optimizer steps, one of averaged and one of copied buffers.
TENSORS = (TensorSpec("a", (6,)), TensorSpec("b", (2, 2)))
BUFFERS = (TensorSpec("n.running_mean", (3,)), TensorSpec("count", (), "int64", copied=True))
OPTIMIZERS: dict[str, Hyper] = {
    "SGD": {"lr": 0.01, "momentum": 0.5},
    "Adam": {"lr": 0.01},
    "NAdam": {"lr": 0.01},
    "RMSprop": {"lr": 0.01, "momentum": 0.5},
    "ASGD": {"lr": 0.01},
}
#: Values of gradients; their products with weights and with each other are far beyond fp32.
VALUES = (0.0, 1.0, -1.0, 1e-30, 1e30, math.inf, math.nan)
HYPER = (
    pb.HyperValue(flag=True),
    pb.HyperValue(integer=2**63 - 1),
    pb.HyperValue(number=1e19),
    pb.HyperValue(number=0.5),
)
OTHERS = ("h1", "h2", "h3")

#: Kinds of frames, the usual one more often.
KINDS = ("push", "push", "push", "parked", "repeat", "ahead", "named", "measure", "pull", "ballot")

#: Rounds of everything that can happen after which a call that is not answered hangs.
ROUNDS = 20

SEEDS = st.integers(0, 2**32)


def model(optimizer: str) -> Model:
    hyper = OPTIMIZERS[optimizer]
    return Model(optimizer, (Group(TENSORS[:1], hyper), Group(TENSORS[1:], {**hyper, "lr": 0.02})), BUFFERS)


class Member:
    """One session of one worker, and what it knows."""

    def __init__(self, name: str, session: int, secret: bytes) -> None:
        self.name, self.session, self.secret = name, session, secret
        self.link: Link | None = None
        self.step: dict[int, int] = {}  # next step, by bucket
        self.version: dict[int, int] = {}
        self.ahead = 0

    def hear(self, header: pb.DownHeader) -> None:
        self.step[header.bucket] = header.next_step
        self.version[header.bucket] = header.version


class Hostile(RuleBasedStateMachine):
    """See the module."""

    bugs_are_planted = False  # and contained, as a test wants to see

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.folder = tempfile.TemporaryDirectory(prefix="torch-ps-hostile-")
        self.server: Server | None = None
        self.standby: Context | None = None
        self.acknowledged = 0

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Do something, and all that follows from it; a refusal is returned."""

        async def settled() -> Any:
            task = asyncio.ensure_future(work)
            for _ in range(ROUNDS):
                await self.shard.settle()
                self._acknowledge()
                if task.done():
                    break
            assert task.done(), f"nobody answers: {work}"
            self.shard.see_applied()
            await self.shard.settle()
            return task.exception() if isinstance(task.exception(), PsError) else task.result()

        return self.loop.run_until_complete(settled())

    @property
    def shard(self) -> Server:
        assert self.server is not None
        return self.server

    # -------------------------------------------------------------- the beginning

    @initialize(
        seed=SEEDS,
        mode=st.sampled_from(["sync", "async", "ssp", "compensated"]),
        optimizer=st.sampled_from(sorted(OPTIMIZERS)),
        clips=st.booleans(),
    )
    def begin(self, seed: int, mode: str, optimizer: str, clips: bool) -> None:
        self.random = random.Random(seed)
        modes: dict[str, dict[str, Any]] = {
            "sync": {"mode": "sync"},
            "async": {"mode": "async", "staleness_lr": "inverse"},
            "ssp": {"mode": "ssp", "slack": 2, "max_staleness": 8},
            "compensated": {"mode": "async", "delay_compensation": "constant"},
        }
        options = modes[mode]
        if clips:
            options |= {"clip_norm": 1.0, "shard": "0/2"}  # the test is the other shard
            options.pop("max_staleness", None)  # clipping needs whole gradients
        config = ServerConfig(
            listen="127.0.0.1:0",
            checkpoint=self.folder.name,
            checkpoint_every=4,
            lease=3600.0,
            bucket_size=0.001,
            **options,
        )

        async def begun() -> None:
            self.server = Server(config)

        self.loop.run_until_complete(begun())
        self.model, self.clips = model(optimizer), clips
        self.buckets = plan(self.model, 1024, 2 if clips else 1).of_shard(0)
        self.by_index = {bucket.index: bucket for bucket in self.buckets}
        self.wild = False  # whether a hyperparameter was sent
        self.secret = self.random.randbytes(16)
        if clips:
            request = pb.EnterRequest(shard=1, num_shards=2, secret=self.secret, version=version.current())
            reply = self.run(self.shard.call("Enter", request.SerializeToString()))
            assert isinstance(reply, pb.EnterReply), reply
        self.others: dict[str, Member] = {}
        self.honest = self._join("h0", 0)
        assert isinstance(self.honest, Member), self.honest
        self._seed()
        self._connect(self.honest)
        self._honest_step()

    def _join(self, name: str, changes: int) -> Member | Any:
        request = pb.JoinRequest(
            version=version.current(),
            worker=name,
            model=schema.to_proto(self.model),
            incarnation=self.shard.incarnation,
            secret=self.random.randbytes(16),
        )
        changed(self.random, request, changes)
        secret, name = request.secret, request.worker
        reply = self.run(self.shard.call("Join", request.SerializeToString()))
        return Member(name, reply.session, secret) if isinstance(reply, pb.JoinReply) else reply

    def _seed(self) -> None:
        member = self.honest
        head = pb.SeedHeader(
            worker=member.name,
            session=member.session,
            secret=member.secret,
            model=schema.to_proto(self.model),
            incarnation=self.shard.incarnation,
        )
        frames = [pack(head)]
        for bucket in self.buckets:
            frames.append(pack(pb.SeedHeader(bucket=bucket.index), [bytes(4 * bucket.numel)]))
        assert isinstance(self.run(self.shard.stream("Seed", frames)), pb.SeedReply)

    def _hello(self, member: Member) -> pb.Hello:
        codec = "none" if member.name == "h0" else self.random.choice(("none", "fp16", "topk:0.5", "int8"))
        return pb.Hello(
            worker=member.name,
            session=member.session,
            secret=member.secret,
            pull_codec=codec,
            incarnation=self.shard.incarnation,
        )

    def _connect(self, member: Member, changes: int = 0) -> None:
        hello = changed(self.random, pb.UpHeader(hello=self._hello(member)), changes)

        async def opened() -> Link:
            link = Link(self.shard)
            link.send(pack(hello))
            return link

        member.link = self.run(opened())

    # -------------------------------------------------------------- the honest worker

    def _hear(self, member: Member) -> list[pb.DownHeader]:
        """Take what has come for a member, and answer ballots as a worker does."""
        headers = member.link.take() if member.link is not None else []
        for header in headers:
            if header.HasField("ballot"):
                self._vote(member, header.ballot)
            elif not header.HasField("measured"):
                member.hear(header)
        return headers

    def _vote(self, member: Member, ballot: pb.Ballot) -> None:
        paper = None
        if ballot.HasField("ask"):
            paper = pb.BallotPaper(vote=pb.Vote(term=ballot.ask.term, granted=True, promised=ballot.ask.term))
        elif ballot.HasField("standby"):
            paper = pb.BallotPaper(standby=ballot.standby)
        elif not ballot.declare.serving:
            paper = pb.BallotPaper(accepted=ballot.declare.configuration.term)
        if paper is not None and member.link is not None:
            member.link.send(pack(pb.UpHeader(ballot=paper)))

    def _push_of(self, member: Member, bucket: Bucket) -> tuple[pb.Push, bytes]:
        engine = self.shard.engine
        assert engine is not None
        version = engine.core.versions[engine._local[bucket.index]]
        averages = not self.shard.parts.job.settings.mode.stale
        push = pb.Push(
            step=version if averages else member.step.get(bucket.index, 0),
            bucket=bucket.index,
            base=version if averages else member.version.get(bucket.index, version),
            weight=self.random.choice((0.5, 1.0, 4.0)),
            codec="none",
            epoch=self.shard.parts.job.roster.epoch,
        )
        return push, struct.pack(f"{bucket.numel}f", *[0.25] * bucket.numel)

    def _honest_step(self) -> None:
        """Push every bucket; each is answered, at the latest when the others are gone."""
        member, asked = self.honest, dict[int, int]()
        assert member.link is not None
        self._pull(member)
        if self.random.random() < 0.5 and not self.shard.parts.job.settings.mode.stale:
            self._ask_norm(member, 0, len(self.buckets))
            self._pump(member)
        for bucket in self.buckets:
            push, payload = self._push_of(member, bucket)
            asked[bucket.index] = push.step
            member.link.send(pack(pb.UpHeader(push=push), [payload]))
        for attempt in range(4):
            if attempt == 2:
                self._all_leave()
            for header in self._pump(member):
                if not header.HasField("ballot") and header.HasField("step"):
                    asked = {
                        index: step for index, step in asked.items() if (index, step) != (header.bucket, header.step)
                    }
            if not asked:
                self.state_is_that_of_what_was_applied()
                return
        self.nothing_has_failed()
        engine = self.shard.engine
        assert not asked, (
            f"pushes of h0 are not answered: {asked}; {engine and engine.core.holds('h0', member.session)}"
        )

    def _pull(self, member: Member) -> None:
        assert member.link is not None
        for bucket in self.buckets:
            member.link.send(pack(pb.UpHeader(pull=pb.Pull(bucket=bucket.index))))
        self._pump(member)

    def _pump(self, member: Member) -> list[pb.DownHeader]:
        """Let everything happen: the other shard reports its norms, the standby acknowledges, workers vote."""
        found: list[pb.DownHeader] = []
        for _ in range(3):
            self._report_norms()
            self.run(self.shard.settle())
            found += self._hear(member)
            for other in self.others.values():
                self._hear(other)
        return found

    def _report_norms(self) -> None:
        norms = self.shard.parts.job.clipping.norms
        for group, reported in list(norms._reported.items()) if norms is not None else []:
            if 0 in reported and 1 not in reported:
                worker, session, step = group
                request = pb.NormRequest(
                    shard=1,
                    worker=worker,
                    session=session,
                    step=step,
                    square=0.25,
                    incarnation=self.shard.incarnation,
                    secret=self.secret,
                )
                self.run(self.shard.call("Norm", request.SerializeToString(), wait=False))

    def _all_leave(self) -> None:
        job = self.shard.parts.job

        async def left() -> None:
            for member in job.lead.roster.members:
                if member.name != "h0":
                    job.leave(member.name, member.session)

        self.run(left())
        self.others.clear()

    # -------------------------------------------------------------- the others

    @rule(seed=SEEDS, name=st.sampled_from(OTHERS), changes=st.sampled_from([0, 0, 0, 1, 2]))
    def join(self, seed: int, name: str, changes: int) -> None:
        self.random.seed(seed)
        member = self._join(name, changes)
        if isinstance(member, Member):
            if member.name == "h0":  # it took the name of h0 while that had no stream: never
                raise AssertionError("h0 has been replaced")
            self.others[member.name] = member
            self._connect(member, self.random.choice((0, 0, 0, 1)))
            if member.link is not None and not member.link.open:
                self._connect(member)

    @rule(seed=SEEDS, name=st.sampled_from(OTHERS), number=st.integers(1, 4), changes=st.sampled_from([0, 0, 1, 1, 2]))
    def frames(self, seed: int, name: str, number: int, changes: int) -> None:
        """Some frames, several in one message now and then; each right but for some fields."""
        self.random.seed(seed)
        member = self._other(name)
        if member is None or member.link is None:
            return
        whole: list[bytes] = []
        for position in range(number):
            header, payload = self._frame(member)
            changed(self.random, header, changes)
            self._note_wild(header)
            if payload and (position == number - 1 or self.random.random() < 0.7):
                member.link.send(b"".join([*whole, pack(header, [payload])]))
                whole = []
            else:
                whole.append(pack(header))
        if whole:
            member.link.send(b"".join(whole))
        self._pump(member)

    def _note_wild(self, header: pb.UpHeader) -> None:
        self.wild = self.wild or bool(header.push.hyper)
        header.ballot.vote.ClearField("served") if header.HasField("ballot") else None

    def _other(self, name: str) -> Member | None:
        """One of the others, with a stream: it joins if it has not, and opens one if the server has ended the last."""
        if name not in self.others and isinstance(joined := self._join(name, 0), Member):
            self.others[name] = joined
        member = self.others.get(name)
        if member is not None and (member.link is None or not member.link.open):
            self._connect(member)
        return member

    def _frame(self, member: Member) -> tuple[pb.UpHeader, bytes]:
        bucket = self.random.choice(self.buckets)
        push, _ = self._push_of(member, bucket)
        payload = struct.pack(f"{bucket.numel}f", *[self.random.choice(VALUES) for _ in range(bucket.numel)])
        kind = self.random.choice(
            ("push", "push", "push", "parked", "repeat", "ahead", "named", "measure", "pull", "ballot")
        )
        match kind:
            case "push":
                return pb.UpHeader(push=push), payload
            case "parked":
                push.epoch += self.random.choice((1, 1, 2, 2**32))
                return pb.UpHeader(push=push), payload
            case "repeat":
                push.step, push.base = max(push.step - 1, 0), max(push.base - 1, 0)
                return pb.UpHeader(push=push), payload
            case "ahead":
                member.ahead += 1
                return pb.UpHeader(ahead=pb.Ahead(bucket=bucket.index, number=member.ahead, codec="none")), payload
            case "named":
                push.ahead = member.ahead
                return pb.UpHeader(push=push), b""
            case "measure":
                question = pb.Measure(
                    step=push.step, bucket=bucket.index, power=2.0, weight=push.weight, epoch=push.epoch
                )
                return pb.UpHeader(measure=question), payload
            case "pull":
                return pb.UpHeader(pull=pb.Pull(bucket=bucket.index)), b""
            case _:
                term = pb.Term(number=self.random.choice((1, 2**32, 2**62, 2**64 - 1)), server="127.0.0.1:3/x")
                vote = pb.Vote(promised=term)
                paper = self.random.choice((pb.BallotPaper(vote=vote), pb.BallotPaper(accepted=term)))
                return pb.UpHeader(ballot=paper), b""

    @rule(seed=SEEDS, name=st.sampled_from(OTHERS), hyper=st.sampled_from(["lr", "weight_decay", "momentum", "eps"]))
    def hyper(self, seed: int, name: str, hyper: str) -> None:
        """A push that is right but for the type or the size of one hyperparameter."""
        self.random.seed(seed)
        member = self._other(name)
        if member is None or member.link is None:
            return
        self.wild = True
        for bucket in self.buckets:
            push, payload = self._push_of(member, bucket)
            push.hyper[hyper].CopyFrom(self.random.choice(HYPER))
            member.link.send(pack(pb.UpHeader(push=push), [payload]))
        self._pump(member)

    @rule(seed=SEEDS, name=st.sampled_from(OTHERS))
    def measure(self, seed: int, name: str) -> None:
        """All ask for the norm of a whole step, and one begins to ask again."""
        self.random.seed(seed)
        member = self._other(name)
        if member is None or member.link is None:
            return
        for each in self.others.values():
            if each.link is not None:
                self._ask_norm(each, 0, len(self.buckets))
        self._ask_norm(member, 1, self.random.choice((0, 1)))
        self._pump(member)

    def _ask_norm(self, member: Member, turn: int, number: int) -> None:
        """Send one worker's question for a norm, or the part of it that the first ``number`` buckets are."""
        assert member.link is not None
        for bucket in [bucket for bucket in self.buckets if bucket.rule == "optimizer"][:number]:
            push, payload = self._push_of(member, bucket)
            question = pb.Measure(
                step=push.step, bucket=bucket.index, round=turn, power=2.0, weight=1.0, epoch=push.epoch
            )
            member.link.send(pack(pb.UpHeader(measure=question), [payload]))

    @rule(seed=SEEDS, name=st.sampled_from(OTHERS))
    def push_again(self, seed: int, name: str) -> None:
        """One push twice or three times, right but for its weight and the roster that it speaks of."""
        self.random.seed(seed)
        member = self._other(name)
        if member is None or member.link is None:
            return
        push, _ = self._push_of(member, bucket := self.random.choice(self.buckets))
        epoch = push.epoch
        for _ in range(self.random.choice((2, 3))):
            push.weight = self.random.choice((1.0, 1.0, 1.0, 2.0**53, 1e308))
            push.epoch = epoch + self.random.choice((0, 0, 1))
            payload = struct.pack(f"{bucket.numel}f", *[self.random.choice(VALUES) for _ in range(bucket.numel)])
            member.link.send(pack(pb.UpHeader(push=push), [payload]))
            self._pump(member)

    @rule(seed=SEEDS, changes=st.integers(0, 3), times=st.sampled_from([1, 1, 1, 8]))
    def request(self, seed: int, changes: int, times: int) -> None:
        """A call of any method, with the secret of somebody or of nobody."""
        self.random.seed(seed)
        kind = self.random.random()
        for _ in range(times):
            method, message = self._request(kind)
            changed(self.random, message, changes)
            for paper in getattr(message, "paper", ()):  # a majority of workers may say who serves
                paper.vote.ClearField("served")
            self.run(self.shard.call(method, message.SerializeToString(), wait=False))

    def _request(self, kind: float) -> tuple[str, Any]:
        """A call that is right, or nearly: of one kind for each number from 0 to 1."""
        speaker = self.random.choice([*self.others.values(), Member("h3", 1, bytes(16))])
        who: dict[str, Any] = {"worker": speaker.name, "session": speaker.session, "secret": speaker.secret}
        here: dict[str, Any] = {"incarnation": self.shard.incarnation}
        data = pb.DataSet(name=self.random.choice(("", "d")), size=self.random.choice((1, 10)), seed=1)
        part = pb.TracePart(host="x", word=["a"], span=[pb.TraceSpan(step=2)])
        messages: tuple[Any, ...] = (
            pb.DescribeRequest(model=True),
            pb.EnterRequest(shard=1, num_shards=2, secret=bytes(16), version=version.current()),
            pb.ShareRequest(**who),
            pb.RenewRequest(**who),
            pb.DataRequest(**who, data=data, batch=2, epochs=2),
            pb.DataRequest(**who, data=data, batch=2, epochs=2, received=1),
            pb.DataRequest(**who, data=data, give_back=True),
            pb.StatusRequest(),
            pb.NormRequest(shard=1, step=10**9 + self.random.randrange(10**6), square=1.0, secret=bytes(16), **here),
            pb.KeptRequest(shard=1, version=4, size=10, sha256="0" * 64, secret=bytes(16), **here),
            pb.BallotRequest(**who, take_over=True),
            pb.TraceRequest(**who, **here, part=part),
        )
        message = messages[int(kind * len(messages))]
        return type(message).__name__.removesuffix("Request"), message

    @rule(seed=SEEDS, name=st.sampled_from(OTHERS), changes=st.integers(0, 2))
    def commit(self, seed: int, name: str, changes: int) -> None:
        """Copies of pushes, over another connection than the stream."""
        self.random.seed(seed)
        member = self.others.get(name)
        if member is None:
            return
        push, _ = self._push_of(member, self.random.choice(self.buckets))
        push.ahead = member.ahead
        header = changed(self.random, pb.UpHeader(push=push), changes)
        self._note_wild(header)
        message = pack(pb.UpHeader(hello=self._hello(member))) + pack(header)
        self.run(self.shard.stream("Commit", [message]))
        self._pump(member)

    @rule(seed=SEEDS, name=st.sampled_from(OTHERS), again=st.booleans())
    def disconnect(self, seed: int, name: str, again: bool) -> None:
        self.random.seed(seed)
        member = self._other(name)
        if member is None or member.link is None:
            return
        member.link.send(None)
        self.run(self.shard.settle())
        if again:
            self._connect(member)

    @rule(name=st.sampled_from(OTHERS))
    def leave(self, name: str) -> None:
        member = self.others.pop(name, None)
        if member is not None:
            request = pb.LeaveRequest(worker=member.name, session=member.session, secret=member.secret)
            self.run(self.shard.call("Leave", request.SerializeToString()))

    # -------------------------------------------------------------- time, the standby, the honest worker

    @rule()
    def tick(self) -> None:
        async def ticked() -> None:
            parts = self.shard.parts
            parts.job.tick()
            parts.checkpointer.plan() if parts.checkpointer is not None else None
            parts.driver.obey(parts.driver.seat.tick(time.monotonic()))

        self.run(ticked())
        self._pump(self.honest)

    @precondition(lambda self: self.standby is None)
    @rule()
    def attach(self) -> None:
        """A standby follows, and takes all that it is sent."""
        self.standby, self.receipts = Context(), asyncio.Queue[bytes]()

        async def messages() -> AsyncIterator[bytes]:
            hello = pb.ReplicaHello(server="127.0.0.1:2/s", version=version.current())
            yield pb.ReplicaUp(hello=hello).SerializeToString()
            while True:
                yield await self.receipts.get()

        async def started() -> None:
            self.shard.start(self.shard.servicer.replicate(messages(), self.standby))  # type: ignore[arg-type]

        self.run(started())
        self._pump(self.honest)
        assert self.shard.parts.replication.follower is not None, "no standby can attach"

    def _acknowledge(self) -> None:
        if self.standby is not None and len(self.standby.written) > self.acknowledged:
            self.acknowledged = len(self.standby.written)
            self.receipts.put_nowait(pb.ReplicaUp(received=self.acknowledged).SerializeToString())

    @rule()
    def honest_step(self) -> None:
        self._honest_step()

    # -------------------------------------------------------------- what has to hold

    @invariant()
    def nothing_has_failed(self) -> None:
        if self.server is None:
            return
        if bugs := self.shard.bugs + ([] if self.bugs_are_planted else self.shard.reported):
            raise bugs[0]
        if self.shard.shutdown.failure is not None:
            raise self.shard.shutdown.failure
        assert self.honest.link is not None
        assert self.honest.link.open, self.honest.link.error

    def state_is_that_of_what_was_applied(self) -> None:
        engine = self.shard.engine if self.server is not None else None
        if engine is None:
            return
        names = [(c.worker, c.session, c.step, a.bucket) for a in self.shard.applied for c in a.contributions]
        assert len(names) == len(set(names)), "a push has been applied twice"
        for record in engine.core.records():
            mine = [each for each in self.shard.applied if each.bucket == record["bucket"]]
            weights = [c.weight for each in mine for c in each.contributions]
            assert record["version"] == len(mine)
            assert record["num_pushes"] == len(weights)
            assert math.isclose(record["samples"], math.fsum(weights), rel_tol=1e-9)
        json.dumps([engine.core.records(), engine.core.data(whole=True)], allow_nan=False)
        if not self.wild:
            for bucket in self.buckets:
                if bucket.rule == "optimizer":
                    assert engine.store.values(bucket.index).isfinite().all(), "a parameter is not finite"

    def teardown(self) -> None:
        try:
            if self.server is not None and not self.shard.bugs:
                self._all_leave()
                self._honest_step()
                self._honest_step()
                self.run(self.shard.call("Status", b""))
                self.loop.run_until_complete(self.shard.close())
                self.nothing_has_failed()
                checkpointer = self.shard.parts.checkpointer
                assert checkpointer is not None
                assert self.clips or not checkpointer.facts.error, checkpointer.facts.error
        finally:
            self.end()

    def end(self) -> None:
        """Forget the server, whatever has become of it."""
        if self.server is not None:
            self.server.forget()
        tasks = asyncio.all_tasks(self.loop)
        for task in tasks:
            task.cancel()
        self.loop.run_until_complete(asyncio.wait(tasks, timeout=1.0) if tasks else asyncio.sleep(0))
        self.loop.close()
        self.folder.cleanup()


def search(seconds: float, seed: int, *, sequences: int = 20) -> int:
    """Run random sequences, so many and then for so long; raise what the first failure raises.

    Args:
        seconds: Time after which no more begin; 0 for the first ``sequences`` alone.
        seed: Of the first ``sequences``; the next so many have the next seed.

    Returns:
        The number of sequences.
    """
    end, examples = time.monotonic() + seconds, 0
    for number in itertools.count(seed):
        run_state_machine_as_test(
            seeded(number)(Hostile),
            settings=settings(
                max_examples=sequences,
                stateful_step_count=40,
                deadline=None,
                database=None,
                phases=[Phase.generate],  # a failure is told at once, not made smaller first
                suppress_health_check=list(HealthCheck),
            ),
        )
        examples += sequences
        if time.monotonic() > end:
            return examples
    return examples


@click.command(context_settings={"show_default": True})
@click.option("--seconds", default=600, type=click.IntRange(min=1))
@click.option("--seed", default=1, type=click.IntRange(min=1), help="Of the first twenty sequences.")
def main(seconds: int, seed: int) -> None:
    """Hostile members against a whole server; fails at the first thing that does not hold."""
    logging.getLogger("torch_ps").setLevel(logging.ERROR)
    logging.getLogger("torch_ps").propagate = False
    click.echo(f"{search(seconds, seed)} sequences, nothing failed")


if __name__ == "__main__":
    main()
