"""What a shard tells over plain HTTP, at an address of its own: /metrics for Prometheus and /health for orchestrators.

    GET /metrics   every metric, in the text format
    GET /health    200 "serving" while the shard works, 503 with the reason once it does not

Rules of this file
  1. Apart from the port that workers use: it needs neither TLS nor token, tells no parameter, and changes nothing.
  2. A visitor who is silent costs one of few threads for a few seconds, a slow one for longer, and both cost the job
     nothing.

Source: https://prometheus.io/docs/instrumenting/exposition_formats/
"""

import http.server
import socket
import threading
from collections.abc import Callable

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from torch_ps.common.wire.address import Address

#: Visitors at a time; others wait in the listening socket.
VISITORS = 16
#: Seconds that a visitor may be silent.
SILENCE = 5


class HttpServer(http.server.ThreadingHTTPServer):
    """Serves from threads of its own.

    Args:
        listen: address to bind.
        unhealthy: function that returns why the shard does not work, "" while it does. Called on any thread.
        refresh: brings the metrics up to date. Likewise.

    Raises:
        OSError: the address cannot be bound.
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
        self._free = threading.BoundedSemaphore(VISITORS)
        self.registry, self.unhealthy, self.refresh = registry, unhealthy, refresh
        super().__init__((listen.host, listen.port), _Page)
        self.address = Address(listen.host, self.server_address[1])
        threading.Thread(target=self.serve_forever, name="http", daemon=True).start()

    def process_request(self, request: object, client_address: object) -> None:
        self._free.acquire()  # each of those inside leaves after SILENCE at the latest
        super().process_request(request, client_address)  # type: ignore[arg-type]

    def process_request_thread(self, request: object, client_address: object) -> None:
        try:
            super().process_request_thread(request, client_address)  # type: ignore[arg-type]
        finally:
            self._free.release()

    def handle_error(self, request: object, client_address: object) -> None:
        """A visitor that has gone is none of our business."""


class _Page(http.server.BaseHTTPRequestHandler):
    server: HttpServer
    timeout = SILENCE
    server_version, sys_version = "torch-ps", ""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/metrics":
            self.server.refresh()
            self._answer(200, generate_latest(self.server.registry), CONTENT_TYPE_LATEST)
        elif path == "/health":
            reason = self.server.unhealthy()
            self._answer(503 if reason else 200, f"{reason or 'serving'}\n".encode())
        else:
            self._answer(404, b"there are /metrics and /health\n")

    def log_message(self, format: str, *args: object) -> None:
        """Nobody wants a line for every scrape."""

    def _answer(self, status: int, body: bytes, kind: str = "text/plain; charset=utf-8") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
