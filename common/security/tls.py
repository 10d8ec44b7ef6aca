"""TLS files of one process: read, checked, and read again when they are renewed.

    tls_cert, tls_key   certificate of this process (with its chain) and its private key, in PEM
    tls_ca              certificates of the authorities that this process trusts, in PEM
                        A client verifies the server's certificate with it; a server that has one requires a
                        certificate of each client (mutual TLS).

Rules of this file
  1. No gRPC and no socket: ``torch_ps.common.rpc.credentials`` builds channels and ports from what is read here.
  2. Files that no connection could use are refused here, with their names. An expired certificate is only warned
     about, as the clock may be wrong.

Source: RFC 5280 for the validity of a chain; OpenSSL checks it, through the ssl module.
"""

import logging
import ssl
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch_ps.common.errors import ConfigError
from torch_ps.common.security.watched_files import WatchedFiles

log = logging.getLogger("torch_ps")


@dataclass(frozen=True, slots=True)
class Pem:
    """Contents of the files; None for a file that was not given. ``repr`` leaves the key out."""

    ca: bytes | None
    cert: bytes | None
    key: bytes | None = field(repr=False)


@dataclass(frozen=True)
class Tls:
    """Paths of the TLS files of one process, "" for none.

    Attributes:
        ca: authorities that the peer's certificate has to be issued by.
        cert: certificate of this process, with its chain.
        key: private key of the certificate, not encrypted.

    Raises:
        ConfigError: a file cannot be read or used, or key and certificate do not belong together.
    """

    ca: str = ""
    cert: str = ""
    key: str = ""

    def __post_init__(self) -> None:
        check_names(self.ca, self.cert, self.key)
        self.files.refresh()  # the first reading refuses files that no connection could use

    @cached_property
    def files(self) -> WatchedFiles[Pem]:
        """The contents, read again when the files change."""
        named = {"tls_ca": self.ca, "tls_cert": self.cert, "tls_key": self.key}
        return WatchedFiles({option: path for option, path in named.items() if path}, self._make)

    @property
    def pem(self) -> Pem:
        return self.files.value

    def _make(self, contents: Sequence[bytes]) -> Pem:
        left = iter(contents)
        ca, cert, key = (next(left) if path else None for path in (self.ca, self.cert, self.key))
        if ca is not None:
            check_ca(self.ca, ca)
        pem = Pem(ca, cert, key)
        if cert is not None:
            check_pair(self.cert, self.key, pem)
            if reason := find_fault(self.cert, self.key, cert):
                log.warning("certificate %s: %s; peers will refuse it", self.cert, reason)
        return pem


def check_names(ca: str, cert: str, key: str) -> None:
    """Refuse an empty set of files, or a certificate without key or a key without certificate.

    Raises:
        ConfigError: a file is missing; says which.
    """
    if bool(cert) != bool(key):
        given, missing = ("tls_cert", "tls_key") if cert else ("tls_key", "tls_cert")
        raise ConfigError(f"{given} {cert or key} needs {missing}: a certificate and its private key go together")
    if not ca and not cert:
        raise ConfigError("TLS needs files: tls_ca to verify the peer, or tls_cert and tls_key to be verified by it")


def check_ca(path: str, content: bytes) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=_text(content))
    except (ssl.SSLError, ValueError):
        raise ConfigError(f"tls_ca {path} holds no certificate in PEM form") from None


def check_pair(cert: str, key: str, pem: Pem) -> None:
    for name, path, content in (("tls_cert", cert, pem.cert), ("tls_key", key, pem.key)):
        if b"-----BEGIN " not in (content or b""):
            raise ConfigError(f"{name} {path} is not in PEM form")
    try:
        load(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), cert, key)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ConfigError(f"tls_key {key} is not the key of the certificate {cert}") from None
        raise ConfigError(f"tls_cert {cert} with tls_key {key} cannot be used: {error}") from None
    except OSError as error:
        raise ConfigError(f"cannot read tls_cert {cert} or tls_key {key}: {error.strerror}") from None
    except ValueError:  # from the password callback
        raise ConfigError(f"tls_key {key} is encrypted; give a key without a passphrase") from None


def load(context: ssl.SSLContext, cert: str, key: str) -> None:
    """Load certificate and key into ``context``.

    Raises:
        ssl.SSLError: the files do not belong together or are not in PEM form.
        ValueError: the key is encrypted.
    """
    context.load_cert_chain(cert, key, password=_no_password)


def find_fault(cert: str, key: str, authorities: bytes) -> str:
    """Reason why a peer that trusts ``authorities`` would refuse a certificate; "" if it would not.

    Performs a handshake in memory in which the server's end verifies the certificate as a client's.
    """
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
    for context in (server, client):
        load(context, cert, key)
    server.verify_mode = ssl.CERT_REQUIRED
    server.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # so that a certificate without a CA verifies itself
    server.load_verify_locations(cadata=_text(authorities))
    pipes = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (
        client.wrap_bio(pipes[0], pipes[1], server_side=False),
        server.wrap_bio(pipes[1], pipes[0], server_side=True),
    )
    for _ in range(4):  # a full handshake takes two rounds
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
            except ssl.SSLCertVerificationError as error:
                return error.verify_message
            except ssl.SSLError:
                return ""  # the other end's alert
    return ""


def _no_password() -> str:
    raise ValueError("encrypted")


def _text(pem: bytes) -> str:
    """PEM as text for the ssl module; comments between the certificates may hold any bytes."""
    return pem.decode("ascii", "ignore")
