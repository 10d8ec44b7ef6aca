"""gRPC credentials made from TLS files and the token: channels and call metadata of a client, the port of a server.

    Access --connect()--> channel            Tls --port_credentials()--> port; reads the files for each connection
           --metadata---> of every call

Rules of this file
  1. A connection keeps the files that it was made with; renewed files apply to the next one. ``Access.mark`` tells a
     client whether its next connection would use others.
  2. A token is sent in the clear to another machine only if the user has allowed it.

Source: https://grpc.github.io/grpc/python/grpc.html#create-server-credentials
"""

import logging
from dataclasses import dataclass

import grpc

from torch_ps.common.errors import ConfigError
from torch_ps.common.rpc import channel
from torch_ps.common.security.tls import Pem, Tls
from torch_ps.common.security.token import Metadata, TokenFile
from torch_ps.common.wire.address import Address

log = logging.getLogger("torch_ps")


@dataclass(frozen=True, slots=True)
class Access:
    """TLS and token settings of a client of the servers.

    Attributes:
        tls: files that verify the servers, and a certificate to show them if there is one; None for no TLS.
        token: file whose token every call carries; None for no token.
        insecure: True if the token may be sent in the clear to other machines.
    """

    tls: Tls | None = None
    token: TokenFile | None = None
    insecure: bool = False

    def check(self, address: Address) -> None:
        """Refuse to send the token in the clear to another machine, unless that is allowed.

        Raises:
            ConfigError: it would be; names the address.
        """
        if self.token is not None and self.tls is None and not (address.loopback or self.insecure):
            raise ConfigError(
                f"the token would be sent in the clear to {address}; use TLS (tls_ca), or insecure=True (--insecure) "
                "if the network is trusted"
            )

    @property
    def metadata(self) -> Metadata:
        """Metadata of a call; from the token file as it is now."""
        return self.token.metadata if self.token is not None else ()

    @property
    def mark(self) -> Pem | None:
        """A value that changes when a new connection would use other files; None without TLS."""
        return self.tls.pem if self.tls is not None else None

    def connect(self, address: Address) -> grpc.Channel:
        """Open a channel for the threads of a worker."""
        if self.tls is None:
            return grpc.insecure_channel(str(address), options=channel.OPTIONS)
        return grpc.secure_channel(str(address), _client(self.tls.pem), options=channel.OPTIONS)

    def connect_aio(self, address: Address, options: channel.Options = channel.OPTIONS) -> grpc.aio.Channel:
        """Open a channel for an event loop."""
        if self.tls is None:
            return grpc.aio.insecure_channel(str(address), options=options)
        return grpc.aio.secure_channel(str(address), _client(self.tls.pem), options=options)


#: No TLS and no token, as between processes of one host.
OPEN = Access()


def access_of(tls_ca: str, tls_cert: str, tls_key: str, token_file: str, *, insecure: bool = False) -> Access:
    """Settings from the options of a command.

    Raises:
        ConfigError: a file cannot be read or used.
    """
    tls = Tls(tls_ca, tls_cert, tls_key) if tls_ca or tls_cert or tls_key else None
    return Access(tls, TokenFile(token_file) if token_file else None, insecure)


def port_credentials(tls: Tls) -> grpc.ServerCredentials:
    """Credentials of a server's port, which read the files as they are when a connection is made.

    Clients have to show a certificate if ``tls`` has a ``ca``.
    """
    first = tls.pem
    given: list[Pem] = [first]

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        """Called by gRPC on a thread of its own for every connection; None keeps the current files."""
        pem = tls.pem
        if pem == given[0]:
            return None
        given[0] = pem
        return _configuration(pem)

    return grpc.dynamic_ssl_server_credentials(
        _configuration(first),
        fetch,  # type: ignore[arg-type]  # the stub does not allow None
        require_client_authentication=first.ca is not None,
    )


def _configuration(pem: Pem) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(pem.key or b"", pem.cert or b"")], root_certificates=pem.ca)


def _client(pem: Pem) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(pem.ca, pem.key, pem.cert)
