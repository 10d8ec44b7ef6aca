"""Compression over the wire: how much smaller, how precise, and nothing lost where the worker keeps the residual.

Source: error feedback, Seide et al., Interspeech 2014; Karimireddy et al., ICML 2019.
"""

import contextlib
from collections.abc import Iterator

import pytest
import torch

import torch_ps
from tests.support.jobs import Servers, job
from torch_ps.common import codecs

SIZE, TIMES = 1000, 300
#: Codec -> relative error of one value.
PRECISION = {"fp16": 2.0**-11, "bf16": 2.0**-8}


@pytest.fixture(scope="module")
def servers() -> Iterator[Servers]:
    with job(mode="async") as servers:
        yield servers


@contextlib.contextmanager
def client(servers: Servers, compress: str = "none", compress_pull: str = "none") -> Iterator[torch_ps.Client]:
    """A worker of plain SGD with learning rate 1, so the step that is made is the gradient that was decoded."""
    with torch_ps.Client(str(servers), compress=compress, compress_pull=compress_pull) as client:
        client.init({"x": torch.zeros(SIZE)}, torch_ps.OptimizerSpec("SGD", lr=1.0))
        back_to_zero(servers)
        client.pull()
        yield client


def back_to_zero(servers: Servers) -> None:
    with torch_ps.Client(str(servers)) as plain:
        plain.init({"x": torch.zeros(SIZE)}, torch_ps.OptimizerSpec("SGD", lr=1.0))
        plain.push({"x": plain.pull().params["x"]})


@pytest.mark.parametrize("name", PRECISION)
def test_half_precision_halves_the_bytes(servers: Servers, name: str) -> None:
    with client(servers, name, name) as compressed, client(servers) as plain:
        for each in (compressed, plain):
            pushed, pulled = each.pushed_bytes, each.pulled_bytes
            each.push({"x": torch.randn(SIZE)})
            size = each.pushed_bytes - pushed, each.pulled_bytes - pulled
            assert size == ((4 * SIZE, 4 * SIZE) if each is plain else pytest.approx((2 * SIZE, 2 * SIZE), abs=4))


@pytest.mark.parametrize("name", PRECISION)
@pytest.mark.parametrize("value", [1e-30, 1e-8, 5e-8, -3e-6, 1.0, 65504.0, -1e5, 3e20])
def test_value_alone_in_a_tensor_survives_whatever_its_size(servers: Servers, name: str, value: float) -> None:
    gradient = torch.zeros(SIZE)
    gradient[7] = value
    with client(servers, name) as worker:
        x = worker.push({"x": gradient}).params["x"]
    assert -x[7].item() == pytest.approx(value, rel=PRECISION[name])
    assert x.count_nonzero() == 1


@pytest.mark.parametrize("name", PRECISION)
def test_pulled_values_are_as_precise_as_the_codec(servers: Servers, name: str) -> None:
    gradient = torch.randn(SIZE)
    with client(servers, compress_pull=name) as worker:
        x = worker.push({"x": gradient}).params["x"]
    scale = gradient.abs().max() if name == "fp16" else gradient.abs()
    assert ((x + gradient).abs() <= torch.maximum(PRECISION[name] * gradient.abs(), 1e-8 * scale)).all()


@pytest.mark.parametrize("name", PRECISION)
def test_nothing_is_lost_where_the_caller_keeps_the_residual(servers: Servers, name: str) -> None:
    codec = codecs.codec(name)
    residual, truth = torch.zeros(SIZE), torch.zeros(SIZE, dtype=torch.float64)
    with client(servers, name) as worker:
        for step in range(TIMES):
            gradient = 1e-3 * torch.randn(SIZE) * (1 + step % 7)
            truth += gradient
            sent = gradient + residual
            worker.push({"x": sent})
            payload = memoryview(b"".join(codec.encode(sent)))
            residual = sent - codec.decode(payload, torch.empty(SIZE))
        x = worker.pull().params["x"]
    with_residual = (-x.double() + residual.double() - truth).abs().max()
    without = (-x.double() - truth).abs().max()
    assert with_residual < 1e-6
    assert with_residual < without
