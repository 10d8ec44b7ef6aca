"""The server says so before asynchronous SGD diverges, and is silent about runs that do not.

On f(x) = lambda x^2 / 2 every limit is known; on the digits (check C13) 8 workers diverge at lr .3 and learn at .1.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner

import torch_ps
from tests.conformance.test_digits import GRADIENTS, Learner, split
from tests.observability.test_monitoring import metrics
from tests.support.jobs import Servers, job
from tests.support.quadratic import Quadratic
from torch_ps.ps.core.lr_stability import limit
from torch_ps.worker.commands import status
from torch_ps.worker.tasks.digits import mlp

CURVATURE = 3.0
FAR = 1e3


@dataclass
class Run:
    """What became of x, what was said, and how far x was when it was first said (0: never)."""

    peak: float
    advice: list[str]
    warned_at: float
    log: str
    ratio: float


def run(
    num_workers: int,
    rate: float,
    pushes: int,
    *,
    shards: int = 1,
    mode: str = "async",
    staleness_lr: str = "constant",
    slack: int | None = None,
    **hyper: float | bool,
) -> Run:
    """Round robin at ``rate`` on a quadratic, until x is far out."""
    settings = {} if slack is None else {"slack": slack}
    spec = torch_ps.OptimizerSpec("SGD", lr=rate, **hyper)
    with (
        job(mode=mode, workers=num_workers, shards=shards, staleness_lr=staleness_lr, **settings) as servers,
        workers_of(servers, num_workers, spec) as workers,
    ):
        peak, warned_at = 0.0, 0.0
        for step in range(pushes):
            x = workers[step % num_workers].push().abs().max().item()
            peak = max(peak, x)
            if not warned_at and step % 8 == 0 and servers.status().advice:
                warned_at = x
            if x > FAR:
                break
        advice = list(servers.status().advice)
        ratio = metrics(servers, 0)["ps_learning_rate_limit_ratio"]
        return Run(peak, advice, warned_at, servers.log, ratio)


@contextlib.contextmanager
def workers_of(servers: Servers, num_workers: int, spec: torch_ps.OptimizerSpec) -> Iterator[list[Quadratic]]:
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(torch_ps.Client(str(servers), name=f"w{i}")) for i in range(num_workers)]
        for client in clients:
            client.init({"x": torch.ones(3)}, spec)
        yield [Quadratic(client, torch.full((3,), CURVATURE)) for client in clients]


@pytest.mark.parametrize("num_workers", [2, 4, 8])
def test_eleven_tenths_of_the_limit_are_warned_about_before_x_is_far_out(num_workers: int) -> None:
    edge = limit(num_workers - 1) / CURVATURE
    found = run(num_workers, 1.1 * edge, 1500)
    assert found.peak > FAR
    assert 0 < found.warned_at < FAR
    (sentence,) = found.advice
    assert f"is above the limit {edge:.3g} at the curvature 3 seen so far" in sentence
    assert f"with {num_workers} workers (mean staleness {num_workers - 1})" in sentence
    assert found.log.count(sentence) == 1
    assert found.ratio == pytest.approx(1.1, rel=0.02)


@pytest.mark.parametrize("num_workers", [2, 4, 8])
def test_nine_tenths_of_the_limit_are_not_warned_about(num_workers: int) -> None:
    found = run(num_workers, 0.9 * limit(num_workers - 1) / CURVATURE, 400)
    assert found.advice == []
    assert found.ratio == pytest.approx(0.9, rel=0.02)


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_has_its_own_limit(nesterov: bool) -> None:
    edge = limit(3, 0.8, nesterov=nesterov) / CURVATURE
    found = run(4, 1.15 * edge, 2000, momentum=0.8, nesterov=nesterov)
    assert 0 < found.warned_at < FAR < found.peak
    assert f"and momentum 0.8 is above the limit {edge:.3g} at" in found.advice[0]
    assert run(4, 0.9 * edge, 500, momentum=0.8, nesterov=nesterov).advice == []


def test_run_that_weight_decay_holds_together_is_not_warned_about() -> None:
    found = run(4, 1.1 * limit(3) / CURVATURE, 400, weight_decay=1.0)
    assert (found.advice, found.peak < FAR) == ([], True)


def test_rate_that_follows_staleness_is_not_warned_about_where_it_is_stable() -> None:
    found = run(8, 1.2 / CURVATURE, 600, staleness_lr="inverse")  # six times the limit of a constant rate
    assert (found.advice, found.peak < FAR) == ([], True)


def test_bounded_staleness_is_looked_after_too_and_every_shard_is_not_heard() -> None:
    edge = limit(3) / CURVATURE
    found = run(4, 1.2 * edge, 800, mode="ssp", slack=2, shards=2)
    assert 0 < found.warned_at < FAR
    assert found.log.count("is above the limit") == 1


def test_synchronous_job_is_left_alone() -> None:
    assert run(1, 2.2 / CURVATURE, 200, mode="sync").advice == []


@pytest.mark.parametrize(
    ("mode", "staleness_lr", "num_workers", "said"),
    [("async", "constant", 4, 1), ("async", "constant", 2, 0), ("async", "inverse", 3, 0), ("sync", "constant", 3, 0)],
)
def test_high_momentum_is_advised_against_once_when_the_third_worker_joins(
    mode: str, staleness_lr: str, num_workers: int, said: int
) -> None:
    spec = torch_ps.OptimizerSpec("SGD", lr=1e-3, momentum=0.9)
    with job(mode=mode, staleness_lr=staleness_lr, workers=num_workers) as servers, contextlib.ExitStack() as stack:
        for index in range(num_workers):
            client = stack.enter_context(torch_ps.Client(str(servers), name=f"w{index}"))
            client.init({"x": torch.ones(1)}, spec)
        advice = list(servers.status().advice)
        assert len(advice) == servers.log.count("momentum 0.9 with 3 workers") == said
        assert all(sentence.startswith("momentum 0.9 with 3 workers") for sentence in advice)
        shown = CliRunner().invoke(status.main, ["--servers", str(servers)]).output
        assert ("warning: momentum 0.9 with 3 workers" in " ".join(shown.split())) == bool(said)


@pytest.mark.parametrize(
    ("lr", "staleness_lr", "pushes"),
    [
        pytest.param(0.3, "constant", 96, id="lr .3 is warned about"),
        pytest.param(0.1, "constant", GRADIENTS, id="lr .1 is not"),
        pytest.param(0.6, "inverse", GRADIENTS, id="lr .6 that follows staleness is not"),
    ],
)
def test_digits_are_warned_about_in_time_where_they_diverge(lr: float, staleness_lr: str, pushes: int) -> None:
    images, labels = split()[0]
    losses: list[float] = []
    warned = 0
    with job(mode="async", workers=8, staleness_lr=staleness_lr) as servers, contextlib.ExitStack() as stack:
        learners = []
        for rank in range(8):
            torch.manual_seed(0)
            client = stack.enter_context(torch_ps.Client(str(servers), name=f"w{rank}"))
            learners.append(Learner(client, rank, 8, lr))
        for learner in learners:
            learner.start()
        for step in range(pushes):
            learners[step % 8].push()
            if step % 8 == 7 and not warned and lr == 0.3:
                warned = len(losses) if servers.status().advice else 0
                logits = torch.func.functional_call(mlp(), learners[step % 8].params, (images,))
                losses.append(F.cross_entropy(logits, labels).item())
        advice = list(servers.status().advice)
    if lr == 0.3:
        assert warned, losses
        assert max(losses) < 5, losses  # it began at 2.3
        assert "learning rate 0.3 with 8 workers (mean staleness 7) is above the limit 0." in advice[0]
    else:
        assert advice == []
