"""Turns what gRPC's C++ core writes to stderr into lines of our log, in words, throttled.

    C++ core --fd 2--> pipe --> thread --handshake failed, HTTP/2 refused--> log, at most some lines in a while
                                       --anything else---------------------> the real stderr, as it is

gRPC does not tell Python why a handshake failed, or what it has refused of a peer; it prints the reason, once per
connection, so that a client that keeps trying fills the disk. The line does not name the client either; a firewall's
log does.

Rules of this file
  1. Only lines that a peer causes are held back, and they are counted: every other line passes unchanged, and Python's
     own stderr is untouched.
  2. ``faulthandler`` reports a crash of the process past the pipe.

Source: dup2(2).
"""

import faulthandler
import logging
import os
import re
import sys
import threading
import time

from torch_ps.ps.observability.log_throttle import LogThrottle

log = logging.getLogger("torch_ps.ps")

#: Longest text of gRPC's that is passed on.
_MOST_TEXT = 200
_FAILED = re.compile(rb"ssl_transport_security\S* Handshake failed with .*?: (?:error:[0-9a-f]+:)?(.*)")
#: Of the files of gRPC's core that read what a peer sends.
_REFUSED = re.compile(rb"(?:hpack|frame|chttp2|http2|parsing)_?\w*\.cc:\d+\] (.*)")
#: Marks in gRPC's line, and what they mean at a server's port.
_MEANINGS = (
    ("WRONG_VERSION_NUMBER", "the peer does not speak TLS: a client without tls_ca, or something that is no client"),
    ("HTTP_REQUEST", "the peer speaks HTTP without TLS"),
    ("PEER_DID_NOT_RETURN_A_CERTIFICATE", "the client showed no certificate, and this server has tls_ca"),
    ("BAD_PACKET_LENGTH", "the peer broke off: a client that does not trust this server's certificate does"),
    ("certificate has expired", "the peer's certificate has expired"),
    ("certificate is not yet valid", "the peer's certificate is not valid yet; compare the clocks"),
    ("unable to get local issuer certificate", "the peer's certificate is not of an authority in tls_ca"),
    ("self signed certificate", "the peer's certificate is not of an authority in tls_ca"),
    ("self-signed certificate", "the peer's certificate is not of an authority in tls_ca"),
)
_WORDS = tuple({words for _, words in _MEANINGS})
#: Most lines of one meaning in ten seconds.
_LINES = 5


def meaning(line: bytes) -> str | None:
    """What a line says that a peer has caused, in words; None for any other line."""
    if (found := _FAILED.search(line)) is not None:
        text = _text(found[1])
        return "a TLS handshake failed: " + next((words for mark, words in _MEANINGS if mark in text), text)
    if (found := _REFUSED.search(line)) is not None:
        return f"a peer has sent what is no call, and gRPC has refused it: {_text(found[1])}"
    return None


def _text(line: bytes) -> str:
    text = line.decode("ascii", "replace").strip()
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)[:_MOST_TEXT]


def listen() -> None:
    """Take over file descriptor 2 for the rest of this process. Call it before setting up the log and loading gRPC."""
    if os.environ.get("GRPC_VERBOSITY") == "ERROR":  # by the launcher, for itself; then there is nothing to read
        del os.environ["GRPC_VERBOSITY"]
    real = os.dup(2)
    reading, writing = os.pipe()
    os.dup2(writing, 2)
    os.close(writing)
    sys.stderr = os.fdopen(os.dup(real), "w", buffering=1, encoding="utf-8", errors="backslashreplace")
    faulthandler.enable(real)
    threading.Thread(target=_pass_on, args=(reading, real), name="native log", daemon=True).start()


def _pass_on(reading: int, real: int) -> None:
    # One for each meaning, so that a peer who repeats one mistake does not hide another one.
    throttles: dict[str, LogThrottle] = {}
    with os.fdopen(reading, "rb") as lines:
        for line in lines:
            reason = meaning(line)
            if reason is None:
                os.write(real, line)
                continue
            known = reason if reason.endswith(_WORDS) else ""
            kept = throttles.setdefault(known, LogThrottle(_LINES)).admit(time.monotonic())
            if kept is not None:
                log.warning("%s%s", reason, f" ({kept} more since the last line)" if kept else "")
