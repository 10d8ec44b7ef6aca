"""A question that is asked again: for how long, and that a process that stood still in between gets another try."""

import threading

import pytest

from torch_ps.common.errors import Unreachable
from torch_ps.worker.transport.call_retry import call_with_retry


def test_try_that_ends_late_is_not_the_last_but_one_that_begins_late_is() -> None:
    tries: list[int] = []

    def ask() -> None:
        tries.append(len(tries))
        if len(tries) == 2:
            threading.Event().wait(3.0)  # stands still past the deadline, as a stopped process does
        raise Unreachable("nobody there")

    with pytest.raises(Unreachable):
        call_with_retry(ask, 2.0)
    assert len(tries) == 3
