"""The mean of finite gradients is finite, also where their sum or a weighted term is beyond fp32."""

import pytest
import torch

from torch_ps.common import codecs
from torch_ps.common.plan import plan
from torch_ps.common.schema import Group, Model, TensorSpec
from torch_ps.ps.engine.parameter_store import Gradient, Store

MODEL = Model("SGD", (Group((TensorSpec("x", (4,)),), {"lr": 0.1}),))
LARGEST = torch.finfo(torch.float32).max


def gradient(worker: str, values: list[float], weight: float = 1.0, codec: str = "none") -> Gradient:
    chosen = codecs.codec(codec)
    payload = memoryview(b"".join(bytes(part) for part in chosen.encode(torch.tensor(values), seed=0)))
    return Gradient(worker, 0, weight, chosen, payload)


@pytest.fixture
def store() -> Store:
    return Store(MODEL, plan(MODEL, 1 << 20, 1).buckets)


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (1.0, 2.0, 1.0), (1e9, 3.0, 2.0**53)])
def test_sum_or_term_beyond_fp32_has_the_mean_that_it_has(store: Store, weights: tuple[float, ...]) -> None:
    values = [[3e38, -3e38, 1.0, LARGEST], [3e38, -3e38, 1.0, LARGEST], [3e38, -3e38, 1.0, LARGEST]]
    mean, left_out = store.mean(
        0, [gradient(f"w{i}", v, w) for i, (v, w) in enumerate(zip(values, weights, strict=True))]
    )
    assert mean is not None
    assert left_out == []
    assert mean.values.isfinite().all()
    assert torch.allclose(mean.values, torch.tensor(values[0]), rtol=1e-5)


def test_sum_beyond_fp16_is_taken_in_fp32(store: Store) -> None:
    largest = torch.finfo(torch.float16).max
    mean, left_out = store.mean(0, [gradient(f"w{i}", [largest] * 4, 8.0, "fp16") for i in range(4)])
    assert mean is not None
    assert left_out == []
    assert torch.equal(mean.values, torch.full((4,), largest))


def test_gradient_that_is_not_finite_is_left_out_of_a_sum_beyond_fp32(store: Store) -> None:
    pushed = [gradient("w0", [3e38] * 4), gradient("w1", [1.0, float("inf"), 1.0, 1.0]), gradient("w2", [3e38] * 4)]
    mean, left_out = store.mean(0, pushed)
    assert [found.worker for found in left_out] == ["w1"]
    assert mean is not None
    assert torch.allclose(mean.values, torch.full((4,), 3e38), rtol=1e-5)
