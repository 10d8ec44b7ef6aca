"""Codecs: what comes back, how large it is on the wire, and what is refused."""

import math
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torch_ps.common import codecs
from torch_ps.common.errors import ConfigError, CorruptFrame, UnknownCodec

#: Codecs that keep every value.
FULL = ("none", "fp16", "bf16")
#: Up to 2**127: what is nearer to the end of fp32 than a half's precision rounds to infinity in both 16-bit codecs.
FLOATS = st.floats(-(2.0**127), 2.0**127, width=32, allow_subnormal=False)
BATCHES = st.lists(FLOATS, min_size=1, max_size=40).map(torch.tensor)


def encoded(name: str, values: torch.Tensor) -> memoryview:
    return memoryview(b"".join(codecs.codec(name).encode(values)))


def back(name: str, values: torch.Tensor) -> torch.Tensor:
    """Through the wire form and back."""
    codec, payload = codecs.codec(name), encoded(name, values)
    codec.check(payload, len(values))
    return codec.decode(payload, torch.empty(len(values)))


@given(BATCHES)
def test_plain_values_come_back_bit_for_bit(values: torch.Tensor) -> None:
    assert back("none", values).view(torch.int32).tolist() == values.view(torch.int32).tolist()


@given(BATCHES)
def test_fp16_error_is_half_a_unit_of_the_value_or_of_the_smallest_step(values: torch.Tensor) -> None:
    bound = torch.maximum(values.abs() * 2.0**-11, values.abs().max() * 2.0**-38)
    assert ((back("fp16", values) - values).abs() <= bound.clamp_min(2.0**-149)).all()


@given(BATCHES)
def test_bf16_rounds_to_nearest(values: torch.Tensor) -> None:
    assert torch.equal(back("bf16", values), values.bfloat16().float())


@given(FLOATS, st.integers(1, 20))
def test_fp16_holds_a_value_that_stands_alone_whatever_its_size(value: float, others: int) -> None:
    found = back("fp16", torch.tensor([value, *[0.0] * others]))
    assert found[0].item() == pytest.approx(value, rel=2.0**-11, abs=2.0**-149)
    assert not found[1:].any()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", FULL)
def test_values_that_are_not_finite_stay_so(name: str, bad: float) -> None:
    found = back(name, torch.tensor([1.0, bad, 2.0]))
    assert not math.isfinite(found[1])
    assert found[0] == 1


@pytest.mark.parametrize(("name", "size"), [("none", 4000), ("fp16", 2004), ("bf16", 2000)])
def test_bytes_on_the_wire(name: str, size: int) -> None:
    assert len(encoded(name, torch.randn(1000))) == size


@pytest.mark.parametrize("name", FULL)
@pytest.mark.parametrize("change", [-1, 1])
def test_payload_of_another_size_is_refused(name: str, change: int) -> None:
    payload = bytes(encoded(name, torch.ones(8)))
    payload = payload[:change] if change < 0 else payload + b"!"
    with pytest.raises(CorruptFrame, match=f"{name} payload has {len(payload)} bytes; this bucket needs"):
        codecs.codec(name).check(memoryview(payload), 8)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf])
def test_fp16_scale_has_to_be_positive_and_finite(scale: float) -> None:
    with pytest.raises(CorruptFrame, match="a positive finite number is needed"):
        codecs.codec("fp16").check(memoryview(struct.pack("<f", scale) + bytes(2)), 1)


def test_codec_that_a_peer_made_up_is_refused_with_those_that_exist() -> None:
    with pytest.raises(UnknownCodec, match="codec 'zip' does not exist; choose one of none, fp16, bf16"):
        codecs.codec("zip")


def test_codec_that_a_user_made_up_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="codec 'zip' does not exist; choose one of none, fp16, bf16"):
        codecs.make_codec("zip")


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_residual_and_decoded_values_add_up_to_the_truth(name: str) -> None:
    residual, sums = torch.zeros(1000), torch.zeros(2, 1000, dtype=torch.float64)
    for _ in range(300):
        gradient = torch.randn(1000)
        sums[0] += gradient
        sent = gradient + residual
        decoded = back(name, sent)
        residual = sent - decoded
        sums[1] += decoded
    gap = (sums[1] + residual - sums[0]).abs().max()
    assert gap < 1e-5  # of sums of about 17: fp32 rounds each of the 300 sums of gradient and residual
    assert residual.abs().max() < 0.05
