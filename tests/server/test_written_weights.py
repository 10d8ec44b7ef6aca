"""Weights that the training loop has written are those from which the next step goes on, as in plain torch.

The reference writes to its parameters and makes the same steps in one process.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import torch_ps
from tests.support.gpu import STAGED
from tests.support.jobs import PROGRAM, Servers, job
from tests.support.raw_worker import Answer, RawWorker, raw_workers
from torch_ps.common.errors import PsError
from torch_ps.common.optimizer_spec import Hyper
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.wire.frames import pack
from torch_ps.ps.checkpoint.repository import Checkpoints

PARAMS = {"a": torch.linspace(-1.0, 1.0, 8), "b": torch.linspace(2.0, 3.0, 5), "c": torch.linspace(0.0, 1.0, 6)}
SIZES = [each.numel() for each in PARAMS.values()]
NUMEL = sum(SIZES)
HYPER: Hyper = {"lr": 0.25, "momentum": 0.5, "weight_decay": 0.125}


def gradient(seed: int) -> torch.Tensor:
    return torch.randn(NUMEL, generator=torch.Generator().manual_seed(seed))


class Reference:
    """Plain torch in one process: one parameter per tensor."""

    def __init__(self, params: dict[str, torch.Tensor] = PARAMS, **hyper: Any) -> None:
        self.parameters = [torch.nn.Parameter(each.clone()) for each in params.values()]
        self._optimizer = torch.optim.SGD(self.parameters, **{**HYPER, **hyper})

    def write(self, positions: Sequence[int], values: torch.Tensor) -> None:
        """What a loop writes between two steps."""
        parts = torch.split(values, [self.parameters[each].numel() for each in positions])
        for position, part in zip(positions, parts, strict=True):
            self.parameters[position].data.copy_(part)

    def step(self, gradient: torch.Tensor, absent: Sequence[int] = ()) -> torch.Tensor:
        """One step; parameters at the positions ``absent`` have no gradient."""
        for parameter, part in zip(
            self.parameters, torch.split(gradient, [p.numel() for p in self.parameters]), strict=True
        ):
            parameter.grad = part.clone()
        for position in absent:
            self.parameters[position].grad = None
        self._optimizer.step()
        return self.values

    @property
    def values(self) -> torch.Tensor:
        return torch.cat([each.detach() for each in self.parameters])


@contextlib.contextmanager
def running(*names: str, pull_codec: str = "none", hyper: Hyper = HYPER, **settings: Any) -> Iterator[Any]:
    """A job and its workers, which know their first step."""
    with (
        job(workers=len(names), **settings) as servers,
        raw_workers(servers, PARAMS, names, pull_codec=pull_codec, hyper=hyper) as workers,
    ):
        for worker in workers:
            worker.pull(0)
        yield servers, *workers


def push(worker: RawWorker, gradient: torch.Tensor, number: int, **fields: Any) -> None:
    """Send a gradient ahead and push it, with ``values`` for the pieces that are ``written``."""
    values = fields.pop("values", None)
    worker.ahead(0, number, gradient)
    worker.push(0, values, ahead=number, **fields)


@pytest.mark.parametrize("program", [PROGRAM, STAGED])
def test_step_goes_on_from_the_values_that_the_loop_has_written(program: str) -> None:
    with running("w0", program=program) as (_, worker):
        plain = Reference()
        for step, positions in enumerate([(), (1,), (0, 2), (0, 1, 2), ()]):
            values = torch.randn(sum(SIZES[each] for each in positions))
            plain.write(positions, values)
            push(worker, gradient(step), step + 1, written=positions, values=values if positions else None)
            assert torch.equal(worker.answer().values, plain.step(gradient(step)))


def test_written_values_that_overtake_their_gradient_wait_for_it() -> None:
    with running("w0") as (_, worker):
        plain, values = Reference(), torch.full((5,), 7.0)
        worker.push(0, values, ahead=1, written=[1])
        assert torch.equal(worker.pull(0).values, plain.values)
        worker.ahead(0, 1, gradient(1))
        plain.write([1], values)
        assert torch.equal(worker.answer().values, plain.step(gradient(1)))


@pytest.mark.parametrize("program", [PROGRAM, STAGED])
def test_parameter_without_a_gradient_is_written_and_not_stepped(program: str) -> None:
    with running("w0", program=program) as (_, worker):
        plain = Reference()
        cases: list[tuple[Sequence[int], Sequence[int]]]
        cases = [((), ()), ((1,), (1,)), ((1, 2), (0, 1)), ((0, 1, 2), (2,)), ((), ())]
        for step, (absent, positions) in enumerate(cases):
            values = torch.randn(sum(SIZES[each] for each in positions))
            plain.write(positions, values)
            sent = gradient(step)
            push(worker, sent, step + 1, absent=absent, written=positions, values=values if positions else None)
            assert torch.equal(worker.answer().values, plain.step(sent, absent))


@pytest.mark.parametrize("fields", [{"missing": True}, {"weight": 0.0}, {"weight": 0.0, "nonfinite": True}])
def test_written_values_count_in_a_step_without_a_gradient(fields: dict[str, Any]) -> None:
    """Neither momentum nor weight decay moves anything then."""
    with running("w0") as (_, worker):
        plain, values = Reference(), torch.tensor([math.nan, -math.inf, 0.0, 1.0, 2.0])
        push(worker, gradient(1), 1)
        worker.answer()
        plain.step(gradient(1))
        worker.push(0, values, written=[1], **fields)
        plain.write([1], values)
        assert torch.equal(worker.answer().values.nan_to_num(3.0), plain.values.nan_to_num(3.0))
        worker.push(0, torch.ones(5), written=[1], **fields)
        worker.answer()
        plain.write([1], torch.ones(5))
        push(worker, gradient(2), 2)
        assert torch.equal(worker.answer().values, plain.step(gradient(2)))


def test_push_without_a_gradient_needs_no_payload() -> None:
    with running("w0", "w1") as (_, first, second):
        plain = Reference()
        push(first, gradient(1), 1)
        second.push(0, missing=True)
        assert torch.equal(first.answer().values, plain.step(gradient(1) / 2))
        second.answer()
        push(first, gradient(2), 2)
        second.push(0, weight=0.0)
        assert torch.equal(first.answer().values, plain.step(gradient(2)))


def test_gradient_that_is_not_finite_is_left_out_and_the_written_values_are_not() -> None:
    with running("w0", "w1") as (servers, first, second):
        plain, bad = Reference(), gradient(1)
        bad[3] = math.nan
        push(first, bad, 1, written=[1], values=torch.ones(5))
        second.push(0, missing=True)
        plain.write([1], torch.ones(5))
        answer = first.answer()
        second.answer()
        assert torch.equal(answer.values[8:13], torch.ones(5))
        assert servers.status().nonfinite == 1


# ------------------------------------------------------------------ several workers


def both(
    workers: Sequence[RawWorker], step: int, writes: Sequence[tuple[Sequence[int], torch.Tensor | None]]
) -> list[Answer]:
    """All push, the last rank first; ``writes`` are by rank."""
    for rank, worker in reversed(list(enumerate(workers))):
        positions, values = writes[rank]
        push(worker, gradient(10 * step + rank), step + 1, written=positions, values=values)
    return [worker.answer() for worker in workers]


def test_values_of_the_lowest_rank_that_wrote_count_and_workers_that_differ_are_told_once() -> None:
    with running("w0", "w1", "w2") as (servers, *workers):
        plain = Reference()
        ones, twos = torch.ones(NUMEL), torch.full((NUMEL,), 2.0)
        cases: list[list[tuple[Sequence[int], torch.Tensor | None]]] = [
            [([1], ones[:5]), ([1], ones[:5]), ([1], ones[:5])],  # as in a loop that runs everywhere
            [((), None), ([2], twos[:6]), ([2], twos[:6])],  # rank 0 did not write
            [([1], ones[:5]), ([0], twos[:8]), ((), None)],  # different tensors
            [((), None), ([0, 1], ones[:13]), ([1], twos[:5])],
            [([1], ones[:5]), ([0, 1], twos[:13]), ((), None)],
        ]
        for step, writes in enumerate(cases):
            for positions, values in reversed(writes):
                if values is not None:
                    plain.write(positions, values)
            expected = plain.step(sum((gradient(10 * step + rank) for rank in range(3)), torch.zeros(NUMEL)) / 3)
            for answer in both(workers, step, writes):
                assert torch.equal(answer.values, expected)
            assert len(servers.status().advice) == (step > 2)
        (advice,) = servers.status().advice
        assert "workers 'w1' and 'w2' have written different values to tensor 'b' before step 3" in advice
        assert servers.log.count("have written different values") == 1


def test_asynchronous_values_are_set_as_they_come() -> None:
    with running("w0", "w1", mode="async") as (servers, first, second):
        plain = Reference()
        plain.write([1], torch.ones(5))
        push(first, gradient(1), 1, written=[1], values=torch.ones(5))
        assert torch.equal(first.answer().values, plain.step(gradient(1)))
        plain.write([1], torch.zeros(5))
        push(second, gradient(2), 1, written=[1], values=torch.zeros(5))
        answer = second.answer()
        assert answer.header.staleness == 1
        assert torch.equal(answer.values, plain.step(gradient(2)))
        assert not servers.status().advice


def test_values_of_a_push_that_is_refused_are_lost_and_that_is_told_once() -> None:
    with running("w0", "w1", mode="async", max_staleness=0) as (servers, first, second):
        plain = Reference()
        for step in range(2):
            push(first, gradient(step), step + 1)
            assert torch.equal(first.answer().values, plain.step(gradient(step)))
            push(second, gradient(9), 9 + step, written=[1], values=torch.ones(5))
            answer = second.answer()
            assert not answer.header.applied
            assert torch.equal(answer.values, plain.values)
        (advice,) = servers.status().advice
        assert "what worker 'w1' has written to tensor 'b' is lost with its push, which came too late" in advice


def test_delay_compensation_takes_the_written_values_as_those_that_the_gradient_is_of() -> None:
    strength = 0.5
    with running("w0", "w1", mode="async", delay_compensation=f"constant:{strength}", hyper={"lr": 0.25}) as (
        _,
        first,
        second,
    ):
        plain = Reference(momentum=0.0, weight_decay=0.0)
        before = plain.values
        push(first, gradient(1), 1)
        now = plain.step(gradient(1))
        assert torch.equal(first.answer().values, now)
        # The second worker has written ones to b; elsewhere its gradient is of what it pulled before that step.
        plain.write([1], torch.ones(5))
        of, now = before.clone(), now.clone()
        of[8:13] = now[8:13] = 1.0
        corrected = torch.addcmul(gradient(2), (now - of) * gradient(2), gradient(2), value=strength)
        push(second, gradient(2), 1, written=[1], values=torch.ones(5))
        assert torch.equal(second.answer().values, plain.step(corrected))


# ------------------------------------------------------------------ what else looks at the parameters


def test_clipped_step_goes_on_from_the_written_values() -> None:
    with running("w0", clip_norm=0.5) as (_, worker):
        plain = Reference()
        for step in range(3):
            values = torch.full((5,), float(step))
            plain.write([1], values)
            push(worker, gradient(step), step + 1, written=[1], values=values)
            square = float(torch.linalg.vector_norm(gradient(step), dtype=torch.float64)) ** 2
            expected = plain.step(gradient(step) * (0.5 / (math.sqrt(square) + 1e-6)))
            assert torch.equal(worker.answer().values, expected)


@pytest.mark.parametrize("codec", ["int8", "sign", "topk:0.1"])
def test_worker_with_lossy_pulls_gets_a_bucket_that_was_written_to_whole(codec: str) -> None:
    with running("w0", "w1", pull_codec=codec, mode="async") as (_, first, second):
        plain = Reference()
        for step, worker in enumerate((first, second, first)):
            push(worker, gradient(step), 1 + step)
            assert worker.answer().header.delta
            plain.step(gradient(step))
        plain.write([0], torch.ones(8))
        push(first, gradient(9), 9, written=[0], values=torch.ones(8))
        expected = plain.step(gradient(9))
        for answer in (first.answer(), second.pull(0)):
            assert not answer.header.delta
            assert torch.equal(answer.values, expected)
        push(first, gradient(10), 10)
        assert first.answer().header.delta


def test_written_values_reach_every_shard() -> None:
    params = {"a": torch.zeros(1000), "b": torch.zeros(600)}
    with job(shards=2) as servers, raw_workers(servers, params, hyper=HYPER) as (worker,):
        assert {bucket.shard for bucket in worker.buckets} == {0, 1}
        plain = Reference(params)
        plain.write([0, 1], torch.arange(1600.0))
        plain.step(torch.ones(1600))
        whole = []
        for bucket in worker.buckets:
            worker.pull(bucket.index)
            begins = [(0, 1000)[piece.tensor] for piece in bucket.pieces]
            spans = [(b + p.start, b + p.stop) for b, p in zip(begins, bucket.pieces, strict=True)]
            values = torch.cat([torch.arange(float(start), float(stop)) for start, stop in spans])
            worker.ahead(bucket.index, 1, torch.ones(bucket.numel))
            worker.push(bucket.index, values, ahead=1, written=range(len(spans)))
            whole.append(worker.answer(bucket.shard).values)
        assert torch.equal(torch.cat(whole), plain.values)


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_gradient_in_shared_memory_travels_without_the_frame_that_has_the_written_values(mode: str) -> None:
    with running("w0", mode=mode) as (_, worker):
        worker.share()
        plain = Reference()
        for step in range(3):
            values = torch.full((6,), float(step))
            plain.write([2], values)
            worker.push_in_place(0, gradient(step), values, written=[2])
            answer = worker.answer()
            assert answer.header.place == (pb.PARAMETERS if mode == "sync" else pb.ANSWERS)
            assert torch.equal(answer.values, plain.step(gradient(step)))


def test_checkpoint_has_the_written_values_and_the_step_after_them(tmp_path: Path) -> None:
    with running("w0", checkpoint=str(tmp_path), checkpoint_every=2) as (_, worker):
        plain = Reference()
        for step in range(2):
            plain.write([1], torch.full((5,), float(step)))
            push(worker, gradient(step), step + 1, written=[1], values=torch.full((5,), float(step)))
            assert torch.equal(worker.answer().values, plain.step(gradient(step)))
    kept = Checkpoints(str(tmp_path))
    manifest = kept.read(2)
    (part,) = kept.parts(manifest)
    assert torch.equal(kept.load(manifest, part).buckets[0].tensors["values"], plain.values)


# ------------------------------------------------------------------ refusals


@pytest.fixture(scope="module")
def servers() -> Iterator[Servers]:
    with job() as found:
        yield found


@pytest.mark.parametrize(
    ("fields", "size", "error", "message"),
    [
        ({"written": [3], "missing": True}, 4 * 5, torch_ps.CorruptFrame, "position 3 after -1 in bucket 0 of 3"),
        ({"written": [1, 1], "missing": True}, 4 * 10, torch_ps.CorruptFrame, "position 1 after 1 .* positions grow"),
        ({"written": [2, 1], "missing": True}, 4 * 11, torch_ps.CorruptFrame, "position 1 after 2 .* positions grow"),
        ({"written": [2**32 - 1], "ahead": 1}, 0, torch_ps.CorruptFrame, "position 4294967295 after -1"),
        ({"written": [1], "missing": True}, 4 * 4, torch_ps.CorruptFrame, "16 bytes of written weights for 5 values"),
        ({"written": [1], "ahead": 1}, 4 * 5 + 1, torch_ps.CorruptFrame, "21 bytes of written weights for 5 values"),
        ({"written": [0, 1]}, 4 * 13, torch_ps.ProtocolError, "'w0' sends written weights .* in the place of its grad"),
        ({"written": [1], "arena_bytes": 4}, 4 * 5, torch_ps.CorruptFrame, "shares none with this shard"),
    ],
)
def test_written_values_that_cannot_be_taken_are_refused(
    servers: Servers, fields: dict[str, Any], size: int, error: type[PsError], message: str
) -> None:
    with raw_workers(servers, PARAMS, hyper=HYPER) as (worker,):
        before = worker.pull(0)
        header = worker.header(0, **fields)
        worker.send(0, pack(pb.UpHeader(push=header), (bytes(size),)))
        with pytest.raises(error, match=message):
            worker.answer()
        worker.open()
        after = worker.pull(0)
        assert after.header.version == before.header.version
        assert torch.equal(after.values, before.values)
