"""Codecs that run where the values are, and pinned memory: the same bytes and values as on the CPU."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.gpu import DEVICES, GPU, sleep
from torch_ps.common import codecs
from torch_ps.common.codecs.on_gpu import DeviceCodec, on_device
from torch_ps.common.devices import HEAD, PinnedBuffer, SideStream, StreamEvent, keep_for_stream

BY_DEVICE = ("none", "fp16", "bf16")
BATCHES = st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=40).map(torch.tensor)
#: The ends of what fp32 holds, and of the scale of fp16.
CORNERS = [
    [0.0, -0.0],
    [2.0**-149],
    [-(2.0**-149), 2.0**-126],
    [2.0**-111, 1.5 * 2.0**-112],
    [2.0**-110],
    [3.4028235e38, 1.0],
    [-3.4028235e38],
    [2.0**15, 2.0**14 - 1],
    [math.inf, 1.0],
    [-math.inf],
]


def codec(name: str) -> DeviceCodec:
    found = on_device(codecs.codec(name))
    assert found is not None
    return found


def by_cpu(name: str, values: torch.Tensor) -> bytes:
    return b"".join(codecs.codec(name).encode(values.clone()))


def by_device(name: str, values: torch.Tensor, device: str) -> bytes:
    parts = codec(name).to_bytes(values.to(device))
    assert all(part.dtype is torch.uint8 and part.device.type == device for part in parts)
    assert sum(len(part) for part in parts) <= 4 * len(values) + HEAD
    return b"".join(part.cpu().numpy().tobytes() for part in parts)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", BY_DEVICE)
@given(values=BATCHES)
def test_a_device_writes_the_bytes_of_the_cpu(name: str, device: str, values: torch.Tensor) -> None:
    assert by_device(name, values, device) == by_cpu(name, values)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("values", CORNERS)
@pytest.mark.parametrize("name", BY_DEVICE)
def test_a_device_writes_the_bytes_of_the_cpu_at_the_ends_of_fp32(name: str, values: list[float], device: str) -> None:
    assert by_device(name, torch.tensor(values), device) == by_cpu(name, torch.tensor(values))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", BY_DEVICE)
def test_nan_stays_nan_on_a_device(name: str, device: str) -> None:
    payload = memoryview(by_device(name, torch.tensor([1.0, math.nan, 2.0]), device))
    found = codecs.codec(name).decode(payload, torch.empty(3))
    assert found.isnan().tolist() == [False, True, False]
    assert found[[0, 2]].tolist() == [1.0, 2.0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", BY_DEVICE)
@given(values=BATCHES)
def test_a_device_reads_the_values_of_the_cpu(name: str, device: str, values: torch.Tensor) -> None:
    payload = memoryview(by_cpu(name, values))
    raw = torch.frombuffer(bytearray(payload), dtype=torch.uint8).to(device)
    found = codec(name).from_bytes(payload, raw, torch.empty(len(values), device=device))
    expected = codecs.codec(name).decode(payload, torch.empty(len(values)))
    assert found.device.type == device
    assert torch.equal(found.cpu().view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("name", ["int8", "sign", "topk:0.1", "randk:0.1"])
def test_other_codecs_are_for_the_cpu(name: str) -> None:
    assert on_device(codecs.codec(name)) is None


@pytest.mark.parametrize("device", DEVICES)
def test_pinned_memory_holds_the_parts_one_after_the_other(device: str) -> None:
    side = SideStream(torch.device(device))
    pinned = PinnedBuffer(side, 3)
    with side.running():
        parts = [torch.arange(4, device=device, dtype=torch.uint8), torch.full((7,), 9, device=device).byte()]
        size = pinned.take(parts)
    pinned.event.wait()
    assert pinned.bytes[:size].tolist() == [0, 1, 2, 3] + [9] * 7
    assert pinned.bytes.is_pinned() == (device == "cuda")
    pinned.values.fill_(1.0)
    assert pinned.bytes[:4].view(torch.float32).item() == 1.0


@pytest.mark.parametrize("device", DEVICES)
def test_nobody_waits_for_a_mark_that_was_never_set(device: str) -> None:
    StreamEvent(SideStream(torch.device(device))).wait()


@GPU
def test_a_side_follows_what_was_computed_and_is_joined_by_what_comes() -> None:
    side, values = SideStream(torch.device("cuda")), torch.zeros(1 << 20, device="cuda")
    for step in range(1, 21):
        sleep()  # the copy below would come before the addition if it did not follow
        values += 1
        side.follow([side.current()])
        with side.running():
            copy = keep_for_stream(values).clone()
            sleep()
            doubled = copy * 2
        side.join()
        assert (keep_for_stream(doubled) - values).eq(step).all()
