"""The thread that waits reads small answers itself, and what interrupts it there costs no push."""

import threading
from collections.abc import Callable, Iterator

import pytest
import torch

import torch_ps
from tests.support.jobs import job, until
from torch_ps.common.plan import Bucket

ONES = {"x": torch.ones(8)}


@pytest.fixture(params=["memory", "network"])
def client(request: pytest.FixtureRequest) -> Iterator[torch_ps.Client]:
    """A worker alone in its job; a push subtracts the gradient."""
    with job() as servers, torch_ps.Client(str(servers), name="w0", plane=request.param) as client:
        client.init({"x": torch.zeros(8)}, torch_ps.OptimizerSpec("SGD", lr=1.0))
        yield client


def on_values_here(client: torch_ps.Client, call: Callable[[], object]) -> None:
    """Have ``call`` called before values are taken on this thread."""
    take, here = client._session.on_values, threading.current_thread()

    def first(bucket: Bucket, values: torch.Tensor) -> None:
        if threading.current_thread() is here:
            call()
        take(bucket, values)

    client._session.on_values = first


def test_thread_that_waits_reads_the_answer_after_the_reader_thread_has_read_one(client: torch_ps.Client) -> None:
    read: list[None] = []
    on_values_here(client, lambda: read.append(None))
    until(lambda: client.push(ONES).applied and bool(read), "this thread has read an answer")
    snapshot = client.pull()
    assert torch.equal(snapshot.params["x"], torch.full((8,), -float(snapshot.version)))


def test_interrupt_while_an_answer_is_taken_loses_no_push_and_repeats_none(client: torch_ps.Client) -> None:
    pushed: list[None] = []

    def interrupt() -> None:
        raise KeyboardInterrupt

    def push() -> bool:
        pushed.append(None)
        return client.push(ONES).applied and False

    take = client._session.on_values
    on_values_here(client, interrupt)
    with pytest.raises(KeyboardInterrupt):
        until(push, "this thread is interrupted")
    client._session.on_values = take
    assert client.pull().version == len(pushed)
    assert torch.equal(client.push(ONES).params["x"], torch.full((8,), -1.0 - len(pushed)))
