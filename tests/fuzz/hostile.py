"""Hostile members of a job, as a state machine: well-formed frames with hostile content, to a whole server.

    python -m tests.fuzz.hostile --seconds 600 --seed 1

One worker, h0, is honest. Others join, push, repeat, park, ask, leave and break their streams, with fields changed to
what nobody would send (``messages.py``). gRPC or sockets carry the streams, drawn for each sequence; over a socket come
also bytes that are no message. After each of these

  1. nothing has raised but a ``PsError``, on any path, and the server goes on;
  2. the stream of h0 is open, and its next push is answered, if need be once the others have left;
  3. parameters are finite, unless a hyperparameter was sent;
  4. no push is applied twice, and versions, pushes and samples are those of what was applied;
  5. what a checkpoint and a standby get can be written: finite numbers in JSON.

Rules 2 to 5 hold for whatever the others send, as all of it is refused, or in range. ``mutants.py`` has bugs that it
has to find.
"""

import itertools
import logging
import math
import struct
import time
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
from tests.fuzz.socket_link import SocketLink
from tests.fuzz.whole_job import OPTIMIZERS, Member, WholeJob
from torch_ps.common import version
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.wire.frames import MAX_MESSAGE_BYTES, pack
from torch_ps.common.wire.socket_frames import PREFIX

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

SEEDS = st.integers(0, 2**32)


class Hostile(RuleBasedStateMachine):
    """See the module."""

    job: WholeJob  # from ``begin`` on

    @initialize(
        seed=SEEDS,
        mode=st.sampled_from(["sync", "async", "ssp", "compensated"]),
        optimizer=st.sampled_from(sorted(OPTIMIZERS)),
        clips=st.booleans(),
        sockets=st.booleans(),
    )
    def begin(self, seed: int, mode: str, optimizer: str, clips: bool, sockets: bool) -> None:
        self.job = WholeJob(seed, mode, optimizer, clips=clips, sockets=sockets)

    # -------------------------------------------------------------- the others

    @rule(seed=SEEDS, name=st.sampled_from(OTHERS), changes=st.sampled_from([0, 0, 0, 1, 2]))
    def join(self, seed: int, name: str, changes: int) -> None:
        self.job.random.seed(seed)
        member = self.job.join(name, changes)
        if isinstance(member, Member):
            if member.name == "h0":  # it took the name of h0 while that had no stream: never
                raise AssertionError("h0 has been replaced")
            self.job.others[member.name] = member
            self.job.connect(member, self.job.random.choice((0, 0, 0, 1)))
            if member.link is not None and not member.link.open:
                self.job.connect(member)

    @rule(seed=SEEDS, name=st.sampled_from(OTHERS), number=st.integers(1, 4), changes=st.sampled_from([0, 0, 1, 1, 2]))
    def frames(self, seed: int, name: str, number: int, changes: int) -> None:
        """Some frames, several in one message now and then; each right but for some fields."""
        self.job.random.seed(seed)
        member = self.job.other(name)
        if member is None or member.link is None:
            return
        whole: list[bytes] = []
        for position in range(number):
            header, payload = self._frame(member)
            changed(self.job.random, header, changes)
            self._note_wild(header)
            if payload and (position == number - 1 or self.job.random.random() < 0.7):
                member.link.send(b"".join([*whole, pack(header, [payload])]))
                whole = []
            else:
                whole.append(pack(header))
        if whole:
            member.link.send(b"".join(whole))
        self.job.pump(member)

    def _note_wild(self, header: pb.UpHeader) -> None:
        self.job.wild = self.job.wild or bool(header.push.hyper)
        header.ballot.vote.ClearField("served") if header.HasField("ballot") else None

    def _frame(self, member: Member) -> tuple[pb.UpHeader, bytes]:
        bucket = self.job.random.choice(self.job.buckets)
        push, _ = self.job.push_of(member, bucket)
        payload = struct.pack(f"{bucket.numel}f", *[self.job.random.choice(VALUES) for _ in range(bucket.numel)])
        kind = self.job.random.choice(KINDS)
        match kind:
            case "push":
                return pb.UpHeader(push=push), payload
            case "parked":
                push.epoch += self.job.random.choice((1, 1, 2, 2**32))
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
                term = pb.Term(number=self.job.random.choice((1, 2**32, 2**62, 2**64 - 1)), server="127.0.0.1:3/x")
                vote = pb.Vote(promised=term)
                paper = self.job.random.choice((pb.BallotPaper(vote=vote), pb.BallotPaper(accepted=term)))
                return pb.UpHeader(ballot=paper), b""

    @rule(seed=SEEDS, name=st.sampled_from(OTHERS), kind=st.sampled_from(["long", "half", "end", "empty", "noise"]))
    def rough(self, seed: int, name: str, kind: str) -> None:
        """Over a socket, bytes that are no message, not all of one, or longer than any: that ends the stream."""
        self.job.random.seed(seed)
        member = self.job.other(name)
        if member is None or not isinstance(member.link, SocketLink):
            return
        link, dice = member.link, self.job.random
        match kind:
            case "long":
                over = MAX_MESSAGE_BYTES + dice.choice((1, 1 << 20, 1 << 30))
                link.send_bytes(PREFIX.pack(*dice.choice(((over, 0), (0, over), (over >> 1, over)))))
            case "half":
                link.send_bytes(PREFIX.pack(100, 0)[: dice.randrange(1, PREFIX.size)] + bytes(dice.choice((0, 50))))
            case "end":
                link.send_bytes(PREFIX.pack(4 | 1 << 31, dice.choice((0, 4))) + dice.randbytes(8))
            case "empty":
                link.send_bytes(PREFIX.pack(0, dice.choice((0, 4))) + bytes(4))
            case _:
                link.send_bytes(dice.randbytes(64))
        self.job.pump(member)
        if kind in ("half", "noise"):
            link.send(None)
            self.job.pump(member)
        assert not link.open, f"the stream goes on after {kind}"

    @rule(seed=SEEDS, name=st.sampled_from(OTHERS), hyper=st.sampled_from(["lr", "weight_decay", "momentum", "eps"]))
    def hyper(self, seed: int, name: str, hyper: str) -> None:
        """A push that is right but for the type or the size of one hyperparameter."""
        self.job.random.seed(seed)
        member = self.job.other(name)
        if member is None or member.link is None:
            return
        self.job.wild = True
        for bucket in self.job.buckets:
            push, payload = self.job.push_of(member, bucket)
            push.hyper[hyper].CopyFrom(self.job.random.choice(HYPER))
            member.link.send(pack(pb.UpHeader(push=push), [payload]))
        self.job.pump(member)

    @rule(seed=SEEDS, name=st.sampled_from(OTHERS))
    def measure(self, seed: int, name: str) -> None:
        """All ask for the norm of a whole step, and one begins to ask again."""
        self.job.random.seed(seed)
        member = self.job.other(name)
        if member is None or member.link is None:
            return
        for each in self.job.others.values():
            if each.link is not None:
                self.job.ask_norm(each, 0, len(self.job.buckets))
        self.job.ask_norm(member, 1, self.job.random.choice((0, 1)))
        self.job.pump(member)

    @rule(seed=SEEDS, name=st.sampled_from(OTHERS))
    def push_again(self, seed: int, name: str) -> None:
        """One push twice or three times, right but for its weight and the roster that it speaks of."""
        self.job.random.seed(seed)
        member = self.job.other(name)
        if member is None or member.link is None:
            return
        push, _ = self.job.push_of(member, bucket := self.job.random.choice(self.job.buckets))
        epoch = push.epoch
        for _ in range(self.job.random.choice((2, 3))):
            push.weight = self.job.random.choice((1.0, 1.0, 1.0, 2.0**53, 1e308))
            push.epoch = epoch + self.job.random.choice((0, 0, 1))
            payload = struct.pack(f"{bucket.numel}f", *[self.job.random.choice(VALUES) for _ in range(bucket.numel)])
            member.link.send(pack(pb.UpHeader(push=push), [payload]))
            self.job.pump(member)

    @rule(seed=SEEDS, changes=st.integers(0, 3), times=st.sampled_from([1, 1, 1, 8]))
    def request(self, seed: int, changes: int, times: int) -> None:
        """A call of any method, with the secret of somebody or of nobody."""
        self.job.random.seed(seed)
        kind = self.job.random.random()
        for _ in range(times):
            method, message = self._request(kind)
            changed(self.job.random, message, changes)
            for paper in getattr(message, "paper", ()):  # a majority of workers may say who serves
                paper.vote.ClearField("served")
            self.job.run(self.job.server.call(method, message.SerializeToString(), wait=False))

    def _request(self, kind: float) -> tuple[str, Any]:
        """A call that is right, or nearly: of one kind for each number from 0 to 1."""
        speaker = self.job.random.choice([*self.job.others.values(), Member("h3", 1, bytes(16))])
        who: dict[str, Any] = {"worker": speaker.name, "session": speaker.session, "secret": speaker.secret}
        here: dict[str, Any] = {"incarnation": self.job.server.incarnation}
        data = pb.DataSet(name=self.job.random.choice(("", "d")), size=self.job.random.choice((1, 10)), seed=1)
        step = 10**9 + self.job.random.randrange(10**6)
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
            pb.NormRequest(shard=1, step=step, square=1.0, secret=bytes(16), **here),
            pb.KeptRequest(shard=1, version=4, size=10, sha256="0" * 64, secret=bytes(16), **here),
            pb.BallotRequest(**who, take_over=True),
            pb.TraceRequest(**who, **here, part=part),
        )
        message = messages[int(kind * len(messages))]
        return type(message).__name__.removesuffix("Request"), message

    @rule(seed=SEEDS, name=st.sampled_from(OTHERS), changes=st.integers(0, 2))
    def commit(self, seed: int, name: str, changes: int) -> None:
        """Copies of pushes, over another connection than the stream."""
        self.job.random.seed(seed)
        member = self.job.others.get(name)
        if member is None:
            return
        push, _ = self.job.push_of(member, self.job.random.choice(self.job.buckets))
        push.ahead = member.ahead
        header = changed(self.job.random, pb.UpHeader(push=push), changes)
        self._note_wild(header)
        message = pack(pb.UpHeader(hello=self.job.hello(member))) + pack(header)
        self.job.run(self.job.server.stream("Commit", [message]))
        self.job.pump(member)

    @rule(seed=SEEDS, name=st.sampled_from(OTHERS), again=st.booleans())
    def disconnect(self, seed: int, name: str, again: bool) -> None:
        self.job.random.seed(seed)
        member = self.job.other(name)
        if member is None or member.link is None:
            return
        member.link.send(None)
        self.job.run(self.job.server.settle())
        if again:
            self.job.connect(member)

    @rule(name=st.sampled_from(OTHERS))
    def leave(self, name: str) -> None:
        member = self.job.others.pop(name, None)
        if member is not None:
            request = pb.LeaveRequest(worker=member.name, session=member.session, secret=member.secret)
            self.job.run(self.job.server.call("Leave", request.SerializeToString()))

    # -------------------------------------------------------------- time, the standby, the honest worker

    @rule()
    def tick(self) -> None:
        self.job.tick()

    @precondition(lambda self: self.job.standby is None)
    @rule()
    def attach(self) -> None:
        """A standby follows, and takes all that it is sent."""
        self.job.attach()

    @rule()
    def honest_step(self) -> None:
        self.job.honest_step()

    @invariant()
    def nothing_has_failed(self) -> None:
        self.job.nothing_has_failed()

    def teardown(self) -> None:
        if hasattr(self, "job"):
            self.job.close()


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
