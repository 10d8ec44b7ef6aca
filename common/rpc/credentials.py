"""What TLS files and the token become in gRPC: channels and call metadata of a client, the port of a server.

    Access --connect()--> channel            Tls --port_credentials()--> port; each new connection asks the files anew
           --metadata---> of every call

Rules of this file
  1. What a connection was made with stays with it; renewed files are for the next one. ``Access.mark`` tells a client
     whether its next connection would differ.
  2. A token goes over a connection that others could read only if the user has said so.

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
    """How a client reaches the servers of a job.

    Attributes:
        tls: verifies the servers, and shows them a certificate if it has one; None speaks in the clear.
        token: goes along with every call.
        insecure: the token may travel in the clear to other machines.
    """

    tls: Tls | None = None
    token: TokenFile | None = None
    insecure: bool = False

    def check(self, address: Address) -> None:
        """Refuse what would tell the token to whoever listens on the way.

        Raises:
            ConfigError: names the address.
        """
        if self.token is not None and self.tls is None and not (address.loopback or self.insecure):
            raise ConfigError(
                f"the token would travel readable to {address}; use TLS (tls_ca), or insecure=True (--insecure) if "
                "everybody on the way is trusted"
            )

    @property
    def metadata(self) -> Metadata:
        """What every call carries; read from the token file as it is now."""
        return self.token.metadata if self.token is not None else ()

    @property
    def mark(self) -> Pem | None:
        """Changes when a new connection would show or verify something else."""
        return self.tls.pem if self.tls is not None else None

    def connect(self, address: Address, options: channel.Options = channel.OPTIONS) -> grpc.Channel:
        """A channel for the threads of a worker."""
        if self.tls is None:
            return grpc.insecure_channel(str(address), options=options)
        return grpc.secure_channel(str(address), _client(self.tls.pem), options=options)

    def connect_aio(self, address: Address) -> grpc.aio.Channel:
        """A channel for an event loop."""
        if self.tls is None:
            return grpc.aio.insecure_channel(str(address), options=channel.OPTIONS)
        return grpc.aio.secure_channel(str(address), _client(self.tls.pem), options=channel.OPTIONS)


#: In the clear and without a token, as between processes of one host.
OPEN = Access()


def access_of(tls_ca: str, tls_cert: str, tls_key: str, token_file: str, *, insecure: bool = False) -> Access:
    """What the options of a command say.

    Raises:
        ConfigError: a file cannot be read or used.
    """
    tls = Tls(tls_ca, tls_cert, tls_key) if tls_ca or tls_cert or tls_key else None
    return Access(tls, TokenFile(token_file) if token_file else None, insecure)


def port_credentials(tls: Tls) -> grpc.ServerCredentials:
    """For a server's port: the files as they are when a connection is made.

    A client has to show a certificate if ``tls`` has a ``ca``.
    """
    first = tls.pem
    given: list[Pem] = [first]

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        """On a thread of gRPC's, for every connection; None keeps what is in force."""
        pem = tls.pem
        if pem == given[0]:
            return None
        given[0] = pem
        return _configuration(pem)

    return grpc.dynamic_ssl_server_credentials(
        _configuration(first),
        fetch,  # type: ignore[arg-type]  # the stub does not know that None keeps what is in force
        require_client_authentication=first.ca is not None,
    )


def _configuration(pem: Pem) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(pem.key or b"", pem.cert or b"")], root_certificates=pem.ca)


def _client(pem: Pem) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(pem.ca, pem.key, pem.cert)
