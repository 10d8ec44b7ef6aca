"""A bug on the way of one push ends that push, that worker, that standby or that checkpoint, wherever it only reads.

Each bug is planted in a whole server without sockets. h0 is an honest worker, and h1 is the one that meets the bug.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from tests.fuzz.whole_job import Member, WholeJob
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.wire.frames import pack
from torch_ps.ps.engine.bucket_jobs import ResponseEncoder
from torch_ps.ps.engine.parameter_store import Gradient, Store
from torch_ps.ps.failover import records


def job(mode: str, *, clips: bool = False) -> WholeJob:
    """A job of h0, which has made a step, and of h1."""
    whole = WholeJob(1, mode, "SGD", clips=clips, bugs_are_planted=True)
    assert whole.other("h1") is not None
    return whole


@pytest.fixture
def asynchronous() -> Iterator[WholeJob]:
    whole = job("async")
    yield whole
    whole.close()  # two more steps of h0, and a checkpoint


@pytest.fixture
def clipping() -> Iterator[WholeJob]:
    whole = job("async", clips=True)
    yield whole
    whole.close()


def push(whole: WholeJob, member: Member) -> None:
    """Push every bucket once."""
    assert member.link is not None
    for bucket in whole.buckets:
        header, payload = whole.push_of(member, bucket)
        member.link.send(pack(pb.UpHeader(push=header), [payload]))
    whole.pump(member)


def test_gradient_that_cannot_be_read_ends_its_worker(
    asynchronous: WholeJob, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
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


def test_answer_that_cannot_be_encoded_ends_its_worker(asynchronous: WholeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = ResponseEncoder.encode

    def failing(self: ResponseEncoder, bucket: Any, response: Any, encoded: Any) -> Any:
        return encode(self, bucket, response, encoded) if response.release.worker == "h0" else 1 / 0

    monkeypatch.setattr(ResponseEncoder, "encode", failing)
    other = asynchronous.others["h1"]
    push(asynchronous, other)
    assert "bug" in str(other.link and other.link.error)
    asynchronous.honest_step()


def test_norm_of_a_mean_that_cannot_be_computed_ends_the_push(
    clipping: WholeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Store, "_gradient", lambda self, slot, gradient, scratch: 1 / 0)
    other = clipping.others["h1"]
    push(clipping, other)
    monkeypatch.undo()
    assert "bug" in str(other.link and other.link.error)
    clipping.honest_step()


def test_question_for_a_norm_that_cannot_be_computed_ends_those_who_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Store, "norm", lambda self, *args: 1 / 0)
    whole = job("sync")
    assert whole.other("h2") is not None
    for _ in range(2):  # until both take part
        for member in whole.others.values():
            push(whole, member)
        push(whole, whole.honest)
    for member in whole.others.values():
        whole.ask_norm(member, 0, len(whole.buckets))
    whole.pump(whole.honest)
    push(whole, whole.honest)
    errors = [str(member.link and member.link.error) for member in whole.others.values()]
    whole.close()
    assert len(errors) == 2
    assert all("bug" in error for error in errors), errors


def test_mean_that_fails_again_without_the_gradient_that_cannot_be_read_ends_no_shard(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = job("sync")
    assert whole.other("h2") is not None
    for _ in range(2):  # until both take part
        for member in (*whole.others.values(), whole.honest):
            push(whole, member)
    mean, failures = Store.mean, list[int]()

    def failing(self: Store, bucket: int, gradients: Sequence[Gradient]) -> Any:
        if len(gradients) > 1 or gradients[0].worker == "h1":
            failures.append(len(gradients))
            raise MemoryError("planted")
        return mean(self, bucket, gradients)

    monkeypatch.setattr(Store, "mean", failing)
    members = (*whole.others.values(), whole.honest)
    for member in members:
        push(whole, member)
    monkeypatch.undo()
    errors = [str(member.link and member.link.error) for member in members]
    assert failures[:3] == [3, 1, 2]
    assert all("bug" in error for error in errors), errors
    assert whole.server.shutdown.failure is None
    whole.end()


def test_copy_for_a_checkpoint_that_fails_costs_that_checkpoint(
    asynchronous: WholeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpointer = asynchronous.server.parts.checkpointer
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
    asynchronous: WholeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    asynchronous.attach()
    assert asynchronous.server.parts.replication.follower is not None
    monkeypatch.setattr(records, "of_step", lambda *args, **more: 1 / 0)
    asynchronous.all_leave()
    for _ in range(3):
        asynchronous.honest_step()
    assert asynchronous.server.parts.replication.follower is None


def test_exception_of_the_optimizer_in_the_middle_of_a_step_ends_the_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = job("async")
    monkeypatch.setattr(Store, "step", lambda self, *args, **more: 1 / 0)
    push(whole, whole.others["h1"])
    assert isinstance(whole.server.shutdown.failure, ZeroDivisionError)
    whole.end()
