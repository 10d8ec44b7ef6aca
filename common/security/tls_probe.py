"""Why a connection to a server fails: one look at its port with the ssl module, and a sentence.

    gRPC says "failed to connect", for many reasons alike. So look:

    TCP --> TLS handshake --> the server's first byte
     |        |                 '- none: it refuses our certificate, or that there is none
     |        '- its certificate: expired, of another authority, for another name; or it does not speak TLS at all
     '- not even that: gRPC's own words are enough

Rules of this file
  1. Nothing of ours is sent but a certificate; no token.
  2. Every look has a deadline. Whatever cannot be told is told by nobody: None.
  3. A server that is about to end hangs up in the handshake, and refuses the next connection. One that speaks no TLS
     hangs up each time.

Source: https://www.openssl.org/docs/man3.0/man3/X509_STORE_CTX_get_error.html for the numbers.
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
#: Times that a server has to hang up in a row, and seconds between them.
_TIMES, _PAUSE_SECONDS = 4, 0.25


class _HungUp(Exception):
    """In the handshake, without a word."""


class _Connected(ssl.SSLSocket):
    """Taken for connected though the peer may have hung up since: that shows in the handshake, which then closes it.

    The class itself would find it not connected, and raise without closing it.
    """

    def getpeername(self) -> Any:
        return None


def explain_failure(address: Address, tls: Tls | None, seconds: float) -> str | None:
    """What TLS has to do with it, as a sentence; None if nothing that can be seen.

    Args:
        seconds: for all, of which TCP, the handshake and the first byte may each take a third.
    """
    deadline = time.monotonic() + seconds
    for _ in range(_TIMES):
        try:
            return _look(address, tls, max(deadline - time.monotonic(), 0.1) / 3)
        except OSError:
            return None
        except _HungUp:
            time.sleep(min(_PAUSE_SECONDS, seconds / (2 * _TIMES)))
    return f"server {address} does not speak TLS, or ends the handshake"


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
            return None if secured.recv(1) else _refused(address, tls)
    except ssl.SSLCertVerificationError as error:
        return _not_believed(address, tls, error)
    except (ssl.SSLEOFError, ConnectionError):
        raise _HungUp from None
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
    fault = find_fault(tls.cert, tls.key, tls.pem.ca or b"") if tls.ca else ""
    reason = f": {fault}" if fault else ", though it is of the authority in tls_ca here" if tls.ca else ""
    return f"server {address} refuses the certificate {tls.cert}{reason}"
