"""One synchronous worker over the server ends with the bits of the same loop without it, whatever the loop does."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import torch_ps
from tests.support.jobs import Servers, job, until
from tests.support.proxy import Proxy
from tests.support.threads import at_once, spawn
from tests.support.training import Make, MakeOptimizer, backward, conv, mlp, same, seeded
from torch_ps.common.plan import Bucket
from torch_ps.worker.optim.ahead_choice import BLOCK

STEPS = 20

OPTIMIZERS: dict[str, MakeOptimizer] = {
    "SGD": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3),
    "Adam": lambda m: torch.optim.Adam(m.parameters(), lr=0.01, foreach=False),
    "AdamW": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, foreach=False),
    "AdamW fused": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, fused=True),
}


@contextlib.contextmanager
def served(
    model: nn.Module, optimizer: torch.optim.Optimizer, servers: Servers | None = None, **options: Any
) -> Iterator[torch_ps.ParameterServerOptimizer]:
    """``optimizer`` wrapped, on a job of its own with several buckets unless ``servers`` are given."""
    with contextlib.ExitStack() as stack:
        if servers is None:
            servers = stack.enter_context(job(bucket_size=0.001))
        yield stack.enter_context(torch_ps.ParameterServerOptimizer(optimizer, model, str(servers), **options))


def loop(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = STEPS, **zero: bool) -> None:
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    for step in range(steps):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad(**zero)
        schedule.step()


def alone(make: Make, optimizer: MakeOptimizer, run: Callable[..., None] = loop) -> nn.Module:
    """The model after the loop without a server."""
    model = seeded(make)
    run(model, optimizer(model))
    return model


def over_server(make: Make, optimizer: MakeOptimizer, run: Callable[..., None] = loop, **options: Any) -> nn.Module:
    model = seeded(make)
    with served(model, optimizer(model), **options) as wrapped:
        run(model, wrapped)
    return model


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("make", [mlp, conv])
def test_one_worker_has_the_bits_of_local_training(make: Make, name: str) -> None:
    assert same(over_server(make, OPTIMIZERS[name]), alone(make, OPTIMIZERS[name]))


@pytest.mark.parametrize("overlap", ["on", "off"])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_overlap_and_zero_grad_do_not_change_a_bit(overlap: str, set_to_none: bool) -> None:
    def run(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        loop(model, optimizer, set_to_none=set_to_none)

    expected = alone(conv, OPTIMIZERS["SGD"])
    assert same(over_server(conv, OPTIMIZERS["SGD"], run, overlap=overlap), expected)


@pytest.mark.parametrize(("overlap", "first"), [("on", 1), ("eager", 0)])
def test_gradients_leave_during_backward(overlap: str, first: int) -> None:
    model = seeded(mlp)
    with served(model, OPTIMIZERS["SGD"](model), overlap=overlap, plane="network") as optimizer:
        total = 4 * sum(parameter.numel() for parameter in model.parameters())
        for step in range(3):
            before = optimizer.pushed_bytes
            backward(model, step)
            assert optimizer.pushed_bytes - before == (total if step or first else 0)
            optimizer.step()
            assert optimizer.pushed_bytes - before == total  # nothing is sent twice
            optimizer.zero_grad()


def test_gradients_that_change_after_backward_are_sent_at_step_from_the_second_step_on() -> None:
    model = seeded(mlp)
    with served(model, OPTIMIZERS["SGD"](model), plane="network") as optimizer:
        ahead = []
        for step in range(8):
            before = optimizer.pushed_bytes
            backward(model, step)
            ahead.append(optimizer.pushed_bytes > before)
            for parameter in model.parameters():
                parameter.grad.mul_(0.5)  # type: ignore[union-attr]
            optimizer.step()
            optimizer.zero_grad()
    assert ahead == [True] + 7 * [False]


def test_both_ways_of_sending_are_tried_in_turn_and_nothing_is_sent_twice() -> None:
    model = seeded(mlp)
    with served(model, OPTIMIZERS["SGD"](model), plane="network") as optimizer:
        total, ahead = 4 * sum(parameter.numel() for parameter in model.parameters()), []
        for step in range(BLOCK + 2):
            before = optimizer.pushed_bytes
            backward(model, step)
            ahead.append(optimizer.pushed_bytes - before)
            optimizer.step()
            optimizer.zero_grad()
            assert optimizer.pushed_bytes - before == total
    assert ahead == BLOCK * [total] + [0, 0]


def clipping(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for step in range(STEPS):
        backward(model, step)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()


def test_clipping_between_backward_and_step_is_honoured() -> None:
    assert same(over_server(mlp, OPTIMIZERS["SGD"], clipping), alone(mlp, OPTIMIZERS["SGD"], clipping))


def test_clipping_breaks_the_promise_of_an_eager_loop_before_anything_is_applied() -> None:
    model, before = seeded(mlp), seeded(mlp)
    with (
        served(model, OPTIMIZERS["SGD"](model), overlap="eager") as optimizer,
        pytest.raises(torch_ps.PsError, match=r"changed after backward \(nothing has been sent\); leave"),
    ):
        clipping(model, optimizer)
    assert same(model, before)


def test_second_backward_breaks_the_promise_of_an_eager_loop() -> None:
    model = seeded(mlp)
    with served(model, OPTIMIZERS["SGD"](model), overlap="eager") as optimizer:
        backward(model, 0)
        backward(model, 1)
        with pytest.raises(torch_ps.PsError, match=r"a second backward added to gradients.*accumulate=k"):
            optimizer.step()


def test_changed_hyperparameters_break_the_promise_of_an_eager_loop() -> None:
    model = seeded(mlp)
    with served(model, OPTIMIZERS["SGD"](model), overlap="eager") as optimizer:
        backward(model, 0)
        optimizer.step()
        optimizer.zero_grad()
        backward(model, 1)
        optimizer.param_groups[0]["lr"] = 0.5
        with pytest.raises(torch_ps.PsError, match=r"hyperparameters were changed after backward"):
            optimizer.step()


def test_loop_that_accumulates_by_itself_is_honoured() -> None:
    def run(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for step in range(STEPS):
            backward(model, 2 * step)
            backward(model, 2 * step + 1)
            optimizer.step()
            optimizer.zero_grad()

    assert same(over_server(mlp, OPTIMIZERS["SGD"], run), alone(mlp, OPTIMIZERS["SGD"], run))


@pytest.mark.parametrize("overlap", ["auto", "on", "off"])
def test_accumulated_batches_equal_one_large_batch(overlap: str) -> None:
    size, parts = 48, 3

    def large(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for step in range(STEPS):
            whole(model, step)
            optimizer.step()
            optimizer.zero_grad()

    def whole(model: nn.Module, step: int, part: slice = slice(None)) -> None:
        generator = torch.Generator().manual_seed(step)
        inputs = torch.randn(size, 12, generator=generator)
        labels = torch.randint(7, (size,), generator=generator)
        nn.functional.cross_entropy(model(inputs[part]), labels[part]).backward()  # type: ignore[no-untyped-call]

    def small(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for step in range(STEPS):
            for part in range(parts):
                whole(model, step, slice(part * size // parts, (part + 1) * size // parts))
                optimizer.step()
                optimizer.zero_grad()

    expected = alone(mlp, OPTIMIZERS["SGD"], large)
    found = over_server(mlp, OPTIMIZERS["SGD"], small, accumulate=parts, overlap=overlap)
    for a, b in zip(found.parameters(), expected.parameters(), strict=True):
        assert (a - b).norm() / b.norm() < 1e-6


def test_closure_is_evaluated_and_its_loss_returned() -> None:
    model = seeded(mlp)
    with served(model, OPTIMIZERS["SGD"](model)) as optimizer:
        loss = optimizer.step(lambda: backward(model, 0))
    assert loss.item() > 0


@pytest.mark.parametrize("local_steps", [1, 2])
def test_step_after_one_that_failed_pushes_again(local_steps: int) -> None:
    model = seeded(mlp)
    with (
        job(workers=2) as servers,
        served(model, OPTIMIZERS["SGD"](model), servers, local_steps=local_steps, timeout=1.0) as optimizer,
    ):
        for _ in range(2):  # the other worker never comes
            for step in range(local_steps - 1):
                backward(model, step)
                optimizer.step()
            with pytest.raises(torch_ps.WaitTimeout, match="step 0"):
                optimizer.step()


def test_step_after_one_that_was_interrupted_takes_no_late_answer_for_its_own() -> None:
    model, taken = seeded(mlp), list[int]()

    def interrupt() -> None:
        until(lambda: servers.status().version == 1 and optimizer._session._wait_failed, "its answer is waited for")
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    def release() -> None:
        until(lambda: bool(servers.status()) and optimizer.pushed_bytes > pushed, "the step is sent again")
        proxy.release()

    def write(bucket: Bucket, values: torch.Tensor) -> None:
        taken.append(bucket.index)
        if len(taken) == 2:
            until(lambda: bool(servers.status()) and optimizer._session.waiting, "the next step is sent")
        write_into_model(bucket, values)

    with (
        job() as servers,
        Proxy(str(servers)) as proxy,
        torch_ps.ParameterServerOptimizer(OPTIMIZERS["SGD"](model), model, proxy.address) as optimizer,
    ):
        write_into_model, optimizer._session.on_values = optimizer._session.on_values, write
        backward(model, 0)
        proxy.hold()
        interrupted = spawn(interrupt)
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
        interrupted.result()
        pushed = optimizer.pushed_bytes
        released = spawn(release)
        versions = []
        for _ in range(3):
            optimizer.step()
            versions.append(optimizer.version)
        released.result()
    assert versions == [1, 2, 3]


def test_learning_rate_of_a_loaded_state_reaches_the_server() -> None:
    def run(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        saved = optimizer.state_dict()
        saved["param_groups"][0]["lr"] = 0.03
        optimizer.load_state_dict(saved)
        loop(model, optimizer)

    assert same(over_server(mlp, OPTIMIZERS["SGD"], run), alone(mlp, OPTIMIZERS["SGD"], run))


def test_groups_keep_their_own_hyperparameters() -> None:
    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        first, _, last = model.children()
        return torch.optim.SGD(
            [{"params": last.parameters(), "lr": 0.3}, {"params": first.parameters(), "momentum": 0.5}], lr=0.1
        )

    assert same(over_server(mlp, optimizer), alone(mlp, optimizer))


@pytest.mark.parametrize("plane", ["memory", "network"])
def test_step_that_failed_changes_the_model_no_more_and_what_is_written_after_it_counts(plane: str) -> None:
    """The late answer comes between two steps, and the step after it is answered for the one that failed."""

    def named(rank: int, timeout: float) -> torch_ps.ParameterServerOptimizer:
        plain = torch.optim.SGD(models[rank].parameters(), lr=0.1)
        return torch_ps.ParameterServerOptimizer(
            plain, models[rank], str(servers), rank=rank, timeout=timeout, plane=plane
        )

    models = seeded(mlp), seeded(mlp)
    with job(workers=2) as servers, named(0, 1.0) as first, named(1, 30.0) as second:
        backward(models[0], 0)
        with pytest.raises(torch_ps.WaitTimeout, match="step 0"):
            first.step()
        weight = models[0].get_parameter("0.weight")
        with torch.no_grad():
            weight.fill_(0.25)
        before = [parameter.detach().clone() for parameter in models[0].parameters()]
        backward(models[1], 1, 1)
        second.step()
        for now, then in zip(models[0].parameters(), before, strict=True):
            assert torch.equal(now, then)
        first.step()
        assert first.version == 1
        assert torch.equal(weight, torch.full_like(weight, 0.25))
        assert torch.equal(models[0].get_parameter("2.weight"), models[1].get_parameter("2.weight"))
        first.zero_grad()
        second.zero_grad()
        at_once(first.step, second.step)
        assert same(*models)
        assert torch.equal(weight, torch.full_like(weight, 0.25))
