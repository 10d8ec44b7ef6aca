"""Strangers: connections of which no call has been accepted yet, and how long such a connection may stay open.

    accepted by gRPC --a call is accepted--> no stranger any more
                     --too many bytes, calls refused, seconds, or strangers--> closed

gRPC handles HTTP/2 before anybody can look at a token, and buffers what it has to answer. So what bounds a peer without
the token is what its connection may send before a call of it is accepted. ``stranger_watch.py`` measures and closes.

Rules of this file
  1. No clock and no I/O: callers pass ``now`` in seconds, and what they have measured.
  2. Among many it is the oldest of the host with the most that has to go: a newcomer with the token needs only a
     moment, and one host does not close the connections of another.
"""

from collections import defaultdict, deque
from dataclasses import dataclass

#: Bytes that a connection may send before a call of it is accepted: TLS, the metadata of a call, its first window.
MAX_BYTES = 256 << 10
#: Calls of one connection that may be refused before one is accepted.
MAX_REFUSED = 8
#: Seconds from the acceptance of a connection to that of a call.
MAX_SECONDS = 20.0
#: Number of strangers, and of those from one host.
MAX_STRANGERS, MAX_STRANGERS_OF_HOST = 128, 64


@dataclass(slots=True)
class Stranger:
    """A connection as it was measured last.

    Attributes:
        host: Address of the peer without the port.
        since: When it was first seen, in seconds.
        bytes: Number of bytes that have arrived from it.
        refused: Number of its calls that were refused.
    """

    host: str
    since: float
    bytes: int = 0
    refused: int = 0


def excessive(strangers: list[Stranger], now: float) -> list[tuple[Stranger, str]]:
    """Those that have to be closed, each with the reason.

    Args:
        strangers: All strangers, in the order in which they came.
        now: Time in seconds.
    """
    closed, of_host = list[tuple[Stranger, str]](), defaultdict[str, deque[Stranger]](deque)
    for each in strangers:
        if reason := _reason(each, now):
            closed.append((each, reason))
        else:
            of_host[each.host].append(each)
    for queue in of_host.values():
        while (num := len(queue)) > MAX_STRANGERS_OF_HOST:
            closed.append((queue.popleft(), f"its host has {num} of them; {MAX_STRANGERS_OF_HOST} are the limit"))
    while (num := sum(map(len, of_host.values()))) > MAX_STRANGERS:
        longest = max(of_host.values(), key=len)
        closed.append((longest.popleft(), f"there are {num} of them; {MAX_STRANGERS} are the limit"))
    return closed


def _reason(stranger: Stranger, now: float) -> str:
    if stranger.bytes > MAX_BYTES:
        return f"it has sent {stranger.bytes} bytes; {MAX_BYTES} are the limit"
    if stranger.refused > MAX_REFUSED:
        return f"{stranger.refused} calls of it were refused; {MAX_REFUSED} are the limit"
    if now - stranger.since > MAX_SECONDS:
        return f"it is {now - stranger.since:.0f} s old; {MAX_SECONDS:g} s are the limit"
    return ""
