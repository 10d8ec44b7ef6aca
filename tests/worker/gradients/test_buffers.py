"""Buffers as buckets: which are shared and how, every dtype and layout, and what a loop may do to them."""

import logging
import re
from typing import Any

import pytest
import torch
from torch import nn

from torch_ps.common.plan import Bucket, plan
from torch_ps.common.schema import Group, Model, TensorSpec
from torch_ps.worker.gradients.buffers import Buffers
from torch_ps.worker.gradients.flat_tensors import empty_fp32

#: Values that fp32 cannot hold, or that it would not give back with their bits.
VALUES: dict[str, torch.Tensor] = {
    "float32": torch.tensor([0.1, -0.0, torch.inf, torch.nan]),
    "float64": torch.tensor([[0.1, 1e300]], dtype=torch.float64),
    "float16": torch.tensor([0.1, 6e4, 0.3], dtype=torch.float16),
    "bfloat16": torch.tensor([0.1, 1e30], dtype=torch.bfloat16),
    "float8": torch.tensor([0.5, 3.0, 8.0]).to(torch.float8_e4m3fn),
    "int64": torch.tensor(2**53 + 1),
    "int32": torch.tensor([2**30 + 1]),
    "uint8": torch.arange(70, dtype=torch.uint8),
    "uint64": torch.tensor([2**63 + 1], dtype=torch.uint64),
    "bool": torch.tensor([True, False, True]),
    "complex64": torch.tensor([1 + 2j, -3j]),
    "conjugate": torch.tensor([1 + 2j, -3j]).conj(),
    "empty": torch.zeros(0, 3),
    "expanded": torch.full((1, 3), 0.3).expand(4, 3),
    "expanded scalar": torch.tensor(7).expand(5),
    "transposed": torch.arange(12.0).view(3, 4).t(),
    "strided": torch.arange(20, dtype=torch.int64)[::3],
}


def module(values: dict[str, torch.Tensor]) -> Any:
    found = nn.Module()
    for name, value in values.items():
        found.register_buffer(name, value)
    return found


def buckets(buffers: Buffers, bucket_bytes: int = 1 << 20) -> tuple[Bucket, ...]:
    model = Model("SGD", (Group((TensorSpec("w", (3,)),), {}),), tuple(buffers.specs))
    return tuple(bucket for bucket in plan(model, bucket_bytes, 1).buckets if bucket.rule != "optimizer")


def pushed(buffers: Buffers) -> list[torch.Tensor]:
    return [buffers.read(bucket, empty_fp32(bucket.numel)) for bucket in buckets(buffers)]


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.resolve_conj().contiguous().reshape(-1).view(torch.uint8).tolist())


@pytest.mark.parametrize("name", VALUES)
def test_copied_buffer_arrives_with_its_bits_whatever_its_dtype_and_layout(name: str) -> None:
    there, zero = module({"b": VALUES[name]}), torch.zeros_like(VALUES[name])
    if "expanded" in name:
        zero = zero[:1].clone().expand_as(zero)
    here = module({"b": zero})
    sender, receiver = Buffers.of(there, 1), Buffers.of(here, 1)
    for bucket, values in zip(buckets(receiver), pushed(sender), strict=True):
        receiver.write(bucket, values)
    assert bits(here.b) == bits(there.b)


def test_buffer_in_several_buckets_arrives_whole() -> None:
    value = torch.arange(3000, dtype=torch.int64) * (2**33 + 1)
    there, here = module({"a": value, "t": value.view(3, 1000).t()}), module({})
    here.register_buffer("a", torch.zeros_like(value))
    here.register_buffer("t", torch.zeros(3, 1000, dtype=torch.int64).t())
    sender, receiver = Buffers.of(there, 1), Buffers.of(here, 1)
    assert len(buckets(sender, 1024)) > 20
    for bucket in buckets(sender, 1024):
        receiver.write(bucket, sender.read(bucket, empty_fp32(bucket.numel)))
    assert torch.equal(here.a, there.a)
    assert torch.equal(here.t, there.t)


@pytest.mark.parametrize("name", VALUES)
def test_value_that_is_there_already_is_not_written(name: str) -> None:
    buffers = Buffers.of(module({"b": VALUES[name]}), 1)
    before = VALUES[name]._version
    for bucket, values in zip(buckets(buffers), pushed(buffers), strict=True):
        buffers.write(bucket, values)
    assert VALUES[name]._version == before


def test_running_statistics_in_floating_point_are_averaged_and_every_other_buffer_is_copied() -> None:
    model = nn.Sequential(nn.BatchNorm2d(2), nn.InstanceNorm1d(2, track_running_stats=True), nn.Linear(2, 2))
    model.register_buffer("queue", torch.zeros(3))
    model.register_buffer("running_mean_of_rewards", torch.zeros(3))
    own = module({"running_mean": torch.zeros(2, dtype=torch.int64), "running_var": torch.zeros(2).double()})
    model.add_module("own", own)
    copied = {spec.name: spec.copied for spec in Buffers.of(model, 0).specs}
    assert {name for name, each in copied.items() if not each} == {
        "0.running_mean", "0.running_var", "1.running_mean", "1.running_var", "own.running_var"
    }  # fmt: skip
    assert {name for name, each in copied.items() if each} == {
        "queue", "running_mean_of_rewards", "0.num_batches_tracked", "1.num_batches_tracked", "own.running_mean"
    }  # fmt: skip


def test_averaged_buffer_of_float64_keeps_its_bits_where_fp32_says_the_same() -> None:
    model = module({"running_mean": torch.tensor([0.1, 0.2], dtype=torch.float64)})
    exact = model.running_mean.clone()
    buffers = Buffers.of(model, 1)
    (bucket,), (values,) = buckets(buffers), pushed(buffers)
    buffers.write(bucket, values)
    assert torch.equal(model.running_mean, exact)
    buffers.write(bucket, values * 2)
    assert torch.equal(model.running_mean, (values * 2).double())


def test_persistent_buffers_alone_are_shared_and_none_if_all_are_local() -> None:
    model = module({"a": torch.zeros(2)})
    model.register_buffer("scratch", torch.zeros(2), persistent=False)
    model.register_buffer("twice", model.a)
    assert [spec.name for spec in Buffers.of(model, 1).specs] == ["a"]
    assert Buffers.of(model, 1, local=True).specs == []


def test_buffers_that_cannot_be_sent_stay_local_and_one_warning_names_them(caplog: pytest.LogCaptureFixture) -> None:
    model = module(
        {
            "sparse": torch.eye(3).to_sparse(),
            "meta": torch.zeros(2, device="meta"),
            "wide": torch.zeros(2, dtype=torch.complex128),
            "fine": torch.zeros(2),
        }
    )
    with caplog.at_level(logging.WARNING):
        assert [spec.name for spec in Buffers.of(model, 1).specs] == ["fine"]
    assert [record.message for record in caplog.records] == [
        "buffers that cannot be sent stay each worker's own: 'sparse' (sparse_coo), 'meta' (on the meta device), "
        "'wide' (complex128)"
    ]


def test_buffer_that_the_loop_replaces_is_followed() -> None:
    model = module({"b": torch.zeros(2)})
    buffers = Buffers.of(model, 1)
    old, model.b = model.b, torch.ones(2)
    buffers.follow()
    (bucket,), (values,) = buckets(buffers), pushed(buffers)
    assert values.tolist() == [1.0, 1.0]
    buffers.write(bucket, values + 1)
    assert (model.b.tolist(), old.tolist()) == ([2.0, 2.0], [0.0, 0.0])
    assert buffers.tensors[0] is model.b


@pytest.mark.parametrize(
    ("now", "words"),
    [
        (None, "it is gone"),
        (torch.zeros(3), r"it is \[3\] float32 now"),
        (torch.zeros(2).double(), r"it is \[2\] float64 now"),
        (torch.eye(2).to_sparse(), "sparse_coo"),
    ],
)
def test_buffer_of_another_shape_is_absent_with_one_warning_until_it_fits_again(
    now: Any, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = module({"a": torch.ones(2), "b": torch.ones(2)})
    buffers = Buffers.of(model, 1)
    (bucket,) = buckets(buffers)
    model.b = now
    with caplog.at_level(logging.WARNING):
        buffers.follow()
        buffers.follow()
    (record,) = caplog.records
    assert re.fullmatch(
        rf"buffer 'b' \[2\] float32 \(copied\) stays this worker's own from now on: {words}", record.message
    )
    assert buffers.absent(bucket) == (1,)
    assert pushed(buffers)[0].tolist() == [1.0, 1.0, 0.0, 0.0]
    buffers.write(bucket, torch.tensor([3.0, 3.0, 4.0, 4.0]))
    assert model.a.tolist() == [3.0, 3.0]
    assert model.b is now
    model.b = torch.ones(2)
    buffers.follow()
    assert buffers.absent(bucket) == ()
    buffers.write(bucket, torch.tensor([3.0, 3.0, 4.0, 4.0]))
    assert model.b.tolist() == [4.0, 4.0]
