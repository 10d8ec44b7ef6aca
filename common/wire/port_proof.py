"""Proof on a new connection to a data port: both ends know the token of the offer, and neither shows it.

    worker: greeting = name of the protocol, nonce w, place  -->
                          <-- nonce s, HMAC(token, "server" w s)   :server; w: all of the greeting but the name
    worker: HMAC(token, "worker" w s)                 -->
                          <-- READY, once all connections of a stream that has several have come this far

The worker has the token from a call over the server's authenticated port. Without the first proof a worker could speak
to whatever listens at the data port's address: another server, a tunnel's end, the port of another host.

A stream may go over several connections. Each says in its greeting which of how many it is, and of what group.

Source: HMAC, RFC 2104; challenge and response of both sides as in ISO/IEC 9798-4.
"""

import hashlib
import hmac
import secrets
import struct
from dataclasses import dataclass

#: Most connections of one stream.
MAX_CONNECTIONS = 16
#: What a server sends over the first connection of several when it has all.
READY = b"ready"

#: What every greeting begins with.
NAME = b"torch-ps"

_NONCE = 16
_GREETING = struct.Struct(f"<{len(NAME)}s{_NONCE}s{_NONCE}sBB")
_DIGEST = hashlib.sha256().digest_size

GREETING_BYTES = _GREETING.size
ANSWER_BYTES = _NONCE + _DIGEST


@dataclass(frozen=True)
class Place:
    """Which of the connections of a stream one is.

    Attributes:
        group: 16 bytes that all connections of the stream have and no other ones.
        number: place in their order, from 0.
        count: number of connections of the stream, 1 to ``MAX_CONNECTIONS``.
    """

    group: bytes
    number: int
    count: int


def places(count: int) -> list[Place]:
    """The places of the connections of a new stream."""
    group = secrets.token_bytes(_NONCE)
    return [Place(group, number, count) for number in range(count)]


def greet(place: Place | None = None) -> bytes:
    """The first bytes of a worker; ``place`` None: of a stream with one connection."""
    place = place or places(1)[0]
    return _GREETING.pack(NAME, secrets.token_bytes(_NONCE), place.group, place.number, place.count)


def place_of(greeting: bytes) -> Place | None:
    """The place of a connection with these first bytes; None: they are not a worker's."""
    if len(greeting) != GREETING_BYTES or not greeting.startswith(NAME):
        return None
    _, _, group, number, count = _GREETING.unpack(greeting)
    return Place(group, number, count) if number < count <= MAX_CONNECTIONS else None


def answer(token: bytes, greeting: bytes) -> tuple[bytes, bytes]:
    """What a server answers to a greeting, and the proof that it expects then."""
    fresh = secrets.token_bytes(_NONCE)
    nonces = greeting[len(NAME) :] + fresh
    return fresh + _prove(token, b"server", nonces), _prove(token, b"worker", nonces)


def prove(token: bytes, greeting: bytes, answered: bytes) -> bytes | None:
    """The worker's proof; None if the answer does not prove that the server knows the token."""
    nonces = greeting[len(NAME) :] + answered[:_NONCE]
    if not hmac.compare_digest(answered[_NONCE:], _prove(token, b"server", nonces)):
        return None
    return _prove(token, b"worker", nonces)


def _prove(token: bytes, who: bytes, nonces: bytes) -> bytes:
    return hmac.digest(token, who + nonces, hashlib.sha256)
