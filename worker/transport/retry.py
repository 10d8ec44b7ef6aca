"""A question that is asked again while the connection to its server is broken; for questions that may be repeated.

    ask --Unreachable, NotServing--> pause --> ask --> ... --> answer, or after some seconds: Unreachable

How long: as long as a stream that broke has to be open again, see ``torch_ps.worker.session.shard_streams``.
"""

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from torch_ps.common.errors import NotServing, PsError, Unreachable

log = logging.getLogger("torch_ps.worker")

#: Seconds between two tries.
RETRY_SECONDS = 0.2
Reply = TypeVar("Reply")


def call_with_retry(ask: Callable[[], Reply], seconds: float, *, then: tuple[type[PsError], ...] = ()) -> Reply:
    """What ``ask`` returns, which is called again for ``seconds`` after its first failure.

    Args:
        then: what a try that failed may leave behind for the next.

    Raises:
        Unreachable, NotServing: the last try has failed too.
        PsError: whatever else ``ask`` raises.
    """
    deadline: float | None = None
    while True:
        begin = time.monotonic()
        try:
            return ask()
        except PsError as error:
            if not isinstance(error, Unreachable | NotServing) and (deadline is None or not isinstance(error, then)):
                raise
            if deadline is None:
                log.info("asks again: %s", error)
                deadline = time.monotonic() + seconds
            elif begin > deadline:  # not merely its end: this process may have been stopped meanwhile
                raise
            time.sleep(RETRY_SECONDS)
