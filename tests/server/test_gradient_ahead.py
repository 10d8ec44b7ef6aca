"""Gradients that are sent while backward runs: nothing happens before a push names them, and then exactly once."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import torch_ps
from tests.support.jobs import Servers, job
from tests.support.raw import raw
from tests.support.raw_worker import RawWorker, raw_workers
from torch_ps.common.errors import PsError
from torch_ps.common.optimizer_spec import Hyper
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.wire.frames import pack

PARAMS = {"a": torch.linspace(-1.0, 1.0, 8), "b": torch.linspace(2.0, 3.0, 5)}
NUMEL = 13
LR = 0.25
HYPER: Hyper = {"lr": LR}


def gradient(seed: int) -> torch.Tensor:
    return torch.randn(NUMEL, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def servers() -> Iterator[Servers]:
    with job() as found:
        yield found


@pytest.fixture
def worker(servers: Servers) -> Iterator[RawWorker]:
    """The only worker of a synchronous job, which knows its next step."""
    with raw_workers(servers, PARAMS, hyper=HYPER) as (found,):
        found.pull(0)
        yield found


def stepped(values: torch.Tensor, *gradients: torch.Tensor) -> torch.Tensor:
    """``values`` after plain torch has made a step with each of ``gradients``."""
    parameter = values.clone().requires_grad_()
    optimizer = torch.optim.SGD([parameter], lr=LR)
    for each in gradients:
        parameter.grad = each.clone()
        optimizer.step()
    return parameter.detach()


def held_first(worker: RawWorker) -> None:
    worker.ahead(0, 1, gradient(1))
    worker.push(0, ahead=1)


def overtaken(worker: RawWorker) -> None:
    worker.push(0, ahead=1)
    worker.ahead(0, 1, gradient(1))


def replaced(worker: RawWorker) -> None:
    worker.ahead(0, 1, gradient(7))
    worker.ahead(0, 2, gradient(1))
    worker.push(0, ahead=2)


def replaced_and_overtaken(worker: RawWorker) -> None:
    worker.ahead(0, 1, gradient(7))
    worker.push(0, ahead=3)
    worker.ahead(0, 2, gradient(8))
    worker.ahead(0, 3, gradient(1))


def sent_again_in_the_push(worker: RawWorker) -> None:
    worker.ahead(0, 1, gradient(7))
    worker.push(0, gradient(1))


@pytest.mark.parametrize("send", [held_first, overtaken, replaced, replaced_and_overtaken, sent_again_in_the_push])
def test_step_is_made_with_the_gradient_that_the_push_names(
    worker: RawWorker, send: Callable[[RawWorker], None]
) -> None:
    before = worker.pull(0)
    send(worker)
    answer = worker.answer()
    assert answer.header.applied
    assert answer.header.version == before.header.version + 1
    assert torch.equal(answer.values, stepped(before.values, gradient(1)))


def copied_first(worker: RawWorker) -> None:
    worker.ahead(0, 1, gradient(1))
    worker.pull(0)  # so that the gradient has come
    worker.copy(0, ahead=1)
    worker.push(0, ahead=1)


def copied_before_the_gradient(worker: RawWorker) -> None:
    worker.copy(0, ahead=1)
    worker.push(0, ahead=1)
    worker.ahead(0, 1, gradient(1))


def copied_late(worker: RawWorker) -> None:
    worker.push(0, ahead=1)
    worker.pull(0)
    worker.copy(0, ahead=1)
    worker.ahead(0, 1, gradient(1))


@pytest.mark.parametrize("send", [copied_first, copied_before_the_gradient, copied_late])
def test_push_and_its_copy_are_applied_and_answered_once(worker: RawWorker, send: Callable[[RawWorker], None]) -> None:
    before = worker.pull(0)
    send(worker)
    answer = worker.answer()
    assert answer.header.applied
    assert torch.equal(answer.values, stepped(before.values, gradient(1)))
    after = worker.pull(0)  # the next answer, so there is no second one to the push
    assert not after.header.HasField("step")
    assert after.header.version == before.header.version + 1


def test_copy_alone_is_applied_before_the_push_comes(worker: RawWorker) -> None:
    before = worker.pull(0)
    worker.ahead(0, 1, gradient(1))
    worker.pull(0)
    worker.copy(0, ahead=1)
    assert torch.equal(worker.answer().values, stepped(before.values, gradient(1)))
    worker.push(0, ahead=1, step=before.header.next_step, base=before.header.version)  # which has come late
    assert worker.pull(0).header.version == before.header.version + 1


def test_refusal_of_a_copy_leaves_the_push_to_be_refused_where_its_worker_hears_it(worker: RawWorker) -> None:
    before = worker.pull(0)
    worker.ahead(0, 1, gradient(1))
    worker.pull(0)
    wrong = before.header.next_step + 5
    with pytest.raises(PsError, match="is open"):
        worker.copy(0, ahead=1, step=wrong)
    worker.push(0, ahead=1, step=wrong)
    with pytest.raises(PsError, match="is open"):
        worker.answer()
    worker.open()
    assert worker.pull(0).header.version == before.header.version


def test_copy_for_a_stream_that_is_not_there_does_nothing(servers: Servers, worker: RawWorker) -> None:
    before = worker.pull(0)
    push = pack(pb.UpHeader(push=worker.header(0, ahead=1)))
    with raw(servers.addresses[0]) as peer:
        for name, session in (("", 0), ("w7", 7), (worker.name, worker.session + 1)):
            list(peer.call("Commit", [peer.hello(name, session) + push]))
    assert worker.pull(0).header.version == before.header.version


def test_commit_takes_nothing_but_pushes_of_gradients_sent_ahead(servers: Servers, worker: RawWorker) -> None:
    before = worker.pull(0)
    with raw(servers.addresses[0]) as peer:
        hello = peer.hello(worker.name, worker.session)
        for frame in (pack(pb.UpHeader(pull=pb.Pull())), push(bytes(4 * NUMEL)), hello):
            assert "Commit takes Hello, then pushes" in str(peer.error("Commit", [hello + frame]))
        assert "0 bytes" in str(peer.error("Commit", [b""]))
    assert worker.pull(0).header.version == before.header.version


def test_nothing_happens_before_a_push_names_a_gradient_that_has_come(worker: RawWorker) -> None:
    before = worker.pull(0)
    worker.ahead(0, 1, gradient(1))
    seen = worker.pull(0)
    worker.push(0, ahead=2)
    seen_again = worker.pull(0)
    for each in (seen, seen_again):
        assert each.header.version == before.header.version
        assert torch.equal(each.values, before.values)
    worker.ahead(0, 2, gradient(2))
    assert torch.equal(worker.answer().values, stepped(before.values, gradient(2)))


def test_gradient_in_half_precision_is_decoded_by_the_codec_of_its_own_frame(worker: RawWorker) -> None:
    before = worker.pull(0)
    worker.ahead(0, 1, gradient(1), codec="bf16")
    worker.push(0, ahead=1)
    assert torch.equal(worker.answer().values, stepped(before.values, gradient(1).bfloat16().float()))


def test_gradient_ends_with_its_stream(worker: RawWorker) -> None:
    before = worker.pull(0)
    worker.ahead(0, 1, gradient(7))
    worker.pull(0)
    worker.open()
    worker.push(0, ahead=1)
    assert worker.pull(0).header.version == before.header.version
    worker.ahead(0, 1, gradient(1))
    assert torch.equal(worker.answer().values, stepped(before.values, gradient(1)))


@pytest.mark.parametrize("send", [held_first, overtaken])
def test_push_that_is_sent_again_on_the_next_stream_is_answered_and_not_applied(
    worker: RawWorker, send: Callable[[RawWorker], None]
) -> None:
    before = worker.pull(0)
    again = worker.header(0, ahead=1)
    held_first(worker)
    first = worker.answer()
    worker.open()
    if send is held_first:
        worker.ahead(0, 1, gradient(1))
    worker.send(0, pack(pb.UpHeader(push=again)))
    if send is overtaken:
        worker.ahead(0, 1, gradient(1))
    second = worker.answer()
    assert second.header.applied
    assert second.header.step == first.header.step
    assert second.header.version == before.header.version + 1
    assert torch.equal(second.values, first.values)


def test_push_that_is_sent_again_without_its_gradient_is_answered(worker: RawWorker) -> None:
    again = worker.header(0, ahead=1)
    held_first(worker)
    first = worker.answer()
    worker.send(0, pack(pb.UpHeader(push=again)))
    second = worker.answer()
    assert (second.header.applied, second.header.version) == (True, first.header.version)
    assert torch.equal(second.values, first.values)


def test_push_that_waits_ends_with_its_stream(worker: RawWorker) -> None:
    before = worker.pull(0)
    worker.push(0, ahead=1)
    worker.pull(0)
    worker.open()
    worker.ahead(0, 1, gradient(7))
    assert worker.pull(0).header.version == before.header.version


def test_bytes_that_are_sent_ahead_are_counted(servers: Servers, worker: RawWorker) -> None:
    before = servers.status().load.bytes_pushed
    worker.ahead(0, 1, gradient(1))
    worker.ahead(0, 2, gradient(1), codec="bf16")
    worker.push(0, ahead=2)
    worker.answer()
    found = servers.status()
    assert found.load.bytes_pushed - before == found.worker[0].bytes_pushed == 4 * NUMEL + 2 * NUMEL


def ahead(payload: bytes = bytes(4 * NUMEL), **fields: object) -> bytes:
    header = pb.Ahead(**{"bucket": 0, "number": 1, "codec": "none", **fields})  # type: ignore[arg-type]
    return pack(pb.UpHeader(ahead=header), (payload,))


def push(payload: bytes = b"", **fields: object) -> bytes:
    header = pb.Push(**{"weight": 1.0, "codec": "none", **fields})  # type: ignore[arg-type]
    return pack(pb.UpHeader(push=header), (payload,) if payload else ())


@pytest.mark.parametrize(
    ("frames", "error", "message"),
    [
        ([ahead(bucket=7)], torch_ps.CorruptFrame, "bucket 7 is not one of"),
        ([ahead(codec="zip")], torch_ps.UnknownCodec, "'zip' does not exist"),
        ([ahead(payload=bytes(4 * NUMEL - 4))], torch_ps.CorruptFrame, "none payload has 48 bytes; .* needs 52"),
        ([ahead(payload=b"")], torch_ps.CorruptFrame, "none payload has 0 bytes"),
        ([ahead(payload=b"\0\0\xc0\x7f" + bytes(2 * NUMEL), codec="fp16")], torch_ps.CorruptFrame, "scale nan"),
        ([push(ahead=1, bucket=7)], torch_ps.CorruptFrame, "bucket 7 is not one of"),
        ([push(bytes(4 * NUMEL), ahead=1)], torch_ps.CorruptFrame, "names gradient 1 .* another one in its frame"),
        ([push(ahead=1, arena_bytes=52)], torch_ps.CorruptFrame, "names gradient 1 .* another one in shared memory"),
        ([ahead(number=2), push(ahead=1)], torch_ps.ProtocolError, "in whose place gradient 2 has come"),
        ([push(ahead=1), ahead(number=2)], torch_ps.ProtocolError, "gradient 2 has come instead"),
        ([push(ahead=1, step=10**9), ahead()], torch_ps.StepConflict, "step 1000000000 .* is open"),
        ([push(ahead=1, weight=-1.0), ahead()], torch_ps.ProtocolError, "Push.weight is -1.0; it has to be 0 or"),
        ([push(ahead=1, hyper={"zeal": pb.HyperValue(number=1)})], torch_ps.ProtocolError, "no argument 'zeal'"),
    ],
)
def test_frames_that_break_the_contract_end_the_stream_and_change_nothing(
    worker: RawWorker, frames: list[bytes], error: type[PsError], message: str
) -> None:
    before = worker.pull(0)
    for frame in frames:
        worker.send(0, frame)
    with pytest.raises(error, match=message):
        worker.answer()
    worker.open()
    after = worker.pull(0)
    assert after.header.version == before.header.version
    assert torch.equal(after.values, before.values)


def test_observer_cannot_send_a_gradient_ahead(servers: Servers, worker: RawWorker) -> None:
    with raw(servers.addresses[0]) as peer:
        found = peer.exchange(peer.hello(), ahead())
    assert isinstance(found, torch_ps.ProtocolError)
    assert "an observer cannot send ahead here" in str(found)


def test_synchronous_step_waits_for_the_gradient_that_is_still_on_its_way() -> None:
    """Three workers, in three ways; the mean is that of plain torch whatever comes last."""
    with job(workers=3) as servers, raw_workers(servers, PARAMS, ("w0", "w1", "w2"), hyper=HYPER) as workers:
        first, second, third = workers
        values = first.pull(0).values
        for step in range(3):
            gradients = [gradient(10 * step + rank) for rank in range(3)]
            second.push(0, ahead=step + 1)
            first.ahead(0, step + 1, gradients[0])
            first.push(0, ahead=step + 1)
            third.push(0, gradients[2])
            assert second.pull(0).header.version == step
            second.ahead(0, step + 1, gradients[1])
            values = stepped(values, (gradients[0] + gradients[1] + gradients[2]) / 3)
            for worker in workers:
                assert torch.equal(worker.answer().values, values)


@pytest.mark.parametrize("mode", ["async", "ssp"])
def test_push_that_waits_for_its_gradient_is_as_stale_as_when_that_comes(mode: str) -> None:
    with job(mode=mode) as servers, raw_workers(servers, PARAMS, ("w0", "w1"), hyper=HYPER) as (first, second):
        values = first.pull(0).values
        second.pull(0)
        first.push(0, ahead=1)
        first.pull(0)
        second.push(0, gradient(2))
        assert torch.equal(second.answer().values, values := stepped(values, gradient(2)))
        first.ahead(0, 1, gradient(1))
        answer = first.answer()
        assert answer.header.staleness == 1
        assert torch.equal(answer.values, stepped(values, gradient(1)))


def test_flood_of_gradients_that_nobody_names_takes_the_memory_of_one_for_each_bucket() -> None:
    params = {"x": torch.zeros(1 << 20)}
    with job(bucket_size=1.0) as servers, raw_workers(servers, params, hyper=HYPER) as (worker,):
        for bucket in worker.buckets:
            worker.pull(bucket.index)
        process = Path(f"/proc/{servers.processes[0].pid}")
        (process / "clear_refs").write_text("5")  # a new VmHWM
        before = memory(process, "VmRSS")
        for number in range(1, 51):
            for bucket in worker.buckets:
                worker.ahead(bucket.index, number, torch.ones(bucket.numel))
            worker.pull(0)  # no more is on its way than one gradient
        assert memory(process, "VmHWM") - before < 64 << 10
        assert servers.status().load.bytes_pushed == 50 * (4 << 20)
        for bucket in worker.buckets:
            worker.push(bucket.index, ahead=50)
        for _ in worker.buckets:
            values = worker.answer().values
            assert torch.equal(values, torch.full_like(values, -LR))
        worker.push(1, ahead=60, covers=[pb.Covers(samples=1)])
        with pytest.raises(torch_ps.ProtocolError, match="'w0' covers samples with bucket 1; bucket 0 does that"):
            worker.answer()


def memory(process: Path, line: str) -> int:
    """Kilobytes of a process."""
    return int((process / "status").read_text().split(f"{line}:")[1].split()[0])
