"""optimizer.clip_grad_norm_: clips the mean gradient of all workers, as one process with all of their batches does."""

import logging
import math
import threading
from typing import Any

import pytest
import torch
from torch import nn

import torch_ps
from tests.support.jobs import Servers, job
from tests.support.threads import at_once, spawn
from tests.support.training import backward, batch, mlp, same, seeded

MAX_NORM, STEPS, SIZE = 0.5, 6, 8
SEEDING = threading.Lock()
Optimizer = torch_ps.ParameterServerOptimizer


def made() -> nn.Module:
    """The same model each time. Workers are threads here, and the seed is of the process."""
    with SEEDING:
        return seeded(mlp)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)


def served(model: nn.Module, servers: object, **options: Any) -> Optimizer:
    return Optimizer(sgd(model), model, str(servers), timeout=options.pop("timeout", 30.0), **options)


def clip(optimizer: torch.optim.Optimizer, model: nn.Module, norm: float = MAX_NORM, kind: float = 2.0) -> float:
    if isinstance(optimizer, Optimizer):
        return float(optimizer.clip_grad_norm_(norm, kind))
    return float(nn.utils.clip_grad_norm_(model.parameters(), norm, kind))


def one_process(num_workers: int, kind: float = 2.0, norm: float = MAX_NORM) -> tuple[nn.Module, list[float]]:
    """Plain torch with the batches of all workers in one, and the norms that it clips by."""
    model = made()
    optimizer, norms = sgd(model), []
    for step in range(STEPS):
        inputs, labels = zip(*(batch(step, worker, SIZE) for worker in range(num_workers)), strict=True)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.cat(inputs)), torch.cat(labels)).backward()  # type: ignore[no-untyped-call]
        norms.append(clip(optimizer, model, norm, kind))
        optimizer.step()
    return model, norms


def train(servers: Servers, rank: int, plane: str = "auto", **options: Any) -> tuple[nn.Module, list[float]]:
    kind, norm = options.pop("kind", 2.0), options.pop("norm", MAX_NORM)
    model, norms = made(), []
    with served(model, servers, rank=rank, plane=plane, **options) as optimizer:
        for step in range(STEPS):
            optimizer.zero_grad()
            backward(model, step, rank, SIZE)
            norms.append(clip(optimizer, model, norm, kind))
            optimizer.step()
    return model, norms


def workers(servers: Servers, *planes: str, **options: Any) -> list[tuple[nn.Module, list[float]]]:
    """A worker per plane, all at once."""
    return at_once(*(lambda r=r, p=p: train(servers, r, p, **dict(options)) for r, p in enumerate(planes)))


def assert_close(model: nn.Module, reference: nn.Module) -> None:
    for found, expected in zip(model.parameters(), reference.parameters(), strict=True):
        assert (found - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize(("kind", "norm"), [(2.0, MAX_NORM), (math.inf, 0.1), (3.0, 0.2)])
def test_workers_clip_as_one_process_with_all_batches(kind: float, norm: float) -> None:
    reference, expected = one_process(2, kind, norm)
    assert max(expected) > norm > 0
    with job(workers=2, shards=2, bucket_size=0.001) as servers:
        found = workers(servers, "network", "memory", kind=kind, norm=norm)
    for model, norms in found:
        assert norms == pytest.approx(expected, rel=1e-6)
        assert_close(model, reference)
    assert found[0][1] == found[1][1]


def test_bits_depend_neither_on_shards_nor_on_planes() -> None:
    found = []
    for shards, planes in ((1, "network"), (2, "memory"), (3, "auto")):
        with job(workers=3, shards=shards, bucket_size=0.001, threads=2) as servers:
            found += workers(servers, planes, planes, "network")
    assert all(same(model, found[0][0]) and norms == found[0][1] for model, norms in found)


@pytest.mark.parametrize(
    ("mode", "options"),
    [("sync", {}), ("sync", {"plane": "network"}), ("sync", {"overlap": "forward"}), ("async", {})],
    ids=["sync", "network", "forward", "async"],
)
def test_worker_that_is_alone_clips_with_the_bits_of_torch(mode: str, options: dict[str, Any]) -> None:
    reference, expected = one_process(1)
    with job(mode=mode, shards=2, bucket_size=0.001) as servers:
        model, norms = train(servers, 0, **options)
    assert norms == expected
    assert same(model, reference)


def in_groups(model: nn.Module) -> torch.optim.Optimizer:
    """Weights in one group, biases in another, as scripts make it that decay weights only."""
    wide = [each for each in model.parameters() if each.ndim > 1]
    rest = [each for each in model.parameters() if each.ndim < 2]
    groups: list[dict[str, Any]] = [{"params": rest, "weight_decay": 0.0}, {"params": wide}]
    return torch.optim.AdamW(groups, lr=0.01)


def test_norm_adds_up_in_the_order_of_the_model_not_of_the_groups() -> None:
    reference, plain = made(), made()
    torches = in_groups(reference)
    with job() as servers, Optimizer(in_groups(plain), plain, str(servers), timeout=30.0) as optimizer:
        for step in range(40):
            for model, each in ((reference, torches), (plain, optimizer)):
                each.zero_grad()
                backward(model, step, 0, SIZE)
            assert clip(optimizer, plain) == clip(torches, reference)
            torches.step()
            optimizer.step()
            assert same(plain, reference)


def test_inner_steps_of_local_steps_are_clipped_by_the_workers_own_norm() -> None:
    reference, expected = one_process(1)
    with job(mode="sync") as servers:
        model, norms = train(servers, 0, local_steps=STEPS, outer_lr=1.0, outer_momentum=0.0)
    assert norms == expected
    assert_close(model, reference)


def test_weights_count_in_the_mean() -> None:
    with job(workers=2) as servers:

        def norm(rank: int) -> float:
            model = nn.Linear(2, 1, bias=False)
            with served(model, servers, rank=rank) as optimizer:
                optimizer.weight = 1.0 + 2 * rank
                model.weight.grad = torch.tensor([[4.0 * rank, 0.0]])
                return float(optimizer.clip_grad_norm_(1.0))

        assert at_once(lambda: norm(0), lambda: norm(1)) == [3.0, 3.0]


def test_parameter_without_a_gradient_counts_as_zero_and_stays_without() -> None:
    with job(workers=2, bucket_size=0.001) as servers:

        def clipped(rank: int) -> tuple[float, Any]:
            model = nn.Linear(2, 1)
            with served(model, servers, rank=rank) as optimizer:
                if rank:
                    model.bias.grad = torch.tensor([8.0])
                model.weight.grad = torch.tensor([[6.0, 0.0]])
                return float(optimizer.clip_grad_norm_(1.0)), model.bias.grad

        (first, none), (second, some) = at_once(lambda: clipped(0), lambda: clipped(1))
    assert first == second == pytest.approx(math.hypot(6.0, 4.0))
    assert none is None
    assert some == pytest.approx(8.0 / first, rel=1e-5)


def test_gradient_that_is_not_finite_on_one_worker_has_all_leave_the_step_out() -> None:
    with job(workers=2) as servers:

        def loop(rank: int) -> tuple[float, int, bool]:
            model = made()
            with served(model, servers, rank=rank) as optimizer:
                backward(model, 0, rank)
                next(model.parameters()).grad[0, 0] = torch.inf if rank else 1.0  # type: ignore[index]
                norm = clip(optimizer, model)
                optimizer.step()
                return norm, optimizer.left_out, same(model, made())

        assert at_once(lambda: loop(0), lambda: loop(1)) == [(math.inf, 1, True)] * 2


def test_norm_that_is_not_finite_is_an_error_on_every_worker_where_the_loop_says_so() -> None:
    with job(workers=2) as servers:

        def loop(rank: int) -> None:
            model = made()
            with served(model, servers, rank=rank) as optimizer:
                backward(model, 0, rank)
                next(model.parameters()).grad[0, 0] = torch.nan if rank else 1.0  # type: ignore[index]
                with pytest.raises(RuntimeError, match="mean gradient of w0, w1 is not finite"):
                    optimizer.clip_grad_norm_(1.0, error_if_nonfinite=True)

        at_once(lambda: loop(0), lambda: loop(1))


def test_clipped_gradient_that_the_loop_drops_is_asked_for_anew() -> None:
    """One worker throws its first batch away after it was clipped; the other is in its step by then."""
    with job(workers=2) as servers:

        def loop(rank: int) -> tuple[list[float], nn.Module]:
            model, norms = made(), []
            with served(model, servers, rank=rank) as optimizer:
                for step in (7, 0) if rank else (0,):
                    optimizer.zero_grad()
                    backward(model, step, rank)
                    norms.append(clip(optimizer, model))
                optimizer.step()
                optimizer.zero_grad()
                backward(model, 1, rank)
                norms.append(clip(optimizer, model))
                optimizer.step()
                return norms, model

        (first, one), (second, other) = at_once(lambda: loop(0), lambda: loop(1))
    assert len(second) == 3
    assert (first[0], first[-1]) == (second[0], second[-1])
    assert same(one, other)


def test_worker_that_pushes_without_asking_holds_nobody_up_and_is_named(caplog: pytest.LogCaptureFixture) -> None:
    with job(workers=2) as servers:

        def loop(rank: int) -> float:
            model = made()
            with served(model, servers, rank=rank) as optimizer:
                backward(model, 0, rank)
                norm = 0.0 if rank else clip(optimizer, model)
                optimizer.step()
                return norm

        with caplog.at_level(logging.WARNING):
            norm, _ = at_once(lambda: loop(0), lambda: loop(1))
    model = made()
    backward(model, 0, 0)
    assert norm == clip(sgd(model), model)
    told = "worker w0 clips step 0 by the norm of the mean of w0 alone: w1 pushed the step without"
    assert [record for record in caplog.messages if record.startswith(told)] != []


@pytest.mark.parametrize("plane", ["memory", "network"])
def test_worker_that_leaves_holds_nobody_up(plane: str) -> None:
    with job(workers=2, shards=2, bucket_size=0.001) as servers:
        first, second = at_once(*(lambda r=r: served(made(), servers, rank=r, plane=plane) for r in (0, 1)))
        with first:
            parameters = first.param_groups[0]["params"]
            for parameter in parameters:
                parameter.grad = torch.ones_like(parameter)
            waiting = spawn(lambda: float(first.clip_grad_norm_(1.0)))
            second.close()
            assert waiting.result(30) == pytest.approx(sum(each.numel() for each in parameters) ** 0.5)


def test_wait_for_a_worker_that_does_not_come_names_it_and_the_loop_can_go_on() -> None:
    with job(workers=2) as servers:
        models = [made() for _ in range(2)]
        first, second = at_once(*(lambda r=r: served(models[r], servers, rank=r, timeout=0.5) for r in (0, 1)))
        with first, second:
            for rank in (0, 1):
                backward(models[rank], 0, rank)
            with pytest.raises(torch_ps.WaitTimeout, match="the norm of step 0 waits for w1"):
                first.clip_grad_norm_(MAX_NORM)
            both = at_once(lambda: first.clip_grad_norm_(MAX_NORM), lambda: second.clip_grad_norm_(MAX_NORM))
            assert float(both[0]) == float(both[1])
            at_once(first.step, second.step)
        assert same(*models)


def test_scaled_gradients_are_clipped_after_they_are_unscaled() -> None:
    with job(workers=2) as servers:

        def loop(rank: int) -> tuple[list[float], nn.Module]:
            model, norms, scaler = made(), [], torch.amp.GradScaler("cpu", init_scale=2.0**10)
            with served(model, servers, rank=rank) as optimizer:
                for step in range(STEPS):
                    inputs, labels = batch(step, rank, SIZE)
                    optimizer.zero_grad()
                    scaler.scale(nn.functional.cross_entropy(model(inputs), labels)).backward()  # type: ignore[no-untyped-call]
                    scaler.unscale_(optimizer)
                    norms.append(clip(optimizer, model))
                    scaler.step(optimizer)
                    scaler.update()
            return norms, model

        found = at_once(lambda: loop(0), lambda: loop(1))
    reference, expected = one_process(2)
    for norms, model in found:
        assert norms == pytest.approx(expected, rel=1e-6)
        assert_close(model, reference)


def test_accumulated_passes_are_clipped_as_their_mean_in_the_last_one() -> None:
    with job(workers=2) as servers:

        def loop(rank: int) -> tuple[list[float], nn.Module]:
            model, norms = made(), []
            with served(model, servers, rank=rank, accumulate=2) as optimizer:
                for step in range(STEPS):
                    for part in (0, 1):
                        inputs, labels = (each[part::2] for each in batch(step, rank, SIZE))
                        optimizer.zero_grad()
                        nn.functional.cross_entropy(model(inputs), labels).backward()  # type: ignore[no-untyped-call]
                        norm = clip(optimizer, model)
                        optimizer.step()
                    norms.append(norm)
            return norms, model

        found = at_once(lambda: loop(0), lambda: loop(1))
    reference, expected = one_process(2)
    for norms, model in found:
        assert norms == pytest.approx(expected, rel=1e-6)
        assert_close(model, reference)


def test_loop_that_clips_each_workers_own_gradient_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    with job(workers=2) as servers:

        def loop(rank: int) -> None:
            model = made()
            with served(model, servers, rank=rank) as optimizer:
                for step in range(STEPS):
                    optimizer.zero_grad()
                    backward(model, step, rank, SIZE)
                    nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM / 5)
                    optimizer.step()

        with caplog.at_level(logging.WARNING):
            at_once(lambda: loop(0), lambda: loop(1))
    told = [message.split(" are ")[0] for message in caplog.messages if "write optimizer.clip_grad_norm_" in message]
    assert sorted(told) == ["the gradients of worker w0", "the gradients of worker w1"]


def test_norm_type_that_is_none_is_refused_before_anybody_waits() -> None:
    with job() as servers, served(made(), servers) as optimizer, pytest.raises(torch_ps.ConfigError, match="> 0"):
        optimizer.clip_grad_norm_(1.0, 0.0)


def test_gradients_that_were_applied_during_backward_are_not_clipped_any_more() -> None:
    model = made()
    with job() as servers, served(model, servers, overlap="eager") as optimizer:
        backward(model, 0)
        optimizer.step()
        backward(model, 1)
        with pytest.raises(torch_ps.PsError, match="comes too late: overlap='eager' has pushed"):
            optimizer.clip_grad_norm_(1.0)
        optimizer.step()


def test_gradients_that_were_sent_ahead_are_measured_where_they_are() -> None:
    """Nothing is sent twice where the norm is small: neither for the norm nor for the push."""
    with job(workers=2) as servers:

        def loop(rank: int) -> tuple[int, int]:
            model = made()
            with served(model, servers, rank=rank, plane="network", overlap="on") as optimizer:
                backward(model, 0, rank)
                clip(optimizer, model, 1e6)
                optimizer.step()
                return optimizer.session.pushed_bytes, 4 * sum(each.numel() for each in model.parameters())

        for sent, size in at_once(lambda: loop(0), lambda: loop(1)):
            assert sent == size
