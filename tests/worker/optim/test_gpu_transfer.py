"""A model on a GPU trains as one on the CPU does: what lies between it and the session changes no bit and no error.

Where torch finds no GPU the CPU stands in for it: see ``tests.support.gpu``.
"""

import contextlib
import functools
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import torch_ps
from tests.support.gpu import GPU, names_of_threads, sleep
from tests.support.jobs import Servers, job
from tests.support.threads import spawn
from tests.support.training import Make, backward, batch, conv, mlp, same, seeded
from torch_ps.common.devices import StreamEvent
from torch_ps.worker.optim import optimizer as optimizers
from torch_ps.worker.optim.gpu_transfer import UP_SLOTS, GpuTransfer, attach_transfer

STEPS = 8
SECONDS = 30.0


@pytest.fixture
def cpu_for_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models on the CPU are treated as on a GPU."""
    monkeypatch.setattr(optimizers, "choose_pusher", functools.partial(attach_transfer, device=torch.device("cpu")))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)


def wide() -> nn.Module:
    """Has more buckets than there are slots."""
    return nn.Sequential(nn.Linear(12, 100), nn.Tanh(), nn.Linear(100, 7))


@contextlib.contextmanager
def served(
    model: nn.Module, servers: Servers | None = None, **options: Any
) -> Iterator[torch_ps.ParameterServerOptimizer]:
    """On a job of its own with several buckets unless ``servers`` are given."""
    with contextlib.ExitStack() as stack:
        if servers is None:
            servers = stack.enter_context(job(bucket_size=0.001, shards=2))
        yield stack.enter_context(torch_ps.ParameterServerOptimizer(sgd(model), model, str(servers), **options))


def trained(make: Make, **options: Any) -> nn.Module:
    model = seeded(make)
    with served(model, name="w0", **options) as optimizer:
        loop(model, optimizer)
    return model


def loop(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for step in range(STEPS):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()


# -------------------------------------------------------------- bits


@pytest.mark.parametrize("plane", ["memory", "network"])
@pytest.mark.parametrize("overlap", ["on", "off"])
@pytest.mark.parametrize("make", [mlp, conv])
@pytest.mark.usefixtures("cpu_for_gpu")
def test_one_worker_has_the_bits_of_local_training(make: Make, overlap: str, plane: str) -> None:
    local = seeded(make)
    loop(local, sgd(local))
    assert same(trained(make, overlap=overlap, plane=plane), local)


@pytest.mark.parametrize(
    "options",
    [
        {"compress": "fp16", "compress_pull": "bf16"},
        {"compress": "bf16", "compress_pull": "fp16", "plane": "network"},
        {"compress": "fp16", "feedback": "on"},
        {"compress": "int8", "compress_pull": "int8"},
        {"compress": "topk:0.1"},
        {"compress": "topk:0.1", "momentum_correction": "off", "compress_warmup": 3},
        {"accumulate": 2},
        {"local_steps": 3},
        {"local_steps": 2, "compress": "fp16"},
    ],
    ids=lambda options: " ".join(f"{key}={value}" for key, value in options.items()),
)
def test_no_option_gives_other_bits_than_without_a_gpu(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    plain = trained(conv, **options)
    request.getfixturevalue("cpu_for_gpu")
    assert same(trained(conv, **options), plain)


def test_a_model_on_the_cpu_talks_to_the_session_itself() -> None:
    before_, model = names_of_threads(), seeded(mlp)
    with served(model) as optimizer:
        loop(model, optimizer)
        assert optimizer._pusher is optimizer._session
        assert "send" not in names_of_threads() - before_


# -------------------------------------------------------------- order and errors


class Gate:
    """Marks of the up side that are not reached until ``open``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._open = threading.Event()
        self.waiting = threading.Semaphore(0)  # one up for every wait that has begun
        monkeypatch.setattr(StreamEvent, "wait", lambda event: self._wait())

    def _wait(self) -> None:
        if threading.current_thread().name.startswith("send"):
            self.waiting.release()
            assert self._open.wait(SECONDS)

    def open(self) -> None:
        self._open.set()


@pytest.mark.usefixtures("cpu_for_gpu")
def test_backward_does_not_wait_for_copies_while_slots_are_free(monkeypatch: pytest.MonkeyPatch) -> None:
    model = seeded(lambda: nn.Linear(12, 7))
    with served(model, overlap="on", plane="network") as optimizer:
        assert len(optimizer._session.plan.buckets) <= UP_SLOTS
        sent, gate = optimizer.pushed_bytes, Gate(monkeypatch)
        backward(model, 0)
        assert gate.waiting.acquire(timeout=SECONDS)
        assert optimizer.pushed_bytes == sent
        gate.open()
        optimizer.step()
        assert optimizer.pushed_bytes == sent + 4 * (12 * 7 + 7)


@pytest.mark.usefixtures("cpu_for_gpu")
def test_a_slot_is_not_filled_again_before_it_was_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    local, model = seeded(wide), seeded(wide)
    loop(local, sgd(local))
    with served(model, overlap="on") as optimizer:
        assert len(optimizer._session.plan.buckets) > UP_SLOTS
        gate = Gate(monkeypatch)
        training = spawn(lambda: loop(model, optimizer))
        assert gate.waiting.acquire(timeout=SECONDS)
        assert not training.done()
        gate.open()
        training.result(SECONDS)
    assert same(model, local)


@pytest.mark.usefixtures("cpu_for_gpu")
def test_a_gpu_that_does_not_come_to_an_end_is_named_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model = seeded(mlp)
    with served(model, timeout=0.2) as optimizer:
        gate = Gate(monkeypatch)
        with pytest.raises(torch_ps.WaitTimeout, match="buckets to leave cpu, which computes for longer or hangs"):
            loop(model, optimizer)
        gate.open()


@pytest.mark.parametrize("overlap", ["on", "off"])
@pytest.mark.usefixtures("cpu_for_gpu")
def test_what_fails_while_sending_is_raised_by_step(overlap: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = seeded(mlp)
    with served(model, overlap=overlap) as optimizer:
        push = optimizer._session.push

        def broken(bucket: Any, *arguments: Any, **facts: Any) -> None:
            if bucket.index == 1:
                raise torch_ps.PsError("the wire is cut")
            push(bucket, *arguments, **facts)

        monkeypatch.setattr(optimizer._session, "push", broken)
        backward(model, 0)
        with pytest.raises(torch_ps.PsError, match="the wire is cut"):
            optimizer.step()


@pytest.mark.usefixtures("cpu_for_gpu")
def test_step_after_one_that_failed_pushes_again() -> None:
    model = seeded(mlp)
    with job(workers=2) as servers, served(model, servers, timeout=0.2) as optimizer:
        for _ in range(2):  # the other worker never comes
            backward(model, 0)
            with pytest.raises(torch_ps.WaitTimeout, match="step 0"):
                optimizer.step()


@pytest.mark.usefixtures("cpu_for_gpu")
def test_gradient_that_changes_after_it_has_left_is_sent_again() -> None:
    def clipping(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for step in range(3):
            backward(model, step)
            nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
            optimizer.step()
            optimizer.zero_grad()

    local, model = seeded(mlp), seeded(mlp)
    clipping(local, sgd(local))
    with served(model, overlap="on", plane="network") as optimizer:
        clipping(model, optimizer)
    assert same(model, local)


@pytest.mark.usefixtures("cpu_for_gpu")
def test_gradients_are_held_until_they_were_read(monkeypatch: pytest.MonkeyPatch) -> None:
    model = seeded(mlp)
    with served(model, overlap="on") as optimizer:
        pusher = optimizer._pusher
        assert isinstance(pusher, GpuTransfer)
        held: list[list[torch.Tensor]] = []
        hand_over = pusher._hand_over

        def look(bucket: Any, slot: Any, codec: Any, size: int, read: list[torch.Tensor], *rest: Any) -> None:
            held.append(list(read))
            hand_over(bucket, slot, codec, size, read, *rest)
            assert not read

        monkeypatch.setattr(pusher, "_hand_over", look)
        backward(model, 0)
        gradients = {id(parameter.grad) for parameter in model.parameters()}
        optimizer.step()
        assert {id(gradient) for read in held for gradient in read} == gradients


# -------------------------------------------------------------- on a GPU


def on_gpu(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = STEPS) -> None:
    for step in range(steps):
        inputs, labels = (each.cuda(non_blocking=True) for each in batch(step))
        nn.functional.cross_entropy(model(inputs), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()


@GPU
@pytest.mark.parametrize("plane", ["memory", "network"])
@pytest.mark.parametrize("overlap", ["on", "off"])
@pytest.mark.parametrize("make", [mlp, conv])
def test_a_model_on_a_gpu_trains_as_without_the_server(make: Make, overlap: str, plane: str) -> None:
    local, remote = seeded(make).cuda(), seeded(make).cuda()
    on_gpu(local, sgd(local))
    with served(remote, overlap=overlap, plane=plane) as optimizer:
        assert isinstance(optimizer._pusher, GpuTransfer)
        on_gpu(remote, optimizer)
    for a, b in zip(local.parameters(), remote.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@GPU
@pytest.mark.parametrize("compress", ["none", "fp16", "int8"])
def test_a_step_waits_for_nothing_but_its_own_buckets(compress: str) -> None:
    model = seeded(mlp).cuda()
    batches = [tuple(each.cuda() for each in batch(step)) for step in range(4)]
    with served(model, overlap="on", compress=compress) as optimizer, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls the next line a prototype
        torch.cuda.set_sync_debug_mode("error")
        try:
            for inputs, labels in batches:
                nn.functional.cross_entropy(model(inputs), labels).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                optimizer.zero_grad()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@GPU
def test_parameters_are_in_place_for_the_next_forward_whatever_the_gpu_is_busy_with() -> None:
    local, remote = seeded(mlp).cuda(), seeded(mlp).cuda()
    on_gpu(local, sgd(local))
    with served(remote, overlap="on") as optimizer:
        for step in range(STEPS):
            inputs, labels = (each.cuda() for each in batch(step))
            loss = nn.functional.cross_entropy(remote(inputs), labels)
            sleep()  # backward's kernels are queued long before they run
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
    for a, b in zip(local.parameters(), remote.parameters(), strict=True):
        torch.testing.assert_close(a, b)
