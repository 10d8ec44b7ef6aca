"""The gRPC port of a server: bound first, opened once everything behind it is made.

Source: https://github.com/grpc/grpc/blob/master/doc/health-checking.md
"""

import asyncio
import logging
import socket

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from torch_ps.common.errors import ConfigError
from torch_ps.common.options.server_config import ServerConfig
from torch_ps.common.rpc import channel
from torch_ps.common.rpc.credentials import port_credentials
from torch_ps.common.security.tls import Tls
from torch_ps.common.security.token import TokenFile
from torch_ps.common.wire import address
from torch_ps.common.wire.address import Address
from torch_ps.ps.observability.shard_metrics import Metrics
from torch_ps.ps.server.servicer import Servicer
from torch_ps.ps.transport.auth import TokenInterceptor
from torch_ps.ps.transport.socket_listeners import DataPort
from torch_ps.ps.transport.stranger_watch import NoteAccepted, StrangerWatch
from torch_ps.ps.transport.strangers import MAX_STRANGERS

log = logging.getLogger("torch_ps.ps")

#: Seconds that open calls get to end when the server stops.
GRACE = 1.0


class Endpoint:
    """The port that workers and other servers call.

    Args:
        tls: Certificates of the port; None serves in the clear.
        token: Token that every call has to show; None asks for none.

    Attributes:
        address: Address that the port is bound to.
        data_port: Port for the streams of workers; None: there is none.

    Raises:
        ConfigError: The address cannot be bound.
    """

    def __init__(self, config: ServerConfig, tls: Tls | None, token: TokenFile | None, metrics: Metrics) -> None:
        self._tls, self._token = tls, token
        self._watch = StrangerWatch(metrics)
        anybody = token is None and not (tls is not None and tls.ca) and not config.insecure
        self._server = grpc.aio.server(
            interceptors=[
                *([TokenInterceptor(token, metrics, self._watch)] if token is not None else []),
                NoteAccepted(self._watch),
            ],
            options=channel.server_options(3 * config.max_workers + 2 * MAX_STRANGERS, anybody=anybody),
            maximum_concurrent_rpcs=4 * config.max_workers + 256,
        )
        self._servicer: Servicer | None = None
        wanted = address.parse(config.listen, free_port=True)
        _try_to_bind(wanted)
        try:
            if tls is None:
                port = self._server.add_insecure_port(str(wanted))
            else:
                port = self._server.add_secure_port(str(wanted), port_credentials(tls))
        except RuntimeError:
            raise _cannot_listen(wanted, "the port is in use or the address is not one of this machine") from None
        self.address = Address(wanted.host, port)
        self.data_port: DataPort | None = None
        if config.data_port != "off":
            self.data_port = DataPort(Address(wanted.host, int(config.data_port)), tls)

    async def open(self, servicer: Servicer) -> None:
        """Serve ``servicer`` and health checks from now on."""
        servicer.listen()
        self._servicer = servicer
        self._server.add_generic_rpc_handlers((servicer.handlers(),))
        checks = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(checks, self._server)
        await checks.set("", health_pb2.HealthCheckResponse.SERVING)
        await checks.set(channel.SERVICE, health_pb2.HealthCheckResponse.SERVING)
        await self._server.start()

    async def watch_strangers(self) -> None:
        """Close connections that do no more than cost something, until cancelled."""
        await self._watch.run(self.address.port)

    async def close(self) -> None:
        """End all calls within ``GRACE``, and wait as long for gRPC's own tasks.

        These end a moment after the server; cut off by the end of the event loop they would print a traceback.
        """
        if self._servicer is not None:
            self._servicer.stop_listening()
        await self._server.stop(GRACE)
        if rest := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(rest, timeout=GRACE)

    @property
    def protection(self) -> str:
        """How the port is protected, for the log."""
        tls = self._tls
        secured = "in the clear" if tls is None else "mutual TLS" if tls.ca else "TLS"
        return f"{secured}, {'with' if self._token is not None else 'without'} token"

    def warn_unprotected(self) -> None:
        """Log what a port that other machines can reach is not protected against."""
        if self.address.loopback:
            return
        if self._token is None and (self._tls is None or not self._tls.ca):
            log.warning(
                "clients of %s are not authenticated: anyone who can reach it may join; set tls_ca or token_file",
                self.address,
            )
        if self._tls is None:
            log.warning(
                "traffic to %s is not encrypted: anyone on the way can read and change it, a token too; set tls_cert "
                "and tls_key",
                self.address,
            )


def _try_to_bind(wanted: Address) -> None:
    """Bind the address and release it: gRPC says on stderr, and not to its caller, why it cannot.

    Raises:
        ConfigError: The address cannot be bound; the message says why.
    """
    try:
        found = socket.getaddrinfo(wanted.host, wanted.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, where = found[0]
        with socket.socket(family, kind, protocol) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(where)
    except OSError as error:
        raise _cannot_listen(wanted, error.strerror or str(error)) from None


def _cannot_listen(wanted: Address, cause: str) -> ConfigError:
    return ConfigError(f"cannot listen on {wanted}: {cause}; choose another with --listen, or port 0 for any free one")
