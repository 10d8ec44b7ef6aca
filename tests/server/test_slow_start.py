"""Servers that take long to start, as with a large checkpoint to read, are waited for, and ended without complaint."""

import signal
from collections.abc import Iterator

import pytest

from torch_ps.common import slow_start
from torch_ps.common.ending_signals import ending_signals
from torch_ps.common.options.server_config import ServerConfig
from torch_ps.ps.server.children import ServerChildren


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in ending_signals()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_servers_that_start_slowly_are_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(slow_start, "SLOW_SECONDS", 0.1)
    with ServerChildren(checkpoints=False) as children:
        ready = children.new_ready_file()
        children.start(ServerConfig(listen="127.0.0.1:0", ready_file=ready))
        told = children.wait_for(ready)
    assert told is not None
    assert told["servers"]
    assert not children.failed
    assert any("do not listen yet after" in line and "are waited for" in line for line in caplog.messages)


def test_server_that_is_ended_while_it_starts_has_not_ended_badly() -> None:
    with ServerChildren(checkpoints=True) as children:
        children.start(ServerConfig(listen="127.0.0.1:0", ready_file=children.new_ready_file()))
        signal.raise_signal(signal.SIGTERM)
        children.wait()
    assert not children.failed
    assert not children.ended_badly
