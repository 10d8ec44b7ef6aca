"""A bug on the way of one push ends that push, that worker, that standby or that checkpoint, wherever it only reads.

Each bug is planted in a whole server without sockets. h0 is an honest worker, and h1 is the one that meets the bug.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from tests.fuzz.hostile import Hostile, Member
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.wire.frames import pack
from torch_ps.ps.engine.bucket_jobs import ResponseEncoder
from torch_ps.ps.engine.parameter_store import Gradient, Store
from torch_ps.ps.failover import records


def job(mode: str, *, clips: bool = False) -> Hostile:
    """A job of h0, which has made a step, and of h1."""
    machine = Hostile()
    machine.bugs_are_planted = True
    machine.begin(seed=1, mode=mode, optimizer="SGD", clips=clips)
    machine.join(seed=2, name="h1", changes=0)
    assert "h1" in machine.others
    return machine


@pytest.fixture
def asynchronous() -> Iterator[Hostile]:
    machine = job("async")
    yield machine
    machine.teardown()  # two more steps of h0, and a checkpoint


@pytest.fixture
def clipping() -> Iterator[Hostile]:
    machine = job("async", clips=True)
    yield machine
    machine.teardown()


def push(machine: Hostile, member: Member) -> None:
    """Push every bucket once."""
    assert member.link is not None
    for bucket in machine.buckets:
        header, payload = machine._push_of(member, bucket)
        member.link.send(pack(pb.UpHeader(push=header), [payload]))
    machine._pump(member)


def test_gradient_that_cannot_be_read_ends_its_worker(
    asynchronous: Hostile, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Store, "_gradient", lambda self, slot, gradient, scratch: 1 / 0)
    other = asynchronous.others["h1"]
    with caplog.at_level(logging.ERROR):
        push(asynchronous, other)
    monkeypatch.undo()
    assert other.link is not None
    assert not other.link.open
    assert "bug" in str(other.link.error)
    assert "please report it" in caplog.text
    assert "ZeroDivisionError" in caplog.text
    asynchronous.nothing_has_failed()
    asynchronous.honest_step()


def test_answer_that_cannot_be_encoded_ends_its_worker(asynchronous: Hostile, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = ResponseEncoder.encode

    def failing(self: ResponseEncoder, bucket: Any, response: Any, encoded: Any) -> Any:
        return encode(self, bucket, response, encoded) if response.release.worker == "h0" else 1 / 0

    monkeypatch.setattr(ResponseEncoder, "encode", failing)
    other = asynchronous.others["h1"]
    push(asynchronous, other)
    assert "bug" in str(other.link and other.link.error)
    asynchronous.honest_step()


def test_norm_of_a_mean_that_cannot_be_computed_ends_the_push(
    clipping: Hostile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Store, "_gradient", lambda self, slot, gradient, scratch: 1 / 0)
    other = clipping.others["h1"]
    push(clipping, other)
    monkeypatch.undo()
    assert "bug" in str(other.link and other.link.error)
    clipping.honest_step()


def test_question_for_a_norm_that_cannot_be_computed_ends_those_who_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Store, "norm", lambda self, *args: 1 / 0)
    machine = job("sync")
    machine.join(seed=3, name="h2", changes=0)
    for _ in range(2):  # until both take part
        for member in machine.others.values():
            push(machine, member)
        push(machine, machine.honest)
    for member in machine.others.values():
        machine._ask_norm(member, 0, len(machine.buckets))
    machine._pump(machine.honest)
    push(machine, machine.honest)
    errors = [str(member.link and member.link.error) for member in machine.others.values()]
    machine.teardown()
    assert len(errors) == 2
    assert all("bug" in error for error in errors), errors


def test_mean_that_fails_again_without_the_gradient_that_cannot_be_read_ends_no_shard(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine = job("sync")
    machine.join(seed=3, name="h2", changes=0)
    for _ in range(2):  # until both take part
        for member in (*machine.others.values(), machine.honest):
            push(machine, member)
    mean, failures = Store.mean, list[int]()

    def failing(self: Store, bucket: int, gradients: Sequence[Gradient]) -> Any:
        if len(gradients) > 1 or gradients[0].worker == "h1":
            failures.append(len(gradients))
            raise MemoryError("planted")
        return mean(self, bucket, gradients)

    monkeypatch.setattr(Store, "mean", failing)
    members = (*machine.others.values(), machine.honest)
    for member in members:
        push(machine, member)
    monkeypatch.undo()
    errors = [str(member.link and member.link.error) for member in members]
    assert failures[:3] == [3, 1, 2]
    assert all("bug" in error for error in errors), errors
    assert machine.shard.shutdown.failure is None
    machine.end()


def test_copy_for_a_checkpoint_that_fails_costs_that_checkpoint(
    asynchronous: Hostile, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpointer = asynchronous.shard.parts.checkpointer
    assert checkpointer is not None
    export, failures = Store.export, list[int]()

    def failing(self: Store, bucket: int) -> Any:
        if not failures:
            failures.append(bucket)
            raise MemoryError("planted")
        return export(self, bucket)

    monkeypatch.setattr(Store, "export", failing)
    for _ in range(12):
        asynchronous.honest_step()
        asynchronous.tick()
    assert failures
    assert checkpointer.facts.failures == 1
    assert checkpointer.facts.version > 0


def test_record_for_the_standby_that_fails_ends_the_standby(
    asynchronous: Hostile, monkeypatch: pytest.MonkeyPatch
) -> None:
    asynchronous.attach()
    assert asynchronous.shard.parts.replication.follower is not None
    monkeypatch.setattr(records, "of_step", lambda *args, **more: 1 / 0)
    asynchronous._all_leave()
    for _ in range(3):
        asynchronous.honest_step()
    assert asynchronous.shard.parts.replication.follower is None


def test_exception_of_the_optimizer_in_the_middle_of_a_step_ends_the_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = job("async")
    monkeypatch.setattr(Store, "step", lambda self, *args, **more: 1 / 0)
    push(machine, machine.others["h1"])
    assert isinstance(machine.shard.shutdown.failure, ZeroDivisionError)
    machine.end()
