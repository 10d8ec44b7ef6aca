"""What the streams of a server's GPU are made to wait for, on an account of them: see ``tests.support.clocks``."""

from typing import cast

import pytest
import torch

from tests.support.clocks import Device, Work, World
from torch_ps.common.codecs.plain import Plain
from torch_ps.ps.engine.gpu_staging import Staging
from torch_ps.ps.engine.parameter_store import Store


class Noting(Plain):
    """fp32 as it is; notes its work on the stream of the caller."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.read: list[Work] = []
        self.written: list[Work] = []

    def from_bytes(self, payload: memoryview, raw: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
        if len(self.read) > 2:  # the last one is of this call
            assert self._world.is_done(self.read[-3]), "pinned memory is written while it is copied"
        return super().from_bytes(payload, raw, scratch)

    def to_bytes(self, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        self.written.append(self._world.current().work())
        return super().to_bytes(values)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


def test_pinned_memory_is_used_again_only_when_it_was_copied(world: World) -> None:
    staging, codec = Staging(cast(torch.device, Device()), 8), Noting(world)
    for step in range(6):
        payload = memoryview(bytearray(torch.full((8,), float(step)).numpy().tobytes()))
        with staging.side.running():
            codec.read.append(world.current().work())  # stands for the copy, which has a mark behind it
            found = staging.decode(codec, payload, torch.empty(8))
        assert found.tolist() == [step] * 8


def test_a_payload_has_arrived_when_it_is_returned(world: World) -> None:
    staging, codec = Staging(cast(torch.device, Device()), 8), Noting(world)
    with staging.side.running():
        staging.encode(codec, torch.ones(8))
        assert world.is_done(codec.written[-1])
        copied = world.current().work()
        staging.host(torch.ones(8))
        assert world.is_done(copied)


def test_a_run_ends_when_its_side_is_done(world: World) -> None:
    store = Store.__new__(Store)  # of no model; only where its work runs counts
    store.__dict__.update(_direct=False, device=Device(), _largest=8, _scratch=type("Local", (), {})())
    done: list[Work] = []

    def work() -> None:
        assert world.current() is not world.compute
        done.append(world.current().work())

    store.beside(work)()
    assert world.is_done(done[0])

    def fails() -> None:
        work()
        raise ValueError("of the work")

    with pytest.raises(ValueError, match="of the work"):
        store.beside(fails)()
    assert world.is_done(done[1])
