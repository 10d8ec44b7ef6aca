"""HTTP server of a shard, at an address of its own: /metrics for Prometheus and /health for orchestrators.

    GET /metrics   every metric, in the text format
    GET /health    200 "serving" while the shard works, 503 with the reason once it does not

    accept --room?--> read the request --> answer --> close; all of it within SECONDS
             '--no--> end the oldest visitor of the host with the most

Rules of this file
  1. It is separate from the port that workers use: it needs neither TLS nor token, shows no parameters and changes
     nothing.
  2. It has a thread and an event loop of its own, so that /health answers when the shard's loop does not.
  3. Nobody waits for a visitor: whoever is slow is ended for somebody new, and who has sent a whole request is answered
     before anybody is ended.
  4. /metrics is written at most for a part of the time, however often it is asked for.

Source: https://prometheus.io/docs/instrumenting/exposition_formats/, RFC 9112.
"""

import asyncio
import contextlib
import logging
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from http import HTTPStatus

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from torch_ps.common.wire.address import Address

log = logging.getLogger("torch_ps.ps")

#: Visitors at a time; one more ends the oldest of the host that has the most.
MAX_CLIENTS, MAX_CLIENTS_OF_HOST = 256, 64
#: Seconds from the start of a visit to its last byte.
SECONDS = 5.0
#: Bytes of a request's head.
MAX_REQUEST = 8192
#: Connections that the kernel holds until they are accepted.
BACKLOG = 1024
#: Part of the time that may be spent on writing the page of /metrics; in between the last one is shown again.
METRICS_SHARE = 0.05
#: Seconds to wait when the process can open no further connection.
OUT_OF_FILES = 0.1

_TEXT = "text/plain; charset=utf-8"


class HttpServer:
    """Serves from a thread of its own, from the constructor on.

    Args:
        listen: Address to bind.
        registry: Metrics that /metrics shows.
        unhealthy: Function that returns why the shard does not work, "" while it does; called on the server's thread.
        refresh: Function that brings the metrics up to date; called on a thread, and may wait.

    Attributes:
        address: Address that is bound, with the real port.

    Raises:
        OSError: The address cannot be bound.
    """

    def __init__(
        self,
        listen: Address,
        registry: CollectorRegistry,
        unhealthy: Callable[[], str],
        refresh: Callable[[], None] = lambda: None,
    ) -> None:
        self._registry, self._unhealthy, self._refresh = registry, unhealthy, refresh
        self._page, self._page_until, self._writing = b"", float("-inf"), asyncio.Lock()
        self._visits: dict[asyncio.Task[None], str] = {}  # with the visitor's host; the oldest first
        family = socket.AF_INET6 if ":" in listen.host else socket.AF_INET
        self._listening = socket.create_server((listen.host, listen.port), family=family, backlog=BACKLOG)
        self._listening.setblocking(False)
        self.address = Address(listen.host, self._listening.getsockname()[1])
        self._loop = asyncio.new_event_loop()
        self._accepting = self._loop.create_task(self._accept())
        self._thread = threading.Thread(target=self._run, name="http", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Accept nobody any more and end every visit."""
        self._loop.call_soon_threadsafe(self._accepting.cancel)
        self._thread.join()

    def _run(self) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            self._loop.run_until_complete(self._accepting)
        self._loop.run_until_complete(self._end_visits())
        self._loop.close()
        self._listening.close()

    # -------------------------------------------------------------- visits

    async def _accept(self) -> None:
        while True:
            try:
                connection, (host, *_) = await self._loop.sock_accept(self._listening)
            except OSError:  # no file is free, or the visitor has gone already
                await asyncio.sleep(OUT_OF_FILES)
                continue
            visit = self._loop.create_task(self._visit(connection))
            await asyncio.sleep(0)  # it reads what has arrived, and is over if that is a request
            if not visit.done():
                self._visits[visit] = host
                visit.add_done_callback(self._visits.pop)
                self._make_room(host)

    async def _end_visits(self) -> None:
        for visit in self._visits:
            visit.cancel()
        await asyncio.gather(*self._visits, return_exceptions=True)

    def _make_room(self, host: str) -> None:
        """End the oldest visit of a host, after a visit of ``host`` has begun, if there are too many."""
        num_of = Counter(self._visits.values())
        if len(self._visits) > MAX_CLIENTS:
            host = num_of.most_common(1)[0][0]
        elif num_of[host] <= MAX_CLIENTS_OF_HOST:
            return
        oldest = next(visit for visit, visitor in self._visits.items() if visitor == host)
        del self._visits[oldest]
        oldest.remove_done_callback(self._visits.pop)
        oldest.cancel()

    async def _visit(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError, TimeoutError):
            connection.setblocking(False)
            async with asyncio.timeout(SECONDS):
                if request := await self._read(connection):
                    await self._loop.sock_sendall(connection, await self._answer(request))

    async def _read(self, connection: socket.socket) -> bytes:
        """Head of a request, or as much of it as is read; b"" if the visitor ends the connection before that."""
        head = b""
        while b"\r\n\r\n" not in head and len(head) <= MAX_REQUEST:
            data = await self._loop.sock_recv(connection, MAX_REQUEST)
            if not data:
                return b""
            head += data
        return head

    # -------------------------------------------------------------- answers

    async def _answer(self, request: bytes) -> bytes:
        """The whole answer to the head of a request."""
        match request.partition(b"\r\n")[0].split(b" "):
            case [b"GET" | b"HEAD", target, version] if version.startswith(b"HTTP/1."):
                status, body, kind = await self._look_up(target.partition(b"?")[0])
            case [_, _, version] if version.startswith(b"HTTP/1."):
                status, body, kind = HTTPStatus.METHOD_NOT_ALLOWED, b"only GET and HEAD\n", _TEXT
            case _:
                status, body, kind = HTTPStatus.BAD_REQUEST, b"this is no request of HTTP/1.1\n", _TEXT
        if len(request) > MAX_REQUEST:
            status, body, kind = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, b"the request is too large\n", _TEXT
        head = (
            f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
            "Server: torch-ps\r\nConnection: close\r\n\r\n"
        )
        return head.encode() + (b"" if request.startswith(b"HEAD ") else body)

    async def _look_up(self, path: bytes) -> tuple[HTTPStatus, bytes, str]:
        """Status, body and content type of a page."""
        try:
            if path == b"/metrics":
                return HTTPStatus.OK, await self._metrics(), CONTENT_TYPE_LATEST
            if path == b"/health":
                reason = self._unhealthy()
                status = HTTPStatus.SERVICE_UNAVAILABLE if reason else HTTPStatus.OK
                return status, f"{reason or 'serving'}\n".encode(), _TEXT
        except Exception:  # a bug must not end the server's thread
            log.exception("bug in the page %s", path.decode("ascii", "replace"))
            return HTTPStatus.INTERNAL_SERVER_ERROR, b"a bug on the server; its log has the traceback\n", _TEXT
        return HTTPStatus.NOT_FOUND, b"there are /metrics and /health\n", _TEXT

    async def _metrics(self) -> bytes:
        """The page of /metrics, written anew if that has not been done too recently."""
        async with self._writing:
            if time.monotonic() >= self._page_until:
                await asyncio.to_thread(self._refresh)
                begin = time.monotonic()
                self._page = generate_latest(self._registry)
                done = time.monotonic()
                self._page_until = done + (done - begin) / METRICS_SHARE
            return self._page
