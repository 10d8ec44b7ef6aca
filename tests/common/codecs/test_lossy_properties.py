"""int8, sign and randk on random values, sizes, seeds and bytes: bounds, lengths, refusals, sums."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.common.codecs.test_codecs import FLOATS
from torch_ps.common import codecs
from torch_ps.common.codecs.int8 import BLOCK as INT8_BLOCK
from torch_ps.common.codecs.randk import draw_positions
from torch_ps.common.codecs.registry import count
from torch_ps.common.codecs.sign import BLOCK as SIGN_BLOCK
from torch_ps.common.errors import CorruptFrame
from torch_ps.worker.gradients.compressor import Residuals

SEEDS = st.integers(0, 2**64 - 1)
DENSITIES = st.sampled_from([0.001, 0.01, 0.1, 0.5, 1.0])
NAMES = st.sampled_from(["int8", "sign"]) | DENSITIES.map(lambda density: f"randk:{density}")
#: Around the ends of blocks and bytes, and between them.
SIZES = st.sampled_from([1, 7, 8, 9, 255, 256, 257, 4095, 4096, 4097, 8192]) | st.integers(1, 9000)


@st.composite
def buckets(draw: st.DrawFn) -> torch.Tensor:
    """Values of any magnitude, zeros among them; a few that hypothesis has chosen itself."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    size, scale = draw(SIZES), draw(st.integers(-60, 60))
    values = torch.randn(size, generator=generator) * 2.0**scale
    values *= torch.rand(size, generator=generator) < draw(st.sampled_from([0.0, 0.1, 1.0]))
    few = torch.tensor(draw(st.lists(FLOATS, max_size=5)), dtype=torch.float32)[:size]
    values[: len(few)] = few
    return values


def payload_of(name: str, values: torch.Tensor, seed: int = 0) -> memoryview:
    return memoryview(b"".join(codecs.codec(name).encode(values, seed)))


def back(name: str, values: torch.Tensor, seed: int = 0) -> torch.Tensor:
    codec, payload = codecs.codec(name), payload_of(name, values, seed)
    codec.check(payload, len(values))
    return codec.decode(payload, torch.full((len(values),), float("nan")))


@given(buckets())
def test_int8_is_off_by_half_a_step_of_its_block_and_turns_no_sign(values: torch.Tensor) -> None:
    found = back("int8", values)
    for block, other in zip(torch.split(values, INT8_BLOCK), torch.split(found, INT8_BLOCK), strict=True):
        largest = block.abs().max()
        assert ((block - other).abs() <= largest / 253 + 1e-32).all()
        assert (block * other.sign() >= 0).all()


@given(buckets())
def test_sign_is_the_nearest_of_its_kind_in_every_block(values: torch.Tensor) -> None:
    found = back("sign", values)
    assert torch.equal(found < 0, (values < 0) & (found != 0))
    for block, other in zip(
        torch.split(values.double(), SIGN_BLOCK), torch.split(found.double(), SIGN_BLOCK), strict=True
    ):
        scale = other.abs().max()
        assert (other.abs() == scale).all()
        if block.abs().sum() > torch.finfo(torch.float32).max:
            continue  # where the sum overflows the scale is only finite
        assert scale.item() == pytest.approx(block.abs().mean().item(), rel=1e-5, abs=1e-44)
        assert (block - other).square().sum() <= block.square().sum() * (1 + 1e-9)


@given(buckets(), DENSITIES, SEEDS)
def test_randk_keeps_the_values_at_the_places_of_its_seed_and_nothing_else(
    values: torch.Tensor, density: float, seed: int
) -> None:
    found, k = back(f"randk:{density}", values, seed), count(density, len(values))
    drawn = draw_positions(seed, k, len(values))
    assert len(drawn) == k
    assert (np.diff(drawn) > 0).all()
    assert 0 <= drawn[0] <= drawn[-1] < len(values)
    expected = torch.zeros(len(values))
    expected[drawn] = values[drawn]
    assert torch.equal(found, expected)


@given(NAMES, SIZES, SEEDS)
def test_length_depends_on_the_size_alone(name: str, size: int, seed: int) -> None:
    lengths = {
        "int8": 4 * -(-size // INT8_BLOCK) + size,
        "sign": 4 * -(-size // SIGN_BLOCK) + -(-size // 8),
        "randk": 8 + 4 * count(float(name.partition(":")[2] or 1), size),
    }
    for values in (torch.zeros(size), torch.full((size,), -1e30)):
        assert len(payload_of(name, values, seed)) == lengths[name.partition(":")[0]]


@given(NAMES, st.integers(1, 600), st.integers(-40, 40).filter(bool), SEEDS)
def test_payload_of_any_other_length_is_refused(name: str, size: int, change: int, seed: int) -> None:
    payload = bytes(payload_of(name, torch.ones(size), seed))
    damaged = payload[:change] if change < 0 else payload + bytes(change)
    with pytest.raises(CorruptFrame, match="this bucket needs"):
        codecs.codec(name).check(memoryview(damaged), size)


@given(NAMES, st.integers(1, 600), st.data())
def test_any_bytes_are_refused_or_give_finite_values(name: str, size: int, data: st.DataObject) -> None:
    payload = bytearray(payload_of(name, torch.ones(size)))
    for at, byte in data.draw(st.lists(st.tuples(st.integers(0, len(payload) - 1), st.integers(0, 255)), max_size=8)):
        payload[at] = byte
    codec = codecs.codec(name)
    try:
        codec.check(memoryview(payload), size)
    except CorruptFrame:
        return
    found = codec.decode(memoryview(payload), torch.full((size,), float("nan")))
    limit = 128 if name == "int8" else 1  # a scale near the end of fp32 times a byte is infinite, and is left out later
    assert found.abs().div(limit).nan_to_num(posinf=0).isfinite().all()
    assert not found.isnan().any()


@given(NAMES, st.integers(1, 5000), st.integers(0, 2**32), st.integers(2, 12))
def test_what_was_sent_and_what_is_kept_add_up_to_all_gradients(name: str, size: int, seed: int, steps: int) -> None:
    generator, residuals = torch.Generator().manual_seed(seed), Residuals()
    given_, sent_ = torch.zeros(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    for step in range(steps):
        gradient = torch.randn(size, generator=generator)
        given_ += gradient
        residuals.add_to(0, gradient)
        decoded = back(name, gradient.clone(), seed + step)
        residuals.keep(0, gradient, decoded)
        sent_ += decoded
    kept = residuals.get(0)
    assert kept is not None
    assert (sent_ + kept - given_).abs().max() < 1e-5 * steps  # fp32 rounds each sum


@given(st.sampled_from(["sign", "randk:0.1"]), st.integers(1, 5000), st.integers(0, 2**32))
def test_push_that_came_too_late_is_kept_whole(name: str, size: int, seed: int) -> None:
    gradient, residuals = torch.randn(size, generator=torch.Generator().manual_seed(seed)), Residuals()
    decoded = back(name, gradient.clone(), seed)
    residuals.keep(0, gradient, decoded)
    residuals.put_back(0, decoded)
    kept = residuals.get(0)
    assert kept is not None
    assert torch.allclose(kept, gradient, atol=1e-6)
