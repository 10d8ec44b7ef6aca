"""One whole server without its sockets, an honest worker h0, and others that the caller has do what they like.

    job.join("h1", 0), job.push_of(member, bucket), member.link.send(...)      what others do
    job.pump(member)                                                           let all that follows from it happen
    job.honest_step()                                                          h0 pushes every bucket, and is answered

``hostile.py`` says what has to hold whatever the others send; ``nothing_has_failed`` and
``state_is_that_of_what_was_applied`` check it.
"""

import asyncio
import json
import math
import random
import struct
import tempfile
import time
from collections.abc import AsyncIterator, Coroutine
from typing import Any

from tests.fuzz.messages import changed
from tests.fuzz.server import Context, Link, Server
from tests.fuzz.socket_link import SocketLink
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
#: Rounds of everything that can happen after which a call that is not answered hangs.
ROUNDS = 20


def model(optimizer: str) -> Model:
    hyper = OPTIMIZERS[optimizer]
    return Model(optimizer, (Group(TENSORS[:1], hyper), Group(TENSORS[1:], {**hyper, "lr": 0.02})), BUFFERS)


class Member:
    """One session of one worker, and what it knows."""

    def __init__(self, name: str, session: int, secret: bytes) -> None:
        self.name, self.session, self.secret = name, session, secret
        self.link: Link | SocketLink | None = None
        self.step: dict[int, int] = {}  # next step, by bucket
        self.version: dict[int, int] = {}
        self.ahead = 0

    def hear(self, header: pb.DownHeader) -> None:
        self.step[header.bucket] = header.next_step
        self.version[header.bucket] = header.version


class WholeJob:
    """The job of one test.

    Args:
        seed: seed of everything that is chosen at random.
        mode: sync, async, ssp, or compensated, which is async with delay compensation.
        optimizer: one of ``OPTIMIZERS``.
        clips: whether gradients are clipped, with the caller in the place of the other shard.
        sockets: whether sockets carry the streams; False: gRPC does.
        bugs_are_planted: whether a test has planted bugs and wants them contained.

    Attributes:
        wild: whether a hyperparameter was sent that may make parameters infinite.
    """

    def __init__(
        self,
        seed: int,
        mode: str,
        optimizer: str,
        *,
        clips: bool = False,
        sockets: bool = False,
        bugs_are_planted: bool = False,
    ) -> None:
        self.loop = asyncio.new_event_loop()
        self.folder = tempfile.TemporaryDirectory(prefix="torch-ps-hostile-")
        self.standby: Context | None = None
        self.acknowledged = 0
        self._bugs_are_planted = bugs_are_planted
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

        async def made() -> Server:
            return Server(config)

        self.server = self.loop.run_until_complete(made())
        self.model, self.clips, self.sockets = model(optimizer), clips, sockets
        self.buckets = plan(self.model, 1024, 2 if clips else 1).of_shard(0)
        self.wild = False
        self.secret = self.random.randbytes(16)
        self.others: dict[str, Member] = {}
        try:
            self._begin()
        except BaseException:
            self.end()
            raise

    def _begin(self) -> None:
        """Have the other shard enter, and h0 join, seed and make a step."""
        if self.clips:
            request = pb.EnterRequest(shard=1, num_shards=2, secret=self.secret, version=version.current())
            reply = self.run(self.server.call("Enter", request.SerializeToString()))
            assert isinstance(reply, pb.EnterReply), reply
        self.honest = self.join("h0", 0)
        assert isinstance(self.honest, Member), self.honest
        self._seed()
        self.connect(self.honest)
        self.honest_step()

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Do something, and all that follows from it; a refusal is returned."""

        async def settled() -> Any:
            task = asyncio.ensure_future(work)
            for _ in range(ROUNDS):
                await self.server.settle()
                self._acknowledge()
                if task.done():
                    break
            assert task.done(), f"nobody answers: {work}"
            self.server.see_applied()
            await self.server.settle()
            return task.exception() if isinstance(task.exception(), PsError) else task.result()

        return self.loop.run_until_complete(settled())

    # -------------------------------------------------------------- members

    def join(self, name: str, changes: int) -> Member | Any:
        request = pb.JoinRequest(
            version=version.current(),
            worker=name,
            model=schema.to_proto(self.model),
            incarnation=self.server.incarnation,
            secret=self.random.randbytes(16),
        )
        changed(self.random, request, changes)
        secret, name = request.secret, request.worker
        reply = self.run(self.server.call("Join", request.SerializeToString()))
        return Member(name, reply.session, secret) if isinstance(reply, pb.JoinReply) else reply

    def other(self, name: str) -> Member | None:
        """One of the others, with a stream: it joins if it has not, and opens one if the server has ended the last."""
        if name not in self.others and isinstance(joined := self.join(name, 0), Member):
            self.others[name] = joined
        member = self.others.get(name)
        if member is not None and (member.link is None or not member.link.open):
            self.connect(member)
        return member

    def connect(self, member: Member, changes: int = 0) -> None:
        hello = changed(self.random, pb.UpHeader(hello=self.hello(member)), changes)

        async def opened() -> Link | SocketLink:
            link = SocketLink(self.server) if self.sockets else Link(self.server)
            link.send(pack(hello))
            return link

        member.link = self.run(opened())

    def hello(self, member: Member) -> pb.Hello:
        codec = "none" if member.name == "h0" else self.random.choice(("none", "fp16", "topk:0.5", "int8"))
        return pb.Hello(
            worker=member.name,
            session=member.session,
            secret=member.secret,
            pull_codec=codec,
            incarnation=self.server.incarnation,
        )

    def _seed(self) -> None:
        member = self.honest
        head = pb.SeedHeader(
            worker=member.name,
            session=member.session,
            secret=member.secret,
            model=schema.to_proto(self.model),
            incarnation=self.server.incarnation,
        )
        frames = [pack(head)]
        for bucket in self.buckets:
            frames.append(pack(pb.SeedHeader(bucket=bucket.index), [bytes(4 * bucket.numel)]))
        assert isinstance(self.run(self.server.stream("Seed", frames)), pb.SeedReply)

    def all_leave(self) -> None:
        job = self.server.parts.job

        async def left() -> None:
            for member in job.lead.roster.members:
                if member.name != "h0":
                    job.leave(member.name, member.session)

        self.run(left())
        self.others.clear()

    # -------------------------------------------------------------- steps

    def honest_step(self) -> None:
        """Push every bucket; each is answered, at the latest when the others are gone."""
        member, asked = self.honest, dict[int, int]()
        assert member.link is not None
        self._pull(member)
        if self.random.random() < 0.5 and not self.server.parts.job.settings.mode.stale:
            self.ask_norm(member, 0, len(self.buckets))
            self.pump(member)
        for bucket in self.buckets:
            push, payload = self.push_of(member, bucket)
            asked[bucket.index] = push.step
            member.link.send(pack(pb.UpHeader(push=push), [payload]))
        for attempt in range(4):
            if attempt == 2:
                self.all_leave()
            for header in self.pump(member):
                if not header.HasField("ballot") and header.HasField("step"):
                    asked = {
                        index: step for index, step in asked.items() if (index, step) != (header.bucket, header.step)
                    }
            if not asked:
                self.state_is_that_of_what_was_applied()
                return
        self.nothing_has_failed()
        engine = self.server.engine
        assert not asked, (
            f"pushes of h0 are not answered: {asked}; {engine and engine.core.holds('h0', member.session)}"
        )

    def push_of(self, member: Member, bucket: Bucket) -> tuple[pb.Push, bytes]:
        engine = self.server.engine
        assert engine is not None
        version = engine.core.versions[engine._local[bucket.index]]
        averages = not self.server.parts.job.settings.mode.stale
        push = pb.Push(
            step=version if averages else member.step.get(bucket.index, 0),
            bucket=bucket.index,
            base=version if averages else member.version.get(bucket.index, version),
            weight=self.random.choice((0.5, 1.0, 4.0)),
            codec="none",
            epoch=self.server.parts.job.roster.epoch,
        )
        return push, struct.pack(f"{bucket.numel}f", *[0.25] * bucket.numel)

    def _pull(self, member: Member) -> None:
        assert member.link is not None
        for bucket in self.buckets:
            member.link.send(pack(pb.UpHeader(pull=pb.Pull(bucket=bucket.index))))
        self.pump(member)

    def ask_norm(self, member: Member, turn: int, number: int) -> None:
        """Send one worker's question for a norm, or the part of it that the first ``number`` buckets are."""
        assert member.link is not None
        for bucket in [bucket for bucket in self.buckets if bucket.rule == "optimizer"][:number]:
            push, payload = self.push_of(member, bucket)
            question = pb.Measure(
                step=push.step, bucket=bucket.index, round=turn, power=2.0, weight=1.0, epoch=push.epoch
            )
            member.link.send(pack(pb.UpHeader(measure=question), [payload]))

    def pump(self, member: Member) -> list[pb.DownHeader]:
        """Let everything happen: the other shard reports its norms, the standby acknowledges, workers vote."""
        found: list[pb.DownHeader] = []
        for _ in range(3):
            self._report_norms()
            self.run(self.server.settle())
            found += self.hear(member)
            for other in self.others.values():
                self.hear(other)
        return found

    def hear(self, member: Member) -> list[pb.DownHeader]:
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

    def _report_norms(self) -> None:
        norms = self.server.parts.job.clipping.norms
        for group, reported in list(norms._reported.items()) if norms is not None else []:
            if 0 in reported and 1 not in reported:
                worker, session, step = group
                request = pb.NormRequest(
                    shard=1,
                    worker=worker,
                    session=session,
                    step=step,
                    square=0.25,
                    incarnation=self.server.incarnation,
                    secret=self.secret,
                )
                self.run(self.server.call("Norm", request.SerializeToString(), wait=False))

    # -------------------------------------------------------------- time, and the standby

    def tick(self) -> None:
        """Do what the server does by the clock."""

        async def ticked() -> None:
            parts = self.server.parts
            parts.job.tick()
            parts.checkpointer.plan() if parts.checkpointer is not None else None
            parts.driver.obey(parts.driver.seat.tick(time.monotonic()))

        self.run(ticked())
        self.pump(self.honest)

    def attach(self) -> None:
        """A standby follows, and takes all that it is sent."""
        self.standby, self.receipts = Context(), asyncio.Queue[bytes]()

        async def messages() -> AsyncIterator[bytes]:
            hello = pb.ReplicaHello(server="127.0.0.1:2/s", version=version.current())
            yield pb.ReplicaUp(hello=hello).SerializeToString()
            while True:
                yield await self.receipts.get()

        async def started() -> None:
            self.server.start(self.server.servicer.replicate(messages(), self.standby))  # type: ignore[arg-type]

        self.run(started())
        self.pump(self.honest)
        assert self.server.parts.replication.follower is not None, "no standby can attach"

    def _acknowledge(self) -> None:
        if self.standby is not None and len(self.standby.written) > self.acknowledged:
            self.acknowledged = len(self.standby.written)
            self.receipts.put_nowait(pb.ReplicaUp(received=self.acknowledged).SerializeToString())

    # -------------------------------------------------------------- what has to hold

    def nothing_has_failed(self) -> None:
        """No bug, and h0 is connected."""
        if bugs := self.server.bugs + ([] if self._bugs_are_planted else self.server.reported):
            raise bugs[0]
        if self.server.shutdown.failure is not None:
            raise self.server.shutdown.failure
        assert self.honest.link is not None
        assert self.honest.link.open, self.honest.link.error

    def state_is_that_of_what_was_applied(self) -> None:
        engine = self.server.engine
        if engine is None:
            return
        names = [(c.worker, c.session, c.step, a.bucket) for a in self.server.applied for c in a.contributions]
        assert len(names) == len(set(names)), "a push has been applied twice"
        for record in engine.core.records():
            mine = [each for each in self.server.applied if each.bucket == record["bucket"]]
            weights = [c.weight for each in mine for c in each.contributions]
            assert record["version"] == len(mine)
            assert record["num_pushes"] == len(weights)
            assert math.isclose(record["samples"], math.fsum(weights), rel_tol=1e-9)
        json.dumps([engine.core.records(), engine.core.data(whole=True)], allow_nan=False)
        if not self.wild:
            for bucket in self.buckets:
                if bucket.rule == "optimizer":
                    assert engine.store.values(bucket.index).isfinite().all(), "a parameter is not finite"

    def close(self) -> None:
        """Two more steps of h0, the last checkpoint, and the end."""
        try:
            if not self.server.bugs:
                self.all_leave()
                self.honest_step()
                self.honest_step()
                self.run(self.server.call("Status", b""))
                self.loop.run_until_complete(self.server.close())
                self.nothing_has_failed()
                checkpointer = self.server.parts.checkpointer
                assert checkpointer is not None
                assert self.clips or not checkpointer.facts.error, checkpointer.facts.error
        finally:
            self.end()

    def end(self) -> None:
        """Forget the server, whatever has become of it."""
        self.server.forget()
        tasks = asyncio.all_tasks(self.loop)
        for task in tasks:
            task.cancel()
        self.loop.run_until_complete(asyncio.wait(tasks, timeout=1.0) if tasks else asyncio.sleep(0))
        self.loop.close()
        self.folder.cleanup()
