"""Repeats a call while the connection to its server is broken; for calls that the server may get twice.

    call --Unreachable, NotServing--> pause --> call --> ... --> answer, or after some seconds the error

The session repeats calls for as long as a broken stream may take to open again: see ``session/shard_streams.py``.
"""

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from torch_ps.common.errors import NotServing, PsError, Unreachable

log = logging.getLogger("torch_ps.worker")

#: Seconds between two tries of a worker whose server is away, wherever it tries again.
RETRY_SECONDS = 0.2
Reply = TypeVar("Reply")


def call_with_retry(call: Callable[[], Reply], seconds: float, *, then: tuple[type[PsError], ...] = ()) -> Reply:
    """Return what ``call`` returns, calling it again for ``seconds`` after its first failure.

    Args:
        call: function that makes one attempt.
        seconds: time in which another try may begin.
        then: errors that a failed try may cause in a later one, and that are retried, too.

    Raises:
        Unreachable, NotServing: the last try has failed like the first.
        PsError: any other error of ``call``.
    """
    deadline: float | None = None
    while True:
        begin = time.monotonic()
        try:
            return call()
        except PsError as error:
            if not isinstance(error, Unreachable | NotServing) and (deadline is None or not isinstance(error, then)):
                raise
            if deadline is None:
                log.info("trying again: %s", error)
                deadline = time.monotonic() + seconds
            elif begin > deadline:  # the begin counts, not the end: this process may have been stopped meanwhile
                raise
            time.sleep(RETRY_SECONDS)
