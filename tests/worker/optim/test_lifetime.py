"""An optimizer or client that is closed or dropped gives back threads, files and memory, and leaves the job."""

import copy
import gc
import os
import pickle
import threading
import weakref
from collections.abc import Callable

import pytest
import torch

import torch_ps
from tests.support.jobs import Servers, job, until
from tests.support.threads import at_once
from tests.support.training import backward, mlp, same, seeded


def made(servers: Servers, **options: object) -> torch_ps.ParameterServerOptimizer:
    model = seeded(mlp)
    adam = torch.optim.Adam(model.parameters())
    optimizer = torch_ps.ParameterServerOptimizer(adam, model, str(servers), **options)  # type: ignore[arg-type]
    for step in range(2):
        optimizer.zero_grad(set_to_none=False)
        backward(model, step)
        optimizer.step()
    return optimizer


def used() -> tuple[int, int]:
    return len(os.listdir("/proc/self/fd")), threading.active_count()


@pytest.mark.parametrize(
    "options",
    [{}, {"plane": "network"}, {"overlap": "forward"}, {"overlap": "eager"}, {"local_steps": 2}],
    ids=lambda options: "-".join(map(str, options.values())) or "auto",
)
def test_who_drops_the_last_reference_gets_everything_back_at_once(options: dict[str, object]) -> None:
    """Without the cycle collector, whether the optimizer was closed before or not."""
    with job(mode="async", lease=300) as servers:
        made(servers, **options).close()  # what the process keeps is there from then on
        gc.collect()
        before = used()
        gc.disable()
        try:
            for close in (True, False, False):
                optimizer = made(servers, **options)
                parameter = weakref.ref(optimizer.param_groups[0]["params"][0])
                optimizer.step()
                if close:
                    optimizer.close()
                gone = weakref.ref(optimizer)
                del optimizer
                assert gone() is None
                assert parameter() is None
                until(lambda: used() <= before, "threads and files are given back")
        finally:
            gc.enable()
        assert list(servers.status().worker) == []  # long before their leases end


def test_one_that_is_dropped_in_a_circle_leaves_when_it_is_collected() -> None:
    with job(lease=300) as servers:
        optimizer = made(servers)
        optimizer.itself = optimizer  # type: ignore[attr-defined]
        del optimizer
        at_once(gc.collect)  # on another thread, as the collector may run on any
        until(lambda: not servers.status().worker, "the worker has left")


def test_a_dropped_client_leaves() -> None:
    with job(lease=300) as servers:
        before = used()
        client = torch_ps.Client(str(servers))
        client.init({"x": torch.ones(1)}, torch_ps.OptimizerSpec("SGD", lr=0.1))
        client.push({"x": torch.ones(1)})
        del client
        assert list(servers.status().worker) == []
        until(lambda: used() <= before, "threads and files are given back")


def test_a_closed_optimizer_says_so_and_the_model_stays() -> None:
    with job() as servers:
        optimizer = made(servers, name="w0")
        version = optimizer.version
        optimizer.close()
        assert optimizer.version == version
        for call in (optimizer.step, lambda: optimizer.workers):
            with pytest.raises(torch_ps.PsError, match="worker 'w0' has left the job, as it was closed"):
                call()


@pytest.mark.parametrize("again", [False, True])
def test_a_cell_that_is_run_again_takes_the_place_of_the_former_optimizer(
    again: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """With the same model, or with a new one in the place of it."""
    with job(lease=300) as servers:
        model = seeded(mlp)
        former = torch_ps.ParameterServerOptimizer(torch.optim.SGD(model.parameters()), model, str(servers))
        backward(model, 0)
        former.step()
        if not again:
            model = seeded(mlp, 2)
        optimizer = torch_ps.ParameterServerOptimizer(torch.optim.SGD(model.parameters()), model, str(servers))
        backward(model, 1)
        optimizer.step()
        assert optimizer.workers == (optimizer.name,)
        assert f"worker {former.name} of the job at {servers} is closed, as this process makes another" in caplog.text
        with pytest.raises(torch_ps.PsError, match=f"worker '{former.name}' has left the job"):
            former.step()
        optimizer.close()


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, pickle.dumps], ids=lambda how: how.__name__)
def test_a_copy_is_refused_in_words(how: Callable[[object], object]) -> None:
    with job() as servers, torch_ps.Client(str(servers), name="c") as client:
        optimizer = made(servers, name="w0")
        with pytest.raises(
            torch_ps.PsError, match="worker 'w0' takes part in a job, so it cannot be copied or pickled"
        ):
            how(optimizer)
        with pytest.raises(torch_ps.PsError, match="worker 'c' takes part"):
            how(client)
        optimizer.close()


def test_a_model_is_copied_and_saved_with_overlap_forward_and_the_copy_waits_for_nobody() -> None:
    with job() as servers:
        model = seeded(mlp)
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        with torch_ps.ParameterServerOptimizer(sgd, model, str(servers), overlap="forward") as optimizer:
            backward(model, 0)
            optimizer.step()
            optimizer.zero_grad()
            copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
            for each in copies:
                assert same(each, model)
            backward(model, 1)
            optimizer.step()
        for each in copies:
            backward(each, 1)
            torch.optim.SGD(each.parameters(), lr=0.1).step()
            assert same(each, model)
