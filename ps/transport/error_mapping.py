"""Errors become gRPC statuses here, once, for every method; no handler contains ``try``.

An error of this project is the caller's to read: its sentence and class name travel. Anything else is a bug: it
surfaces as INTERNAL with a number, and its traceback goes to the server's log under that number only.

What a peer can cause at will, it can cause often: refusals of one kind are written a few at a time and then counted.
"""

import functools
import itertools
import logging
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from torch_ps.common.errors import PsError
from torch_ps.common.rpc.status import status_of, trailers_of
from torch_ps.ps.observability.log_throttle import LogThrottle
from torch_ps.ps.observability.metrics import Metrics

log = logging.getLogger("torch_ps.ps")
_numbers = itertools.count(1)
_throttle: defaultdict[str, LogThrottle] = defaultdict(LogThrottle)  # by class of error

#: Characters of a message that travel; a peer's own words in it may be megabytes, and metadata may not.
MAX_MESSAGE = 1000

Handler = Callable[[Any, Any], Awaitable[Any]]


def guarded(handler: Handler, metrics: Metrics) -> Handler:
    """``handler(request or stream, context)`` with its errors turned into statuses."""

    @functools.wraps(handler)
    async def call(request: Any, context: Any) -> Any:
        try:
            return await handler(request, context)
        except PsError as error:
            metrics.refused.labels(type(error).__name__).inc()
            text = str(error)[:MAX_MESSAGE]
            if (kept := _throttle[type(error).__name__].admit(time.monotonic())) is not None:
                more = f" ({kept} more {type(error).__name__} since the last line)" if kept else ""
                log.warning("refused %s of %s: %s%s", handler.__name__, context.peer(), text, more)
            await context.abort(status_of(error), text, trailers_of(error))
        except (grpc.RpcError, grpc.aio.BaseError, ConnectionError):
            raise  # the peer is gone, before its call or while an answer was sent, or this server ends: nobody hears it
        except Exception:  # the one place where a bug must not take the server down
            number = next(_numbers)
            log.exception("bug %d in %s", number, handler.__name__)
            found = PsError(f"bug {number} on the server; its log has the traceback")
            await context.abort(grpc.StatusCode.INTERNAL, str(found), trailers_of(found))

    return call
