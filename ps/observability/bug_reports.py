"""Bug reports: an exception that no input may cause is logged once, with a number, its traceback and where to send it.

The peer in whose call it happened gets the number. A bug that happens again and again fills no disk: the log gets a few
of them and then a count.
"""

import itertools
import logging
import time

from torch_ps.common.errors import PsError
from torch_ps.ps.observability.log_throttle import LogThrottle

log = logging.getLogger("torch_ps.ps")
_numbers = itertools.count(1)
_throttle = LogThrottle()


def report_bug(where: str, error: BaseException) -> PsError:
    """Log an exception that is a mistake of this project. Any thread may call it.

    Args:
        where: What was being done: a method, or a sentence such as "the mean of bucket 3".
        error: The exception.

    Returns:
        What those get whose call or push it ends.
    """
    number = next(_numbers)
    if (held_back := _throttle.admit(time.monotonic())) is not None:
        more = f" ({held_back} more bugs since the last one that was logged)" if held_back else ""
        log.error(
            "bug %d in %s: this is a mistake of torch-ps, and the server goes on; please report it with what follows%s",
            number,
            where,
            more,
            exc_info=error,
        )
    return PsError(f"bug {number} on the server; its log has the traceback")
