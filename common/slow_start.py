"""What a parent of servers says while they start slowly. It ends none: a large checkpoint takes minutes to read."""

import logging
import time

log = logging.getLogger("torch_ps")

#: Seconds after which the log says that servers do not listen yet, and between two such lines.
SLOW_SECONDS = 60.0


class SlowStart:
    """One wait for servers; it begins when this object is made."""

    def __init__(self) -> None:
        self._begin = time.monotonic()
        self._lines = 0

    def tell(self) -> None:
        """Write a line if it is time for one."""
        waited = time.monotonic() - self._begin
        if waited > SLOW_SECONDS * (self._lines + 1):
            self._lines += 1
            log.warning(
                "the servers do not listen yet after %.0f s and are waited for: they may be reading a checkpoint, or "
                "this machine is busy; Ctrl-C or SIGTERM ends them",
                waited,
            )
