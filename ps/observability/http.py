"""HTTP server of a shard, at an address of its own: /metrics for Prometheus and /health for orchestrators.

    GET /metrics   every metric, in the text format
    GET /health    200 "serving" while the shard works, 503 with the reason once it does not

Rules of this file
  1. It is separate from the port that workers use: it needs neither TLS nor token, shows no parameters and changes
     nothing.
  2. A silent client occupies one of a few threads for a few seconds, a slow one for longer; the job is not slowed down.

Source: https://prometheus.io/docs/instrumenting/exposition_formats/
"""

import http.server
import socket
import threading
from collections.abc import Callable
from typing import cast

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from torch_ps.common.wire.address import Address

#: Largest number of clients at a time; others wait in the listening socket.
MAX_CLIENTS = 16
#: Seconds that a client may be silent.
SILENCE = 5


class HttpServer(http.server.ThreadingHTTPServer):
    """Serves from threads of its own, from the constructor on.

    Args:
        listen: Address to bind.
        registry: Metrics that /metrics shows.
        unhealthy: Function that returns why the shard does not work, "" while it does; called on any thread.
        refresh: Function that brings the metrics up to date; called on any thread.

    Attributes:
        address: Address that is bound, with the real port.

    Raises:
        OSError: The address cannot be bound.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(
        self,
        listen: Address,
        registry: CollectorRegistry,
        unhealthy: Callable[[], str],
        refresh: Callable[[], None] = lambda: None,
    ) -> None:
        if ":" in listen.host:
            self.address_family = socket.AF_INET6
        self._free = threading.BoundedSemaphore(MAX_CLIENTS)
        self.registry, self.unhealthy, self.refresh = registry, unhealthy, refresh
        super().__init__((listen.host, listen.port), _Page)
        self.address = Address(listen.host, self.server_address[1])
        threading.Thread(target=self.serve_forever, name="http", daemon=True).start()

    def process_request(self, request: object, client_address: object) -> None:
        self._free.acquire()  # every client leaves when it has been silent for SILENCE
        super().process_request(request, client_address)  # type: ignore[arg-type]

    def process_request_thread(self, request: object, client_address: object) -> None:
        try:
            super().process_request_thread(request, client_address)  # type: ignore[arg-type]
        finally:
            self._free.release()

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore a client that has closed its connection."""


class _Page(http.server.BaseHTTPRequestHandler):
    timeout = SILENCE
    server_version, sys_version = "torch-ps", ""

    def do_GET(self) -> None:
        server, path = cast(HttpServer, self.server), self.path.partition("?")[0]
        if path == "/metrics":
            server.refresh()
            self._answer(200, generate_latest(server.registry), CONTENT_TYPE_LATEST)
        elif path == "/health":
            reason = server.unhealthy()
            self._answer(503 if reason else 200, f"{reason or 'serving'}\n".encode())
        else:
            self._answer(404, b"there are /metrics and /health\n")

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing: there is a scrape every few seconds."""

    def _answer(self, status: int, body: bytes, kind: str = "text/plain; charset=utf-8") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
