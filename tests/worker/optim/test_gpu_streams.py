"""What the streams of a worker's GPU are made to wait for, on an account of them: no test of bits shows it on a CPU."""

import functools
from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch
from torch import nn

import torch_ps
from tests.support.clocks import Device, Stream, Work, World
from tests.support.jobs import job
from tests.support.training import backward, seeded
from torch_ps.common.devices import PinnedBuffer
from torch_ps.common.plan import Bucket
from torch_ps.worker.gradients.flat_tensors import FlatTensors
from torch_ps.worker.gradients.gradients import Gradients
from torch_ps.worker.optim import optimizer as optimizers
from torch_ps.worker.optim.gpu_transfer import attach_transfer
from torch_ps.worker.session.session import Session

STEPS = 5


class Account:
    """Notes the work of a training loop, and looks at each place whether what has to come before does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.world = World(monkeypatch)
        self.wrong: list[str] = []
        self.seen = {"gather": 0, "push": 0, "write": 0}
        self._gradients: dict[int, Work] = {}  # by parameter: what computed it
        self._copies: dict[int, Work] = {}  # by address of a slot on the GPU, and of one of the host
        self._written: list[Work] = []
        self._patch(monkeypatch, Gradients, "gather", self._gather)
        self._patch(monkeypatch, PinnedBuffer, "take", self._take)
        self._patch(monkeypatch, Session, "push", self._push)
        self._patch(monkeypatch, FlatTensors, "write", self._write)

    def _patch(self, monkeypatch: pytest.MonkeyPatch, owner: type, name: str, look: Any) -> None:
        original = getattr(owner, name)

        def patched(this: Any, *arguments: Any, **more: Any) -> Any:
            look(this, *arguments)
            return original(this, *arguments, **more)

        monkeypatch.setattr(owner, name, patched)

    def computed(self, parameter: torch.Tensor) -> None:
        self._gradients[id(parameter)] = self.world.current().work()

    def check(self, what: str, right: bool) -> None:
        if not right:
            self.wrong.append(what)

    def _gather(self, gradients: Gradients, bucket: Bucket, into: torch.Tensor) -> None:
        self.seen["gather"] += 1
        side, sources = self.world.current(), {id(gradients.parameters[p.tensor]) for p in bucket.pieces}
        self.check("a gradient is packed on a side", side is not self.world.compute)
        self.check("it is computed first", all(side.knows(self._gradients[source]) for source in sources))
        earlier = self._copies.get(into.data_ptr())
        self.check("its slot has been sent", earlier is None or self.world.is_done(earlier))
        self._copies[into.data_ptr()] = side.work()

    def _take(self, pinned: PinnedBuffer, parts: Any) -> None:
        self._copies[pinned.bytes.data_ptr()] = self.world.current().work()

    def _push(self, session: Session, bucket: Bucket, values: torch.Tensor) -> None:
        self.seen["push"] += 1
        self.check("a payload has arrived when it is sent", self.world.is_done(self._copies[values.data_ptr()]))

    def _write(self, flat: FlatTensors, bucket: Bucket, values: torch.Tensor) -> None:
        self.seen["write"] += 1
        side = self.world.current()
        self.check("parameters are written on a side", side is not self.world.compute)
        earlier = self._copies.get(values.data_ptr())
        self.check("the slot before has been written", earlier is None or self.world.is_done(earlier))
        self._copies[values.data_ptr()] = side.work()
        self._written.append(self._copies[values.data_ptr()])

    def step_is_done(self) -> None:
        self.check("what is computed next waits", all(self.world.compute.knows(work) for work in self._written))
        self._written.clear()


@pytest.fixture
def account(monkeypatch: pytest.MonkeyPatch) -> Iterator[Account]:
    account = Account(monkeypatch)
    monkeypatch.setattr(
        optimizers, "choose_pusher", functools.partial(attach_transfer, device=cast(torch.device, Device()))
    )
    yield account
    assert account.wrong == []


@pytest.mark.parametrize("compress", ["none", "fp16", "int8"])
@pytest.mark.parametrize("plane", ["memory", "network"])
@pytest.mark.parametrize("overlap", ["on", "off"])
def test_everything_waits_for_what_it_needs(account: Account, overlap: str, plane: str, compress: str) -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(12, 100), nn.Tanh(), nn.Linear(100, 7)))
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(account.computed)  # type: ignore[no-untyped-call]
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        job(bucket_size=0.001, shards=2) as servers,
        torch_ps.ParameterServerOptimizer(
            sgd, model, str(servers), overlap=overlap, plane=plane, compress=compress
        ) as optimizer,
    ):
        account.step_is_done()
        for step in range(STEPS):
            backward(model, step)
            optimizer.step()
            account.step_is_done()
            optimizer.zero_grad()
        buckets = len(optimizer._session.plan.buckets)
    assert buckets > 6  # each slot is used again and again
    gathered = 2 if (overlap, plane) == ("on", "network") else 1  # sent ahead, and compared at the step
    assert account.seen == {
        "gather": gathered * buckets * STEPS,
        "push": buckets * STEPS,
        "write": buckets * (STEPS + 1),
    }


def test_gradients_of_a_bucket_may_come_from_several_streams(account: Account) -> None:
    """As in a model whose parts run on streams of their own."""
    model, streams = seeded(lambda: nn.Linear(12, 7)), [Stream(account.world), Stream(account.world)]
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)

    def computed(parameter: torch.Tensor) -> None:
        stream = streams.pop()
        account.world._local.stream = stream  # until the next one
        account.computed(parameter)

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(computed)  # type: ignore[no-untyped-call]
    with job() as servers, torch_ps.ParameterServerOptimizer(sgd, model, str(servers), overlap="on") as optimizer:
        backward(model, 0)
        account.world._local.stream = account.world.compute
        optimizer.step()
    assert not streams
    assert account.seen["push"] == 1
