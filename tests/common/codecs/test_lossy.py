"""The lossy codecs: how small, how near, and which payloads of a peer are refused."""

import math
import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.common.codecs.test_codecs import back, encoded
from torch_ps.common import codecs
from torch_ps.common.codecs.randk import draw_positions
from torch_ps.common.codecs.registry import count
from torch_ps.common.codecs.topk import largest
from torch_ps.common.errors import ConfigError, CorruptFrame, UnknownCodec

LOSSY = ("int8", "sign", "topk:0.01", "randk:0.01", "topk:1", "randk:0.5")
#: Blocks, bytes and runs of values that do not come out even.
SIZES = (1, 2, 7, 8, 9, 255, 256, 257, 1000, 4095, 4096, 4097, 4810, 100_003)


@pytest.mark.parametrize(("name", "ratio"), [("int8", 3.9), ("sign", 31), ("topk:0.01", 50), ("randk:0.01", 99)])
@pytest.mark.parametrize("numel", [1000, 4810, 1 << 20])
def test_wire_is_that_many_times_smaller(name: str, ratio: float, numel: int) -> None:
    if name == "randk:0.01" and numel < 10_000:
        ratio = 80  # the seed counts in a small bucket
    assert 4 * numel / len(encoded(name, torch.randn(numel))) >= ratio


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("numel", SIZES)
def test_every_size_is_taken_and_decoding_brings_it_nearer(name: str, numel: int) -> None:
    values = torch.randn(numel)
    found = back(name, values)
    assert found.shape == (numel,)
    assert (found - values).norm() < values.norm()


@pytest.mark.parametrize("numel", SIZES)
def test_int8_is_off_by_half_a_step_of_its_block(numel: int) -> None:
    values = torch.randn(numel) * torch.logspace(-20, 20, numel)
    found = back("int8", values)
    for block, other in zip(torch.split(values, 256), torch.split(found, 256), strict=True):
        assert (block - other).abs().max() <= block.abs().max() / 253


@pytest.mark.parametrize("name", ["int8", "sign", "topk:0.01", "randk:1"])
@pytest.mark.parametrize("value", [0.0, -1e-30, 1e-8, 65504.0, -3e38])
def test_value_alone_survives_whatever_its_size(name: str, value: float) -> None:
    assert back(name, torch.tensor([value])).item() == pytest.approx(value, rel=1e-6)


def test_sign_keeps_signs_and_the_mean_magnitude() -> None:
    values = torch.randn(5000)
    found = back("sign", values)
    assert torch.equal(found < 0, values < 0)
    for block, other in zip(torch.split(values, 4096), torch.split(found, 4096), strict=True):
        assert other.abs() == pytest.approx(block.abs().mean().expand(len(block)), rel=1e-5)


def test_scale_of_sign_stays_finite_where_the_sum_of_magnitudes_does_not() -> None:
    assert back("sign", torch.full((4096,), 3e38)).isfinite().all()


@given(st.integers(1, 5000), st.floats(1e-3, 1), st.integers(0, 9))
def test_topk_keeps_exactly_the_largest(numel: int, density: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(numel, generator=generator) ** 3 * (torch.rand(numel, generator=generator) > 0.3)
    found = back(f"topk:{density}", values)
    k = count(density, numel)
    kept = torch.topk(values.abs(), k).values.sort().values
    assert torch.equal(found.abs().sort().values[-k:], kept)
    assert ((found == 0) | (found == values)).all()


@pytest.mark.parametrize("order", ["random", "rising", "falling", "one peak", "zeros", "periodic"])
def test_sampled_threshold_never_changes_what_is_largest(order: str) -> None:
    n, k = 200_000, 2000
    values = {
        "random": torch.randn(n),
        "rising": torch.arange(n).float(),
        "falling": -torch.arange(n).float(),
        "one peak": torch.cat([torch.randn(n - 3000) * 1e-3, torch.randn(3000)]),
        "zeros": torch.zeros(n),
        "periodic": (torch.arange(n) % 61 == 0).float(),
    }[order]
    index = largest(values.abs().numpy(), k)
    assert len(index) == k
    assert (np.diff(index) > 0).all()
    assert torch.equal(values.abs()[index].sort().values, torch.topk(values.abs(), k).values.sort().values)


@pytest.mark.parametrize("density", ["0.001", "0.01", "0.25"])
def test_topk_is_a_contraction(density: str) -> None:
    values = torch.randn(10_000)
    error = (back(f"topk:{density}", values) - values).square().sum()
    assert error <= (1 - float(density)) * values.square().sum()


def test_randk_draws_every_place_equally_often() -> None:
    drawn = torch.zeros(1000)
    for seed in range(4000):
        drawn[draw_positions(seed, 100, 1000)] += 1
    assert drawn.mean() == 400
    assert drawn.min() > 320
    assert drawn.max() < 480


def test_randk_takes_the_places_that_the_seed_gives_on_every_machine() -> None:
    assert draw_positions(7, 4, 1000).tolist() == [237, 304, 596, 953]
    assert draw_positions(2**64 - 1, 3, 3).tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("change", [-1, 1])
def test_payload_of_another_size_is_refused(name: str, change: int) -> None:
    payload = bytes(encoded(name, torch.ones(1000)))
    payload = payload[:change] if change < 0 else payload + b"!"
    with pytest.raises(CorruptFrame, match=f"{name} payload has {len(payload)} bytes; this bucket needs"):
        codecs.codec(name).check(memoryview(payload), 1000)


@pytest.mark.parametrize("name", ["int8", "sign"])
@pytest.mark.parametrize("scale", [math.nan, math.inf, -1.0])
def test_scale_has_to_be_finite_and_not_negative(name: str, scale: float) -> None:
    payload = bytearray(encoded(name, torch.ones(100)))
    payload[:4] = struct.pack("<f", scale)
    with pytest.raises(CorruptFrame, match="for block 0; it must be finite and >= 0"):
        codecs.codec(name).check(memoryview(payload), 100)


@pytest.mark.parametrize(
    ("index", "reason"),
    [((0, 0), "do not increase"), ((5, 3), "do not increase"), ((-1, 3), "from -1 to 3"), ((0, 10), "from 0 to 10")],
)
def test_indices_have_to_increase_and_lie_in_the_bucket(index: tuple[int, int], reason: str) -> None:
    payload = struct.pack("<2i2f", *index, 1.0, 1.0)
    with pytest.raises(CorruptFrame, match=reason):
        codecs.codec("topk:0.2").check(memoryview(payload), 10)


@pytest.mark.parametrize("name", ["topk:0.1", "randk:0.1"])
def test_sent_values_have_to_be_finite(name: str) -> None:
    payload = bytes(encoded(name, torch.ones(10)))[:-4] + struct.pack("<f", math.nan)
    with pytest.raises(CorruptFrame, match="a value that is not finite"):
        codecs.codec(name).check(memoryview(payload), 10)


@pytest.mark.parametrize("name", ["topk", "topk:", "topk:0", "topk:1.5", "topk:nan", "topk:x", "int8:3", "sign:\n", ""])
def test_argument_that_cannot_be_is_refused(name: str) -> None:
    with pytest.raises(ConfigError):
        codecs.make_codec(name)
    with pytest.raises(UnknownCodec):
        codecs.codec(name)


class Halves:
    """A user's codec: every value rounded to a multiple of its argument, as int32."""

    biased, coarse, sparse = False, True, False

    def __init__(self, argument: str) -> None:
        self.name, self._unit = f"halves:{argument}", float(argument)

    def encode(self, values: torch.Tensor, seed: int = 0) -> tuple[memoryview, ...]:
        return ((values / self._unit).round().int().numpy().data.cast("B"),)

    def check(self, payload: memoryview, numel: int) -> None:
        if len(payload) != 4 * numel:
            raise CorruptFrame("wrong size")

    def decode(self, payload: memoryview, scratch: torch.Tensor) -> torch.Tensor:
        return scratch.copy_(torch.frombuffer(payload, dtype=torch.int32)).mul_(self._unit)


def test_codec_of_a_user_is_found_by_name_with_its_argument() -> None:
    codecs.register_codec("halves", Halves, argument="UNIT")
    assert back("halves:0.25", torch.tensor([0.3, 1.1])).tolist() == [0.25, 1.0]
    assert "halves:UNIT" in codecs.forms()


@pytest.mark.parametrize("name", ["int8", "Zip", "a:b", ""])
def test_name_that_is_taken_or_malformed_cannot_be_registered(name: str) -> None:
    with pytest.raises(ConfigError, match="codec"):
        codecs.register_codec(name, Halves)
