"""Floods of a stranger: what somebody without the token, or without HTTP, may send for as long as they like.

    FLOODS[name] --attacking()--> a process of its own with ``connections`` sockets: opening, then batch 0, 1, 2, ...
                                  a socket that the server closes is followed by another one at once

Rules of this file
  1. A flood makes its bytes itself: no client library keeps it from what a client would not do.
  2. It never waits for the server. ``reads`` says whether it takes what the server sends.

Source: RFC 9113; CVE-2019-9511 to 9518, CVE-2023-44487, CVE-2024-27316 for what has felled other servers.
"""

import asyncio
import contextlib
import ipaddress
import os
import random
import ssl
import struct
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from tests.support.processes import Child
from torch_ps.common.rpc import channel
from torch_ps.common.wire import address
from torch_ps.common.wire.port_proof import greet

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PING, WINDOW_UPDATE, CONTINUATION = 0, 1, 2, 3, 4, 6, 8, 9
END_STREAM, END_HEADERS = 1, 4
#: Addresses that the floods come from, each from its own, as a server bans them; none is that of the honest.
_strangers = (f"127.1.{number >> 8}.{number & 255}" for number in count(1))
EVERYWHERE = int(ipaddress.ip_address("127.64.0.0"))
#: Seconds between the end of a connection and the next one.
BETWEEN = 0.001


def frame(kind: int, flags: int, stream: int, body: bytes = b"") -> bytes:
    return struct.pack(">I", len(body))[1:] + struct.pack(">BBI", kind, flags, stream) + body


def literal(name: bytes, value: bytes) -> bytes:
    """A header field that is in no table; both parts are shorter than 127 bytes."""
    return bytes([0, len(name)]) + name + bytes([len(value)]) + value


def head(method: str, *fields: bytes) -> bytes:
    """Fields of a call: POST, http, the path."""
    known = literal(b":path", channel.method(method).encode()) + literal(b":authority", b"a")
    return (
        b"\x83\x86"
        + known
        + literal(b"content-type", b"application/grpc")
        + literal(b"te", b"trailers")
        + b"".join(fields)
    )


def calls(*fields: bytes, after: Callable[[int], bytes] = lambda stream: b"") -> Callable[[int], bytes]:
    """Batches of a hundred calls; ``after`` makes what follows the headers of a stream."""
    size = 100
    fields_of_all = head("Describe", *fields)

    def batch(number: int) -> bytes:
        streams = range(2 * size * number + 1, 2 * size * (number + 1) + 1, 2)
        return b"".join(frame(HEADERS, END_HEADERS, each, fields_of_all) + after(each) for each in streams)

    return batch


def always(batch: bytes) -> Callable[[int], bytes]:
    return lambda number: batch


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(SETTINGS, 0, 0)
NO_WINDOW = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 0))
UNFINISHED = PREFACE + frame(HEADERS, 0, 1, head("Describe"))
FIELDS = frame(CONTINUATION, 0, 1, literal(b"x", b"y" * 100) * 100)
PINGS = frame(PING, 0, 0, b"12345678") * 2000
WRONG = literal(b"authorization", b"Bearer 0123456789-not-the-token")
CANCEL, ONE = struct.pack(">I", 8), struct.pack(">I", 1)


def request(stream: int) -> bytes:
    """The empty message that ends the requests of a stream."""
    return frame(DATA, END_STREAM, stream, bytes(5))


@dataclass(frozen=True, slots=True)
class Flood:
    """One kind of attack.

    Attributes:
        opening: First bytes of a connection.
        batch: Bytes that follow, by their number from 0; None: nothing follows, and the connection stays open.
        reads: Whether the peer takes what the server sends.
        connections: Sockets at a time.
        pause: Seconds between two batches.
        once: Whether a connection ends after the first batch.
        everywhere: Whether each connection comes from another address.
        port: "grpc", "data", or "http" for that of /metrics and /health.
        handshake: Whether the peer speaks TLS where the server does; otherwise its bytes go out as they are.
    """

    opening: bytes = PREFACE
    batch: Callable[[int], bytes] | None = None
    reads: bool = True
    connections: int = 4
    pause: float = 0.0
    once: bool = False
    everywhere: bool = False
    port: str = "grpc"
    handshake: bool = True


def _both(name: str, **flood: object) -> dict[str, Flood]:
    return {name: Flood(**flood), f"{name}, unread": Flood(**flood, reads=False)}  # type: ignore[arg-type]


FLOODS: dict[str, Flood] = {
    **_both("ping", batch=always(PINGS)),
    **_both("settings", batch=always(frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 65535)) * 1000)),
    **_both(
        "continuation",
        opening=UNFINISHED,
        batch=always(FIELDS),
    ),
    "empty continuation": Flood(opening=UNFINISHED, batch=always(frame(CONTINUATION, 0, 1) * 2000)),
    **_both("rapid reset", batch=calls(after=lambda stream: frame(RST_STREAM, 0, stream, CANCEL))),
    **_both("wrong token", batch=calls(WRONG, after=request)),
    **_both("no token", batch=calls(after=request)),
    "no window": Flood(opening=NO_WINDOW, batch=calls(WRONG, after=request)),
    "unfinished calls": Flood(batch=calls(WRONG)),
    "huge headers": Flood(batch=calls(*[literal(b"x%d" % number, b"y" * 120) for number in range(120)])),
    "ping from everywhere": Flood(batch=always(PINGS), everywhere=True),
    "continuation from everywhere": Flood(opening=UNFINISHED, batch=always(FIELDS), everywhere=True),
    "wrong token from everywhere": Flood(batch=calls(WRONG, after=request), everywhere=True),
    "window updates": Flood(batch=always(frame(WINDOW_UPDATE, 0, 0, ONE) * 2000)),
    "priorities": Flood(batch=always(frame(PRIORITY, 0, 1, bytes(5)) * 2000)),
    "unknown frames": Flood(batch=always(frame(0x42, 0, 0, bytes(1000)) * 30)),
    "empty data": Flood(
        opening=PREFACE + frame(HEADERS, END_HEADERS, 1, head("Describe")), batch=always(frame(DATA, 0, 1) * 2000)
    ),
    "silence": Flood(opening=b"", connections=1500),
    "silence after the preface": Flood(connections=1500),
    "unfinished handshakes": Flood(opening=bytes.fromhex("1603010200010001fc0303"), connections=1500, handshake=False),
    "come and go": Flood(batch=always(b""), once=True, connections=16),
    "garbage": Flood(opening=b"", batch=lambda number: os.urandom(1 << 16), handshake=False),
    "HTTP/1": Flood(opening=b"", batch=always(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n" * 1000)),
    "silent visitors": Flood(opening=b"", connections=1000, port="http"),
    "slow visitors": Flood(opening=b"G", batch=always(b"G"), pause=1.0, connections=1000, port="http"),
    "large visitors": Flood(opening=b"GET /metrics HTTP/1.1\r\n", batch=always(b"X: y\r\n" * 10_000), port="http"),
    **_both("busy visitors", opening=b"GET /metrics HTTP/1.1\r\n\r\n", connections=32, port="http"),
    "visitors of HTTP/2": Flood(batch=always(PINGS), port="http"),
    "silence at the data port": Flood(opening=b"", connections=1000, port="data"),
    "greetings at the data port": Flood(opening=b"", batch=lambda number: greet(), connections=200, port="data"),
    "noise at the data port": Flood(opening=b"", batch=lambda number: os.urandom(1 << 16), port="data"),
}


@contextlib.contextmanager
def attacking(name: str, server: str, *, tls: bool) -> Iterator[None]:
    """Flood ``server`` from a process of its own until the end of the ``with``."""
    with tempfile.TemporaryDirectory(prefix="torch-ps-flood-") as folder:
        log = Path(folder, "log")
        child = Child("tests.hostile.floods:attack", (name, server, tls, next(_strangers)), log)
        try:
            yield
            assert child.wait(0.0) is None, f"the flood has ended by itself:\n{child.output}"
            assert "Traceback" not in child.output, child.output
        finally:
            child.kill()


def attack(name: str, server: str, tls: bool, source: str) -> None:
    """Flood ``server`` from the address ``source`` until this process is killed."""
    asyncio.run(_attack(FLOODS[name], address.parse(server), tls, source))


async def _attack(flood: Flood, where: address.Address, tls: bool, source: str) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT) if tls and flood.handshake else None
    if context is not None:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.set_alpn_protocols(["h2"])
    await asyncio.gather(*(_connections(flood, where, context, source) for _ in range(flood.connections)))


async def _connections(flood: Flood, where: address.Address, context: ssl.SSLContext | None, source: str) -> None:
    """One connection after the other."""
    while True:
        if flood.everywhere:
            source = str(ipaddress.ip_address(EVERYWHERE + random.getrandbits(22)))
        with contextlib.suppress(OSError):
            reader, writer = await asyncio.open_connection(*where, ssl=context, local_addr=(source, 0))
            try:
                await _send(flood, reader, writer)
            finally:
                writer.transport.abort()
        await asyncio.sleep(BETWEEN)


async def _send(flood: Flood, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Send until the server closes the connection."""
    writer.write(flood.opening)
    reading = asyncio.create_task(_read(reader)) if flood.reads else None
    try:
        if flood.batch is None:
            await (reading or asyncio.Event().wait())
            return
        for number in count():
            writer.write(flood.batch(number))
            await writer.drain()
            await asyncio.sleep(flood.pause)
            if flood.once:
                return
    finally:
        if reading is not None:
            reading.cancel()


async def _read(reader: asyncio.StreamReader) -> None:
    while await reader.read(1 << 16):
        pass
