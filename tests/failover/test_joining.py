"""A worker is just joining when the primary dies, stands still or is told to end: it joins where the standby serves."""

import logging
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

import torch_ps
from tests.support.jobs import SECONDS
from tests.support.replicated import Replicated, replicated
from tests.support.threads import spawn
from torch_ps.worker.transport.link import Link

LEASE = 1.5


class Fault:
    """What happens to the primary when the newcomer is about to make one of its calls, once."""

    def __init__(self, patch: pytest.MonkeyPatch, call: str, happens: Callable[[], None]) -> None:
        self._happens, self._newcomer, self._original = happens, "", getattr(Link, call)
        patch.setattr(Link, call, lambda link, request, seconds: self._called(link, request, seconds))

    def wait_for(self, newcomer: str) -> None:
        self._newcomer = newcomer

    def _called(self, link: Link, request: Any, seconds: float) -> Any:
        if request.worker == self._newcomer:
            self._newcomer = ""
            self._happens()
        return self._original(link, request, seconds)


def push_until(stop: threading.Event, client: torch_ps.Client) -> None:
    while not stop.is_set():
        client.push({"x": torch.ones(8)})


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM], ids=lambda number: number.name)
@pytest.mark.parametrize("call", ["join", "share"])
def test_newcomer_joins_where_the_standby_serves(
    call: str, number: signal.Signals, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "torch_ps.worker")
    with replicated(workers=1, mode="async", lease=LEASE) as servers:
        fault = Fault(monkeypatch, call, lambda: servers.primaries[0].process.send(number))
        with torch_ps.Client(str(servers), name="w0") as client:
            client.init({"x": torch.zeros(8)}, torch_ps.OptimizerSpec("SGD", lr=1.0))
            servers.wait()
            stop = threading.Event()
            others = spawn(lambda: push_until(stop, client))
            fault.wait_for("w1")
            # Ten minutes: what the call itself would wait for.
            with torch_ps.Client(str(servers), name="w1", timeout=600.0) as newcomer:
                joined = spawn(lambda: newcomer.init({"x": torch.zeros(8)}, torch_ps.OptimizerSpec("SGD", lr=1.0)))
                joined.result(SECONDS)
                if number == signal.SIGSTOP:  # by its silence for a lease, not when gRPC finds out
                    assert "trying again: no sign of life of" in caplog.text
                stop.set()
                others.result(SECONDS)
                newcomer.push({"x": torch.ones(8)})
                assert both_take_part(servers)
                steps = newcomer.pull().version
                assert torch.equal(newcomer.pull().params["x"], torch.full((8,), -float(steps)))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=lambda number: number.name)
def test_who_waits_for_the_first_quorum_waits_on_where_the_standby_serves(number: signal.Signals) -> None:
    with (
        replicated(workers=2, mode="async", lease=LEASE) as servers,
        torch_ps.Client(str(servers), name="w0", timeout=600.0) as first,
    ):
        first.init({"x": torch.zeros(8)}, torch_ps.OptimizerSpec("SGD", lr=1.0))
        servers.wait()
        waits = spawn(lambda: first.workers)
        servers.primaries[0].process.send(number)
        both = f"{servers.primaries[0].address}|{servers.standbys[0].address}"
        with torch_ps.Client(both, name="w1") as second:
            second.init({"x": torch.zeros(8)}, torch_ps.OptimizerSpec("SGD", lr=1.0))
            assert waits.result(SECONDS) == ("w0", "w1")


def both_take_part(servers: Replicated) -> bool:
    status = servers.status(servers.standbys[0])
    return status.standby.role == "alone" and {each.worker for each in status.worker} == {"w0", "w1"}
