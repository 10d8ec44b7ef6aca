"""C11 and the rest of what local steps promise: the outer step is what DiLoCo says, the inner one is the user's own.

The reference is plain torch: every worker's optimizer on its own model, then SGD on the mean of (start - end).

Source: Douillard et al., DiLoCo, arXiv:2311.08105; the fixed points from f_i = lambda_i (x - b_i)^2 / 2 in closed form.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import nn

import torch_ps
from tests.support.jobs import Servers, job
from tests.support.threads import at_once
from tests.support.training import Make, MakeOptimizer, backward, conv, mlp, same, seeded

CURVATURES, MINIMA, INNER_LR = (1.0, 4.0), (0.0, 1.0), 0.1
FIXED_POINTS = {1: 0.8, 2: 0.771084, 10: 0.604126}
ROUNDS = 80
#: Unit roundoff of fp32.
UNIT = 2.0**-24


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01, foreach=False)


@contextlib.contextmanager
def served(
    model: nn.Module, inner: torch.optim.Optimizer, servers: Servers | None, **options: Any
) -> Iterator[torch_ps.ParameterServerOptimizer]:
    """On a job of its own with several buckets unless ``servers`` are given."""
    with contextlib.ExitStack() as stack:
        if servers is None:
            servers = stack.enter_context(job(bucket_size=0.001))
        yield stack.enter_context(torch_ps.ParameterServerOptimizer(inner, model, str(servers), **options))


def loop(model: nn.Module, optimizer: torch.optim.Optimizer, steps: Sequence[int], worker: int = 0) -> None:
    for step in steps:
        backward(model, step, worker)
        optimizer.step()
        optimizer.zero_grad()


# -------------------------------------------------------------- C11


@pytest.mark.parametrize("steps", FIXED_POINTS)
def test_fixed_point_by_hand(steps: int) -> None:
    with job(workers=2) as servers:

        def run(rank: int) -> float:
            with torch_ps.Client(str(servers), name=f"w{rank}") as client:
                client.init({"x": torch.full((1,), 5.0)}, torch_ps.OptimizerSpec("SGD", lr=1.0))
                start = client.pull().params["x"]
                for _ in range(ROUNDS):
                    end = start.clone()
                    for _ in range(steps):
                        end -= INNER_LR * CURVATURES[rank] * (end - MINIMA[rank])
                    start = client.push({"x": start - end}).params["x"]
                return start.item()

        found = at_once(lambda: run(0), lambda: run(1))
    assert found == [pytest.approx(FIXED_POINTS[steps], abs=1e-6)] * 2


class Point(nn.Module):
    """One number."""

    def __init__(self, at: float = 5.0) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.tensor([at]))


@pytest.mark.parametrize("steps", FIXED_POINTS)
def test_fixed_point_of_the_wrapped_optimizer(steps: int) -> None:
    outer = {"outer_lr": 1.0, "outer_momentum": 0.0} if steps > 1 else {}  # one local step is plain synchronous SGD
    with job(workers=2) as servers:

        def run(rank: int) -> float:
            model = Point()
            inner = torch.optim.SGD(model.parameters(), lr=INNER_LR)
            with served(model, inner, servers, name=f"w{rank}", local_steps=steps, **outer) as optimizer:
                for _ in range(ROUNDS * steps):
                    (CURVATURES[rank] * (model.x - MINIMA[rank]).square() / 2).sum().backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
                    optimizer.zero_grad()
                assert optimizer.version == ROUNDS
            return model.x.item()

        found = at_once(lambda: run(0), lambda: run(1))
    assert found == [pytest.approx(FIXED_POINTS[steps], abs=1e-6)] * 2


# -------------------------------------------------------------- one worker

MEAN = {"outer_lr": 1.0, "outer_momentum": 0.0}


def test_one_worker_with_the_mean_as_outer_step_trains_as_without_a_server() -> None:
    steps, rounds = 5, 20
    local, remote = seeded(mlp), seeded(mlp)
    alone = adamw(local)
    with served(remote, adamw(remote), None, local_steps=steps, **MEAN) as optimizer:
        start = [parameter.detach().clone() for parameter in local.parameters()]
        loop(local, alone, range(steps))
        loop(remote, optimizer, range(steps))
        ends = zip(start, local.parameters(), remote.parameters(), strict=True)
        for s, e, x in [[each.detach().double() for each in tensors] for tensors in ends]:
            # What two roundings, of start - end and of start - that, can do; nothing else is between them.
            assert ((x - e).abs() <= UNIT * (1 + 1e-6) * ((s - e).abs() + x.abs())).all()
        loop(local, alone, range(steps, steps * rounds))
        loop(remote, optimizer, range(steps, steps * rounds))
    for a, b in zip(remote.parameters(), local.parameters(), strict=True):
        assert (a - b).norm() / b.norm() < 1e-6


def test_schedule_acts_on_the_inner_learning_rate() -> None:
    def run(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=12)
        for step in range(12):
            backward(model, step)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()

    local, remote, constant = seeded(mlp), seeded(mlp), seeded(mlp)
    run(local, adamw(local))
    loop(constant, adamw(constant), range(12))
    with served(remote, adamw(remote), None, local_steps=4, **MEAN) as optimizer:
        run(remote, optimizer)
        before = [parameter.detach().clone() for parameter in remote.parameters()]
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        loop(remote, optimizer, range(4))
        assert optimizer.version == 4
        assert all(torch.equal(a, b) for a, b in zip(before, remote.parameters(), strict=True))
    for a, b, c in zip(remote.parameters(), local.parameters(), constant.parameters(), strict=True):
        assert (a - b).norm() / b.norm() < 1e-6
        assert (a - c).norm() / c.norm() > 1e-3


def test_accumulated_passes_make_one_inner_step_with_their_mean() -> None:
    def doubled(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for step in range(0, 24, 2):
            (backward(model, step), backward(model, step + 1))
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.grad /= 2
            optimizer.step()
            optimizer.zero_grad()

    local, remote = seeded(mlp), seeded(mlp)
    doubled(local, adamw(local))
    with served(remote, adamw(remote), None, local_steps=3, accumulate=2, **MEAN) as optimizer:
        for step in range(24):
            pushed = optimizer.pushed_bytes
            loop(remote, optimizer, [step])
            assert (optimizer.pushed_bytes > pushed) == (step % 6 == 5)
        assert (optimizer.version, optimizer.samples) == (4, 24)
    for a, b in zip(remote.parameters(), local.parameters(), strict=True):
        assert (a - b).norm() / b.norm() < 1e-6


# -------------------------------------------------------------- two workers, to the bit

STEPS, TIMES = 4, 6


def reference(make: Make, num_workers: int, outer: dict[str, Any]) -> nn.Module:
    """Synchronous rounds in plain torch: sum of start - end in rank order, divided once, Nesterov."""
    master = seeded(make)
    models = [seeded(make) for _ in range(num_workers)]
    inners = [adamw(model) for model in models]
    sgd = torch.optim.SGD(master.parameters(), foreach=False, **outer)
    for number in range(TIMES):
        for rank, (model, inner) in enumerate(zip(models, inners, strict=True)):
            loop(model, inner, range(STEPS * number, STEPS * (number + 1)), rank)
        for start, *ends in zip(master.parameters(), *(model.parameters() for model in models), strict=True):
            total = start.detach() - ends[0].detach()
            for end in ends[1:]:
                total = total + (start.detach() - end.detach())
            start.grad = total / num_workers
        sgd.step()
        for mean, *buffers in zip(master.buffers(), *(model.buffers() for model in models), strict=True):
            value = sum(buffer.float() for buffer in buffers) / num_workers
            mean.copy_(value if mean.is_floating_point() else value.round())
        for model in models:
            model.load_state_dict(master.state_dict())
    return master


@pytest.mark.parametrize("make", [mlp, conv])
@pytest.mark.parametrize(
    ("outer", "options"),
    [
        ({"lr": 0.7, "momentum": 0.9, "nesterov": True}, {}),
        ({"lr": 1.0}, {"outer_lr": 1.0, "outer_momentum": 0.0}),
    ],
)
def test_two_workers_have_the_bits_of_plain_torch_on_any_number_of_shards(
    make: Make, outer: dict[str, Any], options: dict[str, float]
) -> None:
    expected = reference(make, 2, outer)
    for shards in (1, 2, 3):
        with job(workers=2, shards=shards, bucket_size=0.001) as servers:
            models = [seeded(make) for _ in range(2)]  # not on the threads: the seed is one for all

            def run(rank: int, servers: Servers = servers, models: list[nn.Module] = models) -> None:
                model = models[rank]
                with served(model, adamw(model), servers, name=f"w{rank}", local_steps=STEPS, **options) as optimizer:
                    loop(model, optimizer, range(STEPS * TIMES), rank)

            at_once(lambda: run(0), lambda: run(1))
        assert all(same(model, expected) for model in models)


def test_asynchronous_rounds_have_the_bits_of_plain_torch_and_staleness_in_outer_versions() -> None:
    master = seeded(mlp)
    sgd = torch.optim.SGD(master.parameters(), lr=0.4, momentum=0.5, nesterov=True, foreach=False)
    models, remotes = [seeded(mlp) for _ in range(2)], [seeded(mlp) for _ in range(2)]
    inners, staleness = [adamw(model) for model in models], []
    options = {"local_steps": STEPS, "outer_lr": 0.4, "outer_momentum": 0.5}
    with (
        job(mode="async", workers=2, bucket_size=0.001) as servers,
        served(remotes[0], adamw(remotes[0]), servers, name="w0", **options) as first,
        served(remotes[1], adamw(remotes[1]), servers, name="w1", **options) as second,
    ):
        for number in range(2 * TIMES):
            rank, optimizer = number % 2, (first, second)[number % 2]
            start = seeded(mlp)
            start.load_state_dict(models[rank].state_dict())
            loop(models[rank], inners[rank], range(STEPS * number, STEPS * (number + 1)), rank)
            loop(remotes[rank], optimizer, range(STEPS * number, STEPS * (number + 1)), rank)
            staleness.append(optimizer.staleness)
            for mine, a, b in zip(master.parameters(), start.parameters(), models[rank].parameters(), strict=True):
                mine.grad = a.detach() - b.detach()
            sgd.step()
            models[rank].load_state_dict(master.state_dict())
            assert same(remotes[rank], master)
        assert optimizer.samples == 2 * TIMES * STEPS
    assert staleness == [0] + [1] * (2 * TIMES - 1)


def test_round_counts_with_the_sum_of_the_weights_of_its_steps() -> None:
    with job(workers=2) as servers:

        def run(rank: int) -> float:
            model = Point(0.0)
            inner = torch.optim.SGD(model.parameters(), lr=1.0)
            with served(model, inner, servers, name=f"w{rank}", local_steps=2, **MEAN) as optimizer:
                for weight in ((4, 6), (10, 20))[rank]:
                    before = optimizer.unpushed
                    optimizer.weight = weight
                    (rank * model.x).sum().backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
                    optimizer.zero_grad()
                    assert optimizer.unpushed == (weight if not before and optimizer.version == 0 else 0)
                assert optimizer.samples == 40
            return model.x.item()

        # The end of worker 0 is 0, of worker 1 it is -2.
        assert at_once(lambda: run(0), lambda: run(1)) == [0.75 * -2] * 2


# -------------------------------------------------------------- any inner optimizer


class Own(torch.optim.Optimizer):
    """A class that no server knows."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.01})

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.add_(parameter.grad.sign(), alpha=-group["lr"])


def matrices() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 33, bias=False), nn.Tanh(), nn.Linear(33, 7, bias=False))


INNERS: dict[str, MakeOptimizer] = {
    "Adafactor": lambda m: torch.optim.Adafactor(m.parameters()),
    "own": lambda m: Own(m.parameters()),
    "AdamW fused": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, fused=True),
}
if hasattr(torch.optim, "Muon"):
    INNERS["Muon"] = lambda m: torch.optim.Muon(m.parameters(), lr=0.01)


@pytest.mark.parametrize("name", INNERS)
def test_optimizer_that_no_server_could_run_makes_the_inner_steps(name: str) -> None:
    local, remote = seeded(matrices), seeded(matrices)
    loop(local, INNERS[name](local), range(3 * STEPS))
    with served(remote, INNERS[name](remote), None, local_steps=STEPS, **MEAN) as optimizer:
        loop(remote, optimizer, range(3 * STEPS))
        assert optimizer.version == 3
    for a, b in zip(remote.parameters(), local.parameters(), strict=True):
        assert (a - b).norm() / b.norm() < 1e-5


def test_optimizer_that_evaluates_the_model_by_itself_makes_the_inner_steps() -> None:
    def run(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
        def closure(step: int) -> torch.Tensor:
            optimizer.zero_grad()
            return backward(model, step)

        losses = [optimizer.step(lambda step=step: closure(step)) for step in range(4)]  # type: ignore[arg-type, misc]
        return [loss.item() for loss in losses]  # type: ignore[attr-defined]

    local, remote = seeded(mlp), seeded(mlp)
    expected = run(local, torch.optim.LBFGS(local.parameters(), lr=0.1, max_iter=4))
    inner = torch.optim.LBFGS(remote.parameters(), lr=0.1, max_iter=4)
    with served(remote, inner, None, local_steps=2, **MEAN) as optimizer:
        assert run(remote, optimizer) == pytest.approx(expected, rel=1e-5)
    for a, b in zip(remote.parameters(), local.parameters(), strict=True):
        assert (a - b).norm() / b.norm() < 1e-5


def test_lbfgs_begins_anew_where_outer_momentum_has_moved_the_model() -> None:
    """Else it takes the servers' move for a step of its own, and the loss goes to 1e9 and beyond."""

    def train(model: nn.Module, optimizer: Any, steps: Sequence[int]) -> list[float]:
        def closure(step: int) -> float:
            optimizer.zero_grad()
            return backward(model, step).item()

        return [float(optimizer.step(lambda step=step: closure(step))) for step in steps]

    def lbfgs(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(model.parameters(), lr=1.0, max_iter=4)

    local, remote = seeded(mlp), seeded(mlp)
    masters = [parameter.detach().clone() for parameter in local.parameters()]
    outer = torch.optim.SGD(masters, lr=0.7, momentum=0.9, nesterov=True)
    expected: list[float] = []
    for begin in range(0, 12, 2):
        expected += train(local, lbfgs(local), (begin, begin + 1))
        for master, parameter in zip(masters, local.parameters(), strict=True):
            master.grad = master - parameter.detach()
        outer.step()
        torch._foreach_copy_([parameter.detach() for parameter in local.parameters()], masters)
    with served(remote, lbfgs(remote), None, local_steps=2) as optimizer:
        assert train(remote, optimizer, range(12)) == pytest.approx(expected, rel=1e-3)


def test_state_of_the_inner_optimizer_is_saved_loaded_and_kept_between_rounds() -> None:
    model = seeded(mlp)
    with served(model, adamw(model), None, local_steps=2, **MEAN) as optimizer:
        loop(model, optimizer, range(6))
        saved = optimizer.state_dict()
        assert [float(each["step"]) for each in saved["state"].values()] == [6.0] * 4
        saved["param_groups"][0]["lr"] = 0.0
        optimizer.load_state_dict(saved)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        loop(model, optimizer, range(2))
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
