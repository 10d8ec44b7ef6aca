"""Equal gradients of two workers are told once, after some steps in a row, and nothing else is."""

import time

import pytest
import torch

from torch_ps.common import codecs
from torch_ps.ps.engine.equal_gradients import BYTES, STEPS, EqualGradients, digest_of
from torch_ps.ps.engine.parameter_store import Gradient

BIG = 100_000


def gradient(
    worker: str, seed: int, *, weight: float = 1.0, missing: bool = False, codec: str = "none", numel: int = BIG
) -> Gradient:
    values = torch.randn(numel, generator=torch.Generator().manual_seed(seed)) if seed else torch.zeros(numel)
    return encoded(worker, values, weight=weight, missing=missing, codec=codec)


def encoded(
    worker: str, values: torch.Tensor, *, weight: float = 1.0, missing: bool = False, codec: str = "none"
) -> Gradient:
    chosen = codecs.codec(codec)
    payload = memoryview(b"".join(chosen.encode(values, seed=hash(worker) & 0xFFFF)))
    return Gradient(worker, 0, weight, chosen, payload, missing)


def told(*steps: list[Gradient], bucket: int = 0) -> list[str]:
    said: list[str] = []
    compared = EqualGradients(said.append)
    for gradients in steps:
        compared.compare(bucket, gradients)
    return said


def equal(step: int, *workers: str, codec: str = "none", numel: int = BIG) -> list[Gradient]:
    return [gradient(worker, 1 + step, codec=codec, numel=numel) for worker in workers]


def differing(step: int) -> list[Gradient]:
    return [gradient(f"w{rank}", 100 + 10 * step + rank) for rank in range(2)]


@pytest.mark.parametrize("codec", ["none", "fp16", "bf16", "int8", "sign", "topk:0.01"])
@pytest.mark.parametrize("numel", [1, 33, BIG])
def test_two_workers_with_equal_gradients_are_told_once(codec: str, numel: int) -> None:
    (sentence,) = told(*(equal(step, "w0", "w1", codec=codec, numel=numel) for step in range(3 * STEPS)))
    assert sentence.startswith(f"workers w0 and w1 have sent equal gradients in {STEPS} steps in a row")
    assert "torch_ps.shard" in sentence


def test_pair_among_others_is_named() -> None:
    steps = [
        [gradient("w0", 50 + step), gradient("w1", 1 + step), gradient("w2", 90 + step), gradient("w3", 1 + step)]
        for step in range(STEPS)
    ]
    (sentence,) = told(*steps)
    assert sentence.startswith("workers w1 and w3 ")


def test_steps_have_to_be_in_a_row() -> None:
    steps = [equal(step, "w0", "w1") for step in range(STEPS - 1)]
    assert told(*steps, differing(0), *steps) == []


def test_step_that_says_nothing_does_not_break_the_row() -> None:
    steps = [equal(step, "w0", "w1") for step in range(STEPS - 1)]
    silent = [gradient("w0", 1, weight=0.0), gradient("w1", 2)]
    assert len(told(*steps, silent, equal(9, "w0", "w1"))) == 1


def test_bucket_that_does_not_depend_on_data_is_not_enough() -> None:
    said: list[str] = []
    compared = EqualGradients(said.append)
    for step in range(3 * STEPS):
        compared.compare(0, equal(step, "w0", "w1"))
        compared.compare(1, differing(step))
    assert said == []


@pytest.mark.parametrize(
    "one_step",
    [
        [gradient("w0", 0), gradient("w1", 0)],
        [encoded(f"w{rank}", torch.full((BIG,), -0.0)) for rank in range(2)],
        [gradient(f"w{rank}", 5, missing=True) for rank in range(2)],
        [gradient(f"w{rank}", 5, weight=0.0) for rank in range(2)],
        [gradient("w0", 5), gradient("w1", 5, weight=0.0)],
        [gradient("w0", 5)],
    ],
    ids=["zero", "minus zero", "missing", "weight 0", "one of weight 0", "one worker"],
)
def test_gradients_that_say_nothing_are_not_compared(one_step: list[Gradient]) -> None:
    assert told(*[one_step] * (3 * STEPS)) == []


def test_difference_anywhere_in_a_small_payload_is_seen() -> None:
    values = torch.randn(BYTES // 4)
    for at in (0, 17, len(values) - 1):
        other = values.clone()
        other[at] += 1
        assert digest_of(encoded("w0", values)) != digest_of(encoded("w1", other))


def test_cost_does_not_grow_with_the_payload() -> None:
    large = gradient("w0", 3, numel=1_000_000)
    digest_of(large)
    begin = time.perf_counter()
    for _ in range(100):
        digest_of(large)
    assert (time.perf_counter() - begin) / 100 < 200e-6  # about 3 us; hashing all of it takes 2 ms
