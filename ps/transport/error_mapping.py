"""Errors of handlers, as peers and the log get them.

A ``PsError`` is meant for the caller: its class name and its text travel. Any other exception is a bug: the caller gets
a number, and the server's log has the traceback under that number. A peer can cause an error as often as it likes, so
the log gets a few lines of each class and then a count.
"""

import functools
import logging
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from torch_ps.common.errors import PsError
from torch_ps.common.rpc.status import status_of, trailers_of
from torch_ps.ps.observability.bug_reports import report_bug
from torch_ps.ps.observability.log_throttle import LogThrottle
from torch_ps.ps.observability.shard_metrics import Metrics
from torch_ps.ps.transport.carrier import Carrier

log = logging.getLogger("torch_ps.ps")
_throttles: defaultdict[str, LogThrottle] = defaultdict(LogThrottle)  # by class of error

#: Characters of an error's text that travel: it may quote a peer's own megabytes, which gRPC's metadata cannot hold.
MAX_ERROR_TEXT = 1000

#: The peer is gone, before its call or while a response was sent, or this server ends: there is nobody to tell.
PEER_GONE = (grpc.RpcError, grpc.aio.BaseError, ConnectionError)

Handler = Callable[[Any, Any], Awaitable[Any]]


def map_errors(handler: Handler, metrics: Metrics) -> Handler:
    """A gRPC method: ``handler(request or stream, context)`` whose errors become gRPC statuses."""

    @functools.wraps(handler)
    async def call(request: Any, context: Any) -> Any:
        try:
            return await handler(request, context)
        except PEER_GONE:
            raise
        except Exception as error:  # noqa: BLE001 - a bug must not take the server down
            told = _report(error, handler.__name__, context.peer(), metrics)
            await context.abort(status_of(told), str(told), trailers_of(told))

    return call


async def serve_exchange(exchange: Callable[[Carrier], Awaitable[None]], carrier: Carrier, metrics: Metrics) -> None:
    """Run the handler of an Exchange; an error ends the carrier."""
    try:
        try:
            await exchange(carrier)
        finally:
            await carrier.close()
    except PEER_GONE:
        raise
    except Exception as error:  # noqa: BLE001 - as above
        # Many workers share a host, and a Unix socket names none.
        named = not carrier.speaker or carrier.speaker in str(error)
        who = carrier.peer if named else f"{carrier.speaker} at {carrier.peer}"
        await carrier.end(_report(error, "exchange", who, metrics))


def _report(error: Exception, method: str, peer: str, metrics: Metrics) -> PsError:
    """Count and log an error; returns the error that the peer gets."""
    if not isinstance(error, PsError):
        return report_bug(method, error)
    kind, text = type(error), str(error)[:MAX_ERROR_TEXT]
    metrics.refused.labels(kind.__name__).inc()
    if (held_back := _throttles[kind.__name__].admit(time.monotonic())) is not None:
        more = f" ({held_back} more {kind.__name__} since the last line)" if held_back else ""
        log.warning("refused %s of %s: %s%s", method, peer, text, more)
    return kind(text)
