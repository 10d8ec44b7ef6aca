"""Proof on a new connection to a data port: both ends know the token of the offer, and neither shows it.

    worker: greeting = name of the protocol, nonce w  -->
                          <-- nonce s, HMAC(token, "server" w s)   :server
    worker: HMAC(token, "worker" w s)                 -->

The worker has the token from a call over the server's authenticated port. Without the first proof a worker could speak
to whatever listens at the data port's address: another server, a tunnel's end, the port of another host.

Source: HMAC, RFC 2104; challenge and response of both sides as in ISO/IEC 9798-4.
"""

import hashlib
import hmac
import secrets

_NAME, _NONCE = b"torch-ps", 16
_DIGEST = hashlib.sha256().digest_size

GREETING_BYTES = len(_NAME) + _NONCE
ANSWER_BYTES = _NONCE + _DIGEST


def greet() -> bytes:
    """The first bytes of a worker."""
    return _NAME + secrets.token_bytes(_NONCE)


def is_greeting(data: bytes) -> bool:
    """Whether ``data`` are the first bytes of a worker."""
    return len(data) == GREETING_BYTES and data.startswith(_NAME)


def answer(token: bytes, greeting: bytes) -> tuple[bytes, bytes]:
    """What a server answers to a greeting, and the proof that it expects then."""
    nonces = greeting[len(_NAME) :] + secrets.token_bytes(_NONCE)
    return nonces[_NONCE:] + _prove(token, b"server", nonces), _prove(token, b"worker", nonces)


def prove(token: bytes, greeting: bytes, answered: bytes) -> bytes | None:
    """The worker's proof; None if the answer does not prove that the server knows the token."""
    nonces = greeting[len(_NAME) :] + answered[:_NONCE]
    if not hmac.compare_digest(answered[_NONCE:], _prove(token, b"server", nonces)):
        return None
    return _prove(token, b"worker", nonces)


def _prove(token: bytes, who: bytes, nonces: bytes) -> bytes:
    return hmac.digest(token, who + nonces, hashlib.sha256)
