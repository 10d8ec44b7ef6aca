"""A forked child is nobody's worker: it keeps the model of the moment of the fork, and its parent trains on."""

import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

import torch_ps
from tests.support.jobs import job, until
from tests.support.threads import spawn
from tests.support.training import backward, mlp, same, seeded


class Child:
    """A process that was forked from this one; ``result`` is what ``function`` returned in it."""

    def __init__(self, function: Callable[[], Any]) -> None:
        read, write = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            try:
                os.write(write, pickle.dumps(function()))
            except Exception as error:  # noqa: BLE001 - told to the parent
                os.write(write, pickle.dumps(repr(error)))
            finally:
                os._exit(0)
        os.close(write)
        self._read = read

    @property
    def result(self) -> Any:
        with open(self._read, "rb") as answer:
            found = answer.read()
        os.waitpid(self.pid, 0)
        return pickle.loads(found)


def error_of(function: Callable[[], Any]) -> str:
    try:
        return f"no error but {function()}"
    except torch_ps.PsError as error:
        return str(error)


def sgd(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


@pytest.mark.parametrize(("plane", "overlap"), [("auto", "auto"), ("auto", "forward"), ("network", "auto")])
def test_child_has_the_model_of_the_fork_and_its_parent_trains_on_as_if_there_were_none(
    plane: str, overlap: str
) -> None:
    model, plain = seeded(mlp), seeded(mlp)
    reference = sgd(plain)
    with (
        job() as servers,
        torch_ps.ParameterServerOptimizer(
            sgd(model), model, str(servers), name="w0", plane=plane, overlap=overlap
        ) as optimizer,
    ):

        def step(number: int) -> None:
            for each, one in ((model, optimizer), (plain, reference)):
                one.zero_grad(set_to_none=False)  # so that gradients, too, live in memory that is shared
                backward(each, number)
                one.step()

        for number in range(5):
            step(number)
        backward(model, 5)
        backward(plain, 5)
        go, told = os.pipe()

        def look() -> tuple[bool, bool, str, str]:
            os.read(go, 1)  # the parent has made three steps meanwhile
            gradients = zip(model.parameters(), plain.parameters(), strict=True)
            kept = same(model, plain), all(torch.equal(one.grad, other.grad) for one, other in gradients)  # type: ignore[arg-type]
            model.zero_grad(set_to_none=False)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.fill_(7.0)
            backward(model, 0)
            refused = error_of(optimizer.step), error_of(lambda: optimizer.workers)
            optimizer.close()
            assert optimizer.state_dict()["version"] == 5
            return *kept, *refused

        child = Child(look)
        optimizer.step()
        reference.step()
        for number in range(6, 8):
            step(number)
        os.write(told, b"x")
        *kept, stepped, asked = child.result
        assert kept == [True, True]
        assert stepped == asked
        assert stepped.startswith("this process was forked from that of worker 'w0', which alone takes part in the job")
        step(8)
        assert same(model, plain)
        assert [each.worker for each in servers.status().worker] == ["w0"]


def test_a_child_cannot_join_whether_the_optimizer_of_its_parent_is_closed_or_not() -> None:
    with job(mode="async") as servers:
        model = seeded(mlp)
        words = "forked from that of worker 'w0', so no connection works here"

        def join() -> str:
            with torch_ps.ParameterServerOptimizer(sgd(model), model, str(servers), name="child") as optimizer:
                return f"joined as {optimizer.workers}"

        with torch_ps.ParameterServerOptimizer(sgd(model), model, str(servers), name="w0"):
            assert words in Child(lambda: error_of(join)).result
        assert words in Child(lambda: error_of(join)).result


def test_memory_moves_out_once_for_many_children_and_back_at_the_next_step() -> None:
    model = seeded(mlp)
    with job() as servers, torch_ps.ParameterServerOptimizer(sgd(model), model, str(servers)) as optimizer:

        def where() -> list[int]:
            return [each.data_ptr() for each in model.parameters()]

        for number in range(2):
            backward(model, number)
            optimizer.step()
        shared = where()
        assert Child(lambda: "").result == ""
        own = where()
        assert own != shared
        assert Child(lambda: "").result == ""
        assert where() == own
        backward(model, 2)
        optimizer.step()
        assert where() == shared


def test_fork_by_another_thread_in_the_middle_of_a_step_neither_hangs_nor_disturbs_it() -> None:
    first, second = seeded(mlp), seeded(mlp)
    with (
        job(workers=2) as servers,
        torch_ps.ParameterServerOptimizer(sgd(first), first, str(servers), name="w0") as w0,
        torch_ps.ParameterServerOptimizer(sgd(second), second, str(servers), name="w1") as w1,
    ):
        backward(first, 0)
        stepping = spawn(w0.step)
        until(lambda: any(w.waiting_seconds > 0 for w in servers.status().worker), "w0 waits for w1")
        child = Child(lambda: (sum(each.sum().item() for each in first.parameters()), error_of(w0.step)))
        assert "forked from that of worker 'w0'" in child.result[1]
        backward(second, 1)
        w1.step()
        stepping.result(60)
        assert same(first, second)
        assert w0.version == 1


def _square(number: int) -> int:
    return number * number


def test_pools_and_loaders_work_as_before_and_sigterm_ends_a_child_at_once() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)  # whatever tests before this one have left
    model = seeded(mlp)
    try:
        with job() as servers, torch_ps.ParameterServerOptimizer(sgd(model), model, str(servers)) as optimizer:
            context = multiprocessing.get_context("fork")
            with context.Pool(2) as pool:
                assert pool.map(_square, range(4)) == [0, 1, 4, 9]
            data = torch.utils.data.TensorDataset(torch.arange(8))
            seen = [each for (part,) in torch_ps.shard(data, optimizer, batch_size=2, num_workers=2) for each in part]
            assert sorted(map(int, seen)) == list(range(8))
            sleeper = context.Process(target=threading.Event().wait)
            sleeper.start()
            sleeper.terminate()
            sleeper.join(10)
            assert sleeper.exitcode == -signal.SIGTERM
            backward(model, 0)
            optimizer.step()
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_child_of_a_client_is_no_client() -> None:
    with job(mode="async") as servers, torch_ps.Client(str(servers), name="w0") as client:
        client.init({"x": torch.ones(1)}, torch_ps.OptimizerSpec("SGD", lr=0.1))
        assert "forked from that of worker 'w0'" in Child(lambda: error_of(client.pull)).result
        assert client.push({"x": torch.ones(1)}).version == 1
