"""C12: stale gradients corrected as in DC-ASGD, on real server processes.

f(x) = lambda x^2 / 2, two workers in turn: the gradient is lambda times the copy, and it is applied to parameters that
have had one step more.

Source: Zheng et al., ICML 2017, arXiv:1609.08326.
"""

import contextlib
import dataclasses

import pytest
import torch

import torch_ps
from tests.support.jobs import job
from tests.support.quadratic import quadratics, round_robin
from torch_ps.common.errors import ConfigError
from torch_ps.common.options.parsers import parse_compensation
from torch_ps.common.options.server_config import ServerConfig

CURVATURE = torch.linspace(0.25, 3.0, 500)


def reference(strength: float, *, adaptive: bool, steps: int, lr: float = 0.25) -> torch.Tensor:
    """Give x after each push of two workers in turn, by the formula, shape (steps + 1, numel), float64."""
    x = torch.ones_like(CURVATURE, dtype=torch.float64)
    curvature, squares = CURVATURE.double(), torch.zeros_like(x)
    copies, found = [x.clone(), x.clone()], [x.clone()]
    for step in range(steps):
        copy = copies[step % 2]
        gradient = curvature * copy
        squares = 0.95 * squares + 0.05 * gradient**2
        factor = strength / (squares + 1e-7).sqrt() if adaptive else strength
        x = x - lr * (gradient + factor * gradient**2 * (x - copy))
        copies[step % 2] = x.clone()
        found.append(x.clone())
    return torch.stack(found)


@pytest.mark.parametrize(
    ("strength", "golden"),
    [("off", [1, 0.75, 0.5, 0.3125, 0.1875]), ("constant:1", [1, 0.75, 0.5625, 0.4013671875, 0.27348804])],
)
def test_compensated_golden_trajectory(strength: str, golden: list[float]) -> None:
    with (
        job(mode="async", workers=2, delay_compensation=strength) as servers,
        quadratics(servers, 2, (1.0,), lr=0.25) as workers,
    ):
        assert round_robin(workers, 4)[:, 0].tolist() == pytest.approx(golden, abs=1e-8)


@pytest.mark.parametrize("form", ["constant", "adaptive"])
@pytest.mark.parametrize("shards", [1, 3])
def test_every_element_follows_the_formula_on_any_number_of_shards(form: str, shards: int) -> None:
    with (
        job(mode="async", workers=2, shards=shards, delay_compensation=f"{form}:0.5") as servers,
        quadratics(servers, 2, CURVATURE.tolist(), lr=0.25) as workers,
    ):
        found = round_robin(workers, 30)
    expected = reference(0.5, adaptive=form == "adaptive", steps=30)
    assert torch.allclose(found.double(), expected, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(found.double(), reference(1e-9, adaptive=False, steps=30), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("codec", ["fp16", "int8"])
def test_what_is_compared_is_what_the_worker_decoded(codec: str) -> None:
    """With one worker nothing is stale; only a server that compared with its own fp32 values would find no change."""
    with job(mode="async", delay_compensation="constant:100") as servers, contextlib.ExitStack() as stack:
        client = stack.enter_context(torch_ps.Client(str(servers), name="w0", compress_pull=codec))
        client.init({"x": torch.zeros(300)}, torch_ps.OptimizerSpec("SGD", lr=2**-10))
        client.pull()
        client.push({"x": torch.linspace(-1000, 1000, 300)})
        pulled = client.pull().params["x"]
        before = stack.enter_context(torch_ps.Client(str(servers))).pull().params["x"]
        client.push({"x": torch.ones(300)})
        after = stack.enter_context(torch_ps.Client(str(servers))).pull().params["x"]
    assert not torch.equal(pulled, before)
    assert torch.allclose(before - after, (1 + 100 * (before - pulled)) / 1024, rtol=1e-3, atol=1e-8)


def test_gradient_from_an_older_pull_is_applied_as_it_came() -> None:
    with job(mode="async", workers=2, delay_compensation="constant:1") as servers, contextlib.ExitStack() as stack:
        a, b = (stack.enter_context(torch_ps.Client(str(servers), name=name)) for name in ("a", "b"))
        for client in (a, b):
            client.init({"x": torch.ones(1)}, torch_ps.OptimizerSpec("SGD", lr=0.25))
            client.pull()
        old = a.pull().version
        b.push({"x": torch.ones(1)})
        assert a.pull().params["x"].item() == 0.75
        assert a.push({"x": torch.ones(1)}, base=old).params["x"].item() == 0.5


def test_fresh_gradients_keep_their_bits() -> None:
    """One worker: nothing is stale, so nothing may change, with momentum and buffers too."""

    def train(compensation: str) -> tuple[torch.Tensor, ...]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1))
        with (
            job(mode="async", bucket_size=2**-10, delay_compensation=compensation) as servers,
            torch_ps.ParameterServerOptimizer(
                torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), model, str(servers)
            ) as optimizer,
        ):
            for _ in range(6):
                optimizer.zero_grad()
                model(torch.randn(16, 6)).square().mean().backward()
                optimizer.step()
        return tuple(value.clone() for value in model.state_dict().values())

    plain, compensated = train("off"), train("adaptive")
    assert all(torch.equal(a, b) for a, b in zip(plain, compensated, strict=True))


def test_clipped_gradient_is_compensated_after_it_was_clipped() -> None:
    with (
        job(mode="async", workers=2, clip_norm=0.5, delay_compensation="constant:1") as servers,
        quadratics(servers, 2, (1.0,), lr=0.25) as workers,
    ):
        x = round_robin(workers, 2)[:, 0].tolist()
    clipped = 0.5 / (1 + 1e-6)
    assert x[1] == pytest.approx(1 - 0.25 * clipped)
    assert x[2] == pytest.approx(x[1] - 0.25 * (clipped + clipped**2 * (x[1] - 1)), rel=1e-6)


@pytest.mark.parametrize("text", ["", "on", "constant:", "constant:0", "adaptive:-1", "adaptive:inf", "1:2", "nan"])
def test_compensation_that_cannot_be_read_is_refused_with_what_can(text: str) -> None:
    with pytest.raises(ConfigError, match="must be off, constant, adaptive"):
        parse_compensation(text)


def test_compensation_has_a_default_strength_or_its_own_and_no_part_in_sync() -> None:
    assert parse_compensation("adaptive") == ("adaptive", 2.0)
    assert parse_compensation("1.5") == parse_compensation("constant:1.5") == ("constant", 1.5)
    with pytest.raises(ConfigError, match="in sync no gradient is stale"):
        ServerConfig(mode="sync", delay_compensation="constant")
    assert dataclasses.replace(ServerConfig(mode="ssp"), delay_compensation="adaptive:0.1").mode == "ssp"
