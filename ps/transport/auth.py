"""Token authentication: refuses a call without the job's token before its handler runs and before a message is read.

    call --> token in its metadata? --missing or wrong--> UNAUTHENTICATED; the text says which
                                    --right-------------> handler

Rules of this file
  1. Only metadata is read. Messages of a refused caller stay in its connection, where HTTP/2 bounds them.
  2. No token appears in a reply or in the log.

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
from torch_ps.ps.observability.shard_metrics import Metrics
from torch_ps.ps.transport.stranger_watch import StrangerWatch

log = logging.getLogger("torch_ps.ps")


class TokenInterceptor(grpc.aio.ServerInterceptor):
    """Checks the token of every call.

    Args:
        token: File with the accepted tokens.
        metrics: Metrics of the shard.
        watch: Watch of the port.
    """

    def __init__(self, token: TokenFile, metrics: Metrics, watch: StrangerWatch) -> None:
        self._token, self._metrics, self._watch = token, metrics, watch
        self._throttle = LogThrottle()

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        error = self._check(dict(handler_call_details.invocation_metadata or ()).get(HEADER))
        if error is None:
            return await continuation(handler_call_details)

        async def refuse(_frames: Any, context: Any) -> None:
            self._watch.refused(context.peer())
            self._metrics.refused.labels(type(error).__name__).inc()
            if (held_back := self._throttle.admit(time.monotonic())) is not None:
                more = f" ({held_back} more were refused since the last line)" if held_back else ""
                log.warning("refused %s of %s: %s%s", handler_call_details.method, context.peer(), error, more)
            await context.abort(status_of(error), str(error), trailers_of(error))

        # As the handler of a stream: gRPC reads no message of it before the handler does.
        return grpc.stream_stream_rpc_method_handler(refuse)

    def _check(self, shown: str | bytes | None) -> PsError | None:
        """Why a token is refused; None: it is accepted."""
        if shown is None:
            return Unauthenticated("this server wants a token and none was shown; give the job's with token_file")
        if not self._token.accepts(shown if isinstance(shown, str) else ""):
            return Unauthenticated("the token that was shown is not this job's; compare token_file here and there")
        return None
