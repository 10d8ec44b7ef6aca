"""A lead that is gone when another shard has asked it for the norm of an update: no bit differs."""

import signal
import threading
from typing import Any

import pytest
from torch import nn

import torch_ps
from tests.checkpoint.test_resume import adamw
from tests.failover.test_failover import FAULT, STEPS
from tests.support.jobs import SECONDS, until
from tests.support.replicated import Replicated, replicated
from tests.support.restart import shards
from tests.support.threads import at_once
from tests.support.training import backward, mlp, same, seeded

LEASE = 2.0
SETTINGS: dict[str, Any] = {"workers": 2, "bucket_size": 0.002, "clip_norm": 0.05}


class Middle:
    """Between the steps ``FAULT - 1`` and ``FAULT``: the lead stops, so that it answers nothing of the second."""

    def __init__(self, servers: Replicated) -> None:
        self._servers = servers
        self._pushed: list[int] = []
        self.stopped = threading.Event()
        self.reach = threading.Barrier(2, self._stop, SECONDS).wait

    def _stop(self) -> None:
        self._servers.wait()
        self._pushed = self._bytes()
        self._servers.primaries[0].process.send(signal.SIGSTOP)
        self.stopped.set()

    def _bytes(self) -> list[int]:
        """That workers have pushed to shard 1."""
        return [worker.bytes_pushed for worker in self._servers.status(self._servers.primaries[1]).worker]

    def asked(self) -> bool:
        """Whether shard 1 has all of the step, so that nothing but the norm is missing."""
        return [FAULT * each for each in self._bytes()] == [(FAULT + 1) * each for each in self._pushed]


def train(servers: str, model: nn.Module, rank: int, middle: Middle | None = None) -> None:
    with torch_ps.ParameterServerOptimizer(adamw(model), model, servers, name=f"w{rank}") as optimizer:
        while optimizer.version < STEPS:
            if middle is not None and optimizer.version == FAULT:
                middle.reach()
            backward(model, optimizer.version, rank)
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_lead_that_is_gone_in_the_middle_of_a_norm_exchange_changes_no_bit(number: signal.Signals) -> None:
    with shards(2, **SETTINGS) as alone:
        whole = [seeded(mlp) for _ in range(2)]
        at_once(*(lambda r=r, m=m: train(str(alone), m, r) for r, m in enumerate(whole)))
    with replicated(2, lease=LEASE, **SETTINGS) as servers:
        middle, models = Middle(servers), [seeded(mlp) for _ in range(2)]
        lead, other = servers.primaries

        def fault() -> None:
            assert middle.stopped.wait(SECONDS)
            until(middle.asked, "shard 1 has asked for the norm")
            assert servers.status(other).version == FAULT + 1
            lead.process.send(number)

        at_once(*(lambda r=r, m=m: train(str(servers), m, r, middle) for r, m in enumerate(models)), fault)
        lead.process.send(signal.SIGCONT)
        assert lead.process.wait(SECONDS) in (-signal.SIGKILL, 1)
        assert servers.status(servers.standbys[0]).version == servers.status(other).version == STEPS
    assert all(same(model, whole[0]) for model in models)
