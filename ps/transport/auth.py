"""The door of a server: who shows no good token is refused before any handler runs or any message is read.

    call --> token? --missing, wrong--> UNAUTHENTICATED, with which of the two
             --good, or none wanted--> handler

Rules of this file
  1. Only metadata is looked at. What a refused caller sends stays in its connection, where HTTP/2 bounds it.
  2. No token appears in an answer or in the log.

Source: https://grpc.github.io/grpc/python/grpc_asyncio.html#grpc.aio.ServerInterceptor
"""

import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from torch_ps.common.errors import PsError, Unauthenticated
from torch_ps.common.rpc.status import status_of, trailers_of
from torch_ps.common.security.token import HEADER, TokenFile
from torch_ps.ps.observability.log_throttle import LogThrottle
from torch_ps.ps.observability.metrics import Metrics

log = logging.getLogger("torch_ps.ps")


class Door(grpc.aio.ServerInterceptor):
    """Asks every call for the token.

    Args:
        token: what is accepted.
    """

    def __init__(self, token: TokenFile, metrics: Metrics) -> None:
        self._token, self._metrics = token, metrics
        self._throttle = LogThrottle()

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        error = self._wrong(dict(handler_call_details.invocation_metadata or ()).get(HEADER))
        if error is None:
            return await continuation(handler_call_details)

        async def refuse(_frames: Any, context: Any) -> None:
            self._metrics.refused.labels(type(error).__name__).inc()
            if (kept := self._throttle.admit(time.monotonic())) is not None:
                more = f" ({kept} more were refused since the last line)" if kept else ""
                log.warning("refused %s of %s: %s%s", handler_call_details.method, context.peer(), error, more)
            await context.abort(status_of(error), str(error), trailers_of(error))

        return grpc.stream_stream_rpc_method_handler(refuse)  # reads no message unless it is asked to

    def _wrong(self, shown: str | bytes | None) -> PsError | None:
        if shown is None:
            return Unauthenticated("this server wants a token and none was shown; give the job's with token_file")
        if not self._token.accepts(shown if isinstance(shown, str) else ""):
            return Unauthenticated("the token that was shown is not this job's; compare token_file here and there")
        return None
