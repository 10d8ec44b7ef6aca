"""Servers that take long to start, as with a large checkpoint to read, are waited for, and the log says so."""

import signal

import pytest

from torch_ps.common import slow_start
from torch_ps.common.ending_signals import ending_signals
from torch_ps.common.options.server_config import ServerConfig
from torch_ps.ps.server.children import ServerChildren


def test_servers_that_start_slowly_are_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(slow_start, "SLOW_SECONDS", 0.1)
    before = {number: signal.getsignal(number) for number in ending_signals()}
    try:
        with ServerChildren(checkpoints=False) as children:
            ready = children.new_ready_file()
            children.start(ServerConfig(listen="127.0.0.1:0", ready_file=ready))
            told = children.wait_for(ready)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert told is not None
    assert told["servers"]
    assert not children.failed
    assert "do not listen yet after" in caplog.messages[0]
    assert "are waited for" in caplog.messages[0]
