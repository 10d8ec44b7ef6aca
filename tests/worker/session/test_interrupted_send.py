"""Ctrl-C while a step sends its buckets: what is sent is answered at once, and the next step goes on."""

import linecache
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch

import torch_ps
from tests.support.jobs import job
from tests.support.threads import spawn
from torch_ps.worker.optim.weight_writes import WeightWrites

#: Seconds of the longest wait; a step that waits for an answer that never comes takes all of them.
TIMEOUT = 20.0
#: Where the methods are that send, by the end of the file's name.
SENDING = {"shard_streams.py": ("send", "_send"), "socket_stream.py": ("send",), "grpc_stream.py": ("send",)}


def interrupt_at_line(number: int, call: Callable[[], object]) -> bool:
    """Call ``call`` and raise KeyboardInterrupt in it before line ``number`` of those that send; returns if it was.

    Lines that begin a ``with`` are left out: they come again at its end, where Python takes no signal.
    """
    left = number

    def line(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal left
        text = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
        if event == "line" and left >= 0 and not text.startswith("with "):
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
        return line

    def enter(frame: FrameType, event: str, arg: Any) -> Any:
        code = frame.f_code
        return line if code.co_name in SENDING.get(code.co_filename.rpartition("/")[2], ()) else None

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


@pytest.mark.parametrize("plane", ["memory", "network", "grpc"])
def test_interrupt_at_any_line_that_sends_keeps_no_step_waiting(plane: str) -> None:
    net = torch.nn.Linear(64, 64)
    for parameter in net.parameters():
        torch.nn.init.zeros_(parameter)
    with job() as servers:
        optimizer = torch_ps.ParameterServerOptimizer(
            torch.optim.SGD(net.parameters(), lr=1.0), net, str(servers), name="w0", timeout=TIMEOUT, plane=plane
        )

        def step() -> None:
            for parameter in net.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()

        step()
        number, since = 0, time.monotonic()
        while interrupt_at_line(number, step):
            number += 1
        assert number > 10
        assert time.monotonic() - since < TIMEOUT  # so that no step has waited for its deadline
        step()
        for parameter in net.parameters():  # pushes of ones that count whole, whichever did
            assert torch.equal(parameter.detach(), torch.full_like(parameter, parameter.flatten()[0].item()))
        optimizer.close()


def test_interrupt_before_anything_is_sent_does_not_wait_for_what_an_earlier_step_has_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with job(workers=2) as servers:

        def wrapped(name: str) -> torch_ps.ParameterServerOptimizer:
            net = torch.nn.Linear(3, 2)
            for parameter in net.parameters():
                parameter.grad = torch.ones_like(parameter)
            inner = torch.optim.SGD(net.parameters(), lr=1.0)
            return torch_ps.ParameterServerOptimizer(inner, net, str(servers), name=name, timeout=0.3)

        joining = spawn(lambda: wrapped("w1"))
        optimizer = wrapped("w0")
        other = joining.result(TIMEOUT)
        with pytest.raises(torch_ps.WaitTimeout):
            optimizer.step()

        def interrupted(writes: WeightWrites) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(WeightWrites, "find", interrupted)
            with pytest.raises(KeyboardInterrupt):
                optimizer.step()
        for each in (optimizer, other):
            each.close()
