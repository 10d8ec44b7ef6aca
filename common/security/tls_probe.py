"""Probe of a server's port: explains why a connection fails, as gRPC reports "failed to connect" for any reason.

    TCP --> TLS handshake --> the server's first byte
     |        |                 '- none, every time: the server refuses the client's certificate, or requires one
     |        '- fails: its certificate is expired, of another authority or for another name; or it does not speak TLS
     '- fails: gRPC's own message is enough

Rules of this file
  1. The probe shows the server the client's certificate and never sends the token.
  2. Every probe has a deadline. The result is None if TLS is not the reason.
  3. A server that is about to end closes one connection, in the handshake or after it, and refuses the next one. A
     server without TLS, or one that refuses a certificate, closes every one.

Source: https://www.openssl.org/docs/man3.0/man3/X509_STORE_CTX_get_error.html for the error numbers.
"""

import socket
import ssl
import time
from contextlib import suppress
from typing import Any

from torch_ps.common.security.tls import Tls, find_fault, load
from torch_ps.common.wire.address import Address

_EXPIRED, _NOT_YET = 10, 9
_OTHER_AUTHORITY = {18, 19, 20, 21}
_OTHER_NAME = {62, 64}
#: Times in a row that a server has to close the connection, and seconds between two attempts.
_TIMES, _PAUSE_SECONDS = 3, 0.25


class _HungUp(Exception):
    """The server closed the connection without an alert; the text says why it does, if it does so every time."""


class _Connected(ssl.SSLSocket):
    """Counts as connected even if the peer has closed the connection: the handshake then fails and closes the socket.

    ``ssl.SSLSocket`` would find the socket not connected, and raise without closing it.
    """

    def getpeername(self) -> Any:
        return None


def explain_failure(address: Address, tls: Tls | None, seconds: float) -> str | None:
    """Connect to a server and explain how TLS makes that fail, in a sentence.

    Args:
        address: address of the server.
        tls: files of the client; None for a client without TLS.
        seconds: deadline of the probe; TCP, the handshake and the first byte may each take a third of it.

    Returns:
        The sentence, or None if TLS is not the reason or the reason cannot be found.
    """
    deadline, reason = time.monotonic() + seconds, ""
    for _ in range(_TIMES):
        try:
            return _look(address, tls, max(deadline - time.monotonic(), 0.1) / 3)
        except OSError:
            return None
        except _HungUp as end:
            reason = str(end)
            time.sleep(min(_PAUSE_SECONDS, seconds / (2 * _TIMES)))
    return reason


def _look(address: Address, tls: Tls | None, seconds: float) -> str | None:
    with socket.create_connection(address, seconds) as plain:
        plain.settimeout(seconds)
        return _with_tls(plain, address, tls) if tls is not None else _without(plain, address)


def _without(plain: socket.socket, address: Address) -> str | None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    context.sslsocket_class = _Connected
    with suppress(OSError), context.wrap_socket(plain):
        return (
            f"server {address} speaks TLS only and this process speaks in the clear; give it the authority of the "
            "server's certificate (tls_ca, --tls-ca)"
        )
    return None


def _with_tls(plain: socket.socket, address: Address, tls: Tls) -> str | None:
    context = ssl.create_default_context(cafile=tls.ca or None)
    context.set_alpn_protocols(["h2"])
    context.sslsocket_class = _Connected
    if tls.cert:
        load(context, tls.cert, tls.key)
    try:
        with context.wrap_socket(plain, server_hostname=address.host) as secured:
            if secured.recv(1):
                return None
            if _fault(tls):
                return _refused(address, tls)
            raise _HungUp(_refused(address, tls))
    except ssl.SSLCertVerificationError as error:
        return _not_believed(address, tls, error)
    except (ssl.SSLEOFError, ConnectionError):
        raise _HungUp(f"server {address} does not speak TLS, or ends the handshake") from None
    except ssl.SSLError as error:
        if "ALERT" in (error.reason or ""):
            return _refused(address, tls)
        return f"server {address} does not speak TLS; start it with tls_cert and tls_key, or leave TLS out here"
    except OSError:
        return None


def _not_believed(address: Address, tls: Tls, error: ssl.SSLCertVerificationError) -> str:
    subject = f"the certificate of server {address}"
    if error.verify_code == _EXPIRED:
        return f"{subject} has expired; it has to be renewed there (ps-serve reads the files again by itself)"
    if error.verify_code == _NOT_YET:
        return f"{subject} is not valid yet; compare the clocks of both machines"
    if error.verify_code in _OTHER_AUTHORITY:
        believed = f"of tls_ca {tls.ca}" if tls.ca else "that this system trusts"
        return f"{subject} is not of an authority {believed}: wrong tls_ca here, or a stranger there"
    if error.verify_code in _OTHER_NAME:
        return f"{subject} is for another name than {address.host}; make one with that name in it, or use its name"
    return f"{subject} cannot be verified: {error.verify_message}"


def _refused(address: Address, tls: Tls) -> str:
    if not tls.cert:
        return f"server {address} wants a certificate of its clients; give tls_cert and tls_key"
    fault = _fault(tls)
    reason = f": {fault}" if fault else ", though it is of the authority in tls_ca here" if tls.ca else ""
    return f"server {address} refuses the certificate {tls.cert}{reason}"


def _fault(tls: Tls) -> str:
    """What the authority of the servers has against this process's certificate; "" if that is not known."""
    return find_fault(tls.cert, tls.key, tls.pem.ca or b"") if tls.cert and tls.ca else ""
