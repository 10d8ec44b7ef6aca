"""Error feedback over the wire: nothing is lost, and biased codecs go where whole gradients go.

The three functions are those on which signs alone go astray. Each stands in a tensor of its own server, as the scale of
sign is that of a bucket; the first one a thousand times side by side, for in one dimension a scaled sign loses nothing.

Source: Karimireddy et al., ICML 2019, arXiv:1901.09847, section 3 for the counterexamples.
"""

from collections.abc import Callable

import pytest
import torch

import torch_ps
from tests.support.jobs import job
from torch_ps.common import codecs

SIZE, TIMES = 1000, 300
CODECS = ("fp16", "bf16", "int8", "sign", "topk:0.01", "topk:0.001", "randk:0.01")


def trajectory(
    start: torch.Tensor, gradient: Callable[[torch.Tensor, int], torch.Tensor], steps: int, lr: float, feedback: str
) -> torch.Tensor:
    """X after every step of SGD with sign."""
    with (
        job(mode="async") as servers,
        torch_ps.Client(str(servers), name="w0", compress="sign", feedback=feedback) as client,
    ):
        client.init({"x": start}, torch_ps.OptimizerSpec("SGD", lr=lr))
        found = [client.pull().params["x"]]
        for step in range(steps):
            found.append(client.push({"x": gradient(found[-1], step)}).params["x"])
    return torch.stack(found)


@pytest.mark.parametrize("name", CODECS)
def test_decoded_pushes_and_residual_add_up_to_the_gradients(name: str) -> None:
    with (
        job(mode="async") as servers,
        torch_ps.Client(str(servers), name="w0", compress=name, feedback="on") as client,
    ):
        client.init({"x": torch.zeros(SIZE)}, torch_ps.OptimizerSpec("SGD", lr=1.0))
        client.pull()
        truth = torch.zeros(SIZE, dtype=torch.float64)
        for step in range(TIMES):
            gradient = 1e-3 * torch.randn(SIZE) * (1 + step % 7)
            truth += gradient
            x = client.push({"x": gradient}).params["x"]
        gap = (-x.double() + client.residual()["x"].double() - truth).abs().max()
        assert client.residual()["x"].count_nonzero() > 0
    assert gap < 1e-6


@pytest.mark.parametrize("name", ["int8", "sign", "topk:0.01", "randk:0.01"])
def test_codec_that_needs_no_feedback_keeps_nothing_and_off_means_off(name: str) -> None:
    for feedback in ("auto", "off"):
        with job() as servers, torch_ps.Client(str(servers), name="w0", compress=name, feedback=feedback) as client:
            client.init({"x": torch.zeros(SIZE)}, torch_ps.OptimizerSpec("SGD", lr=1.0))
            client.pull()
            client.push({"x": torch.randn(SIZE)})
            kept = bool(client.residual()["x"].any())
            assert kept == (feedback == "auto" and codecs.codec(name).biased)


def rare_and_large(x: torch.Tensor, step: int) -> torch.Tensor:
    """Of x/4 in the mean: 4 in one case of four, else -1."""
    return torch.where(torch.rand(len(x)) < 0.25, 4.0, -1.0)


def ridge(x: torch.Tensor, step: int) -> torch.Tensor:
    """Of |x1 + x2| / 2 + |x1 - x2|; at a kink, that of its right side."""
    one, two = (1.0 if x[0] + x[1] >= 0 else -1.0), (1.0 if x[0] - x[1] >= 0 else -1.0)
    return 0.5 * one * torch.ones(2) + two * torch.tensor([1.0, -1.0])


def rows(x: torch.Tensor, step: int) -> torch.Tensor:
    """Of the square of one row times x, rows +-(1, -1) + (1, 1)/2 in turn."""
    row = (1 - 2 * (step % 2)) * torch.tensor([1.0, -1.0]) + 0.5
    return 2 * (row @ x) * row


def test_sign_follows_the_frequent_small_value_and_feedback_the_mean() -> None:
    astray = trajectory(torch.zeros(1000), rare_and_large, 300, 0.02, "off")[-1].mean()
    right = trajectory(torch.zeros(1000), rare_and_large, 300, 0.02, "auto")[-1].mean()
    assert astray > 1
    assert right < -1


def test_sign_never_leaves_the_ridge_and_feedback_comes_down() -> None:
    def value(x: torch.Tensor) -> torch.Tensor:
        return 0.5 * x.sum(1).abs() + (x[:, 0] - x[:, 1]).abs()

    assert value(trajectory(torch.ones(2), ridge, 600, 0.002, "off")).min() >= 1 - 1e-3
    assert value(trajectory(torch.ones(2), ridge, 2000, 0.002, "auto"))[-200:].min() < 0.01


def test_sign_stays_on_least_squares_and_feedback_solves_them() -> None:
    def value(x: torch.Tensor) -> torch.Tensor:
        return 2 * (0.5 * x.sum(1)) ** 2 + 2 * (x[:, 0] - x[:, 1]) ** 2

    stays = value(trajectory(torch.ones(2), rows, 600, 0.02, "off"))
    assert stays.min() > 1.9
    assert value(trajectory(torch.ones(2), rows, 1500, 0.02, "auto"))[-1] < 1e-3


def test_gradient_that_is_not_finite_is_named_by_the_server_and_spoils_no_residual() -> None:
    bad = torch.ones(SIZE)
    bad[3] = float("inf")
    with job() as servers, torch_ps.Client(str(servers), name="w0", compress="topk:0.01") as client:
        client.init({"x": torch.zeros(SIZE)}, torch_ps.OptimizerSpec("SGD", lr=1.0))
        client.pull()
        client.push({"x": torch.ones(SIZE)})
        before = client.residual()["x"]
        client.push({"x": bad})
        assert servers.status().nonfinite == 1
        assert torch.equal(client.residual()["x"], before)
        assert client.push({"x": torch.ones(SIZE)}).params["x"].isfinite().all()


def test_gradient_of_weight_zero_leaves_the_residual_alone() -> None:
    with job() as servers, torch_ps.Client(str(servers), name="w0", compress="sign") as client:
        client.init({"x": torch.zeros(SIZE)}, torch_ps.OptimizerSpec("SGD", lr=1.0))
        client.pull()
        client.push({"x": torch.randn(SIZE)})
        before = client.residual()["x"]
        client.push({"x": torch.randn(SIZE)}, weight=0)
        assert torch.equal(client.residual()["x"], before)
