"""Strangers: connections of which no call has been accepted yet, and how long such a connection may stay open.

    accepted by gRPC --a call is accepted--> no stranger any more
                     --too many bytes, calls refused, seconds, or strangers--> closed

gRPC handles HTTP/2 before anybody can look at a token, and buffers what it has to answer. So what bounds a peer without
the token is what its connection may send before a call of it is accepted. ``stranger_watch.py`` measures and closes.

A host that goes on like this with new connections is banned for a while, as closing them costs the server more than the
host. Where it comes from many hosts nobody can connect for a while; connections with an accepted call go on.

Rules of this file
  1. No clock and no I/O: callers pass ``now`` in seconds, and what they have measured.
  2. Among many it is the oldest of the host with the most that has to go: a newcomer with the token needs only a
     moment, and one host does not close the connections of another.
"""

import heapq
from collections import defaultdict, deque
from dataclasses import dataclass

#: Bytes that a connection may send before a call of it is accepted: TLS, the metadata of a call, its first window.
MAX_BYTES = 256 << 10
#: Calls of one connection that may be refused before one is accepted.
MAX_REFUSED = 8
#: Seconds from the acceptance of a connection to that of a call.
MAX_SECONDS = 20.0
#: Number of strangers, and of those from one host.
MAX_STRANGERS, MAX_STRANGERS_OF_HOST = 256, 128
#: A host is banned for so many seconds when so many of its connections have sent too much, or calls that were refused,
#: within ``MAX_SECONDS``. Each ban is twice as long as the one before, up to the longest, which is forgotten after as
#: long without another one. At most ``MAX_BANNED`` are remembered, the latest.
BAN_SECONDS, LONGEST_BAN_SECONDS, MAX_ABUSES, MAX_BANNED = 2.0, 60.0, 4, 512
#: The same for all hosts together but those that have been banned lately, within ``CLOSED_SECONDS``; the port is then
#: closed for as long.
MAX_ABUSES_OF_ALL, CLOSED_SECONDS = 10, 10.0
#: Bytes of such connections of all hosts but the one that has sent most. After more the port is closed at once, until
#: the memory that they took is free again.
MAX_BYTES_OF_ALL, SHORT_SECONDS = 16 << 20, 2.5
#: What is banned when everybody is.
EVERYBODY = "everybody"


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

    @property
    def abusive(self) -> bool:
        """Whether it has sent more than a peer with the token ever does."""
        return self.bytes > MAX_BYTES or self.refused > MAX_REFUSED


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
    most = [(-len(queue), number, queue) for number, queue in enumerate(of_host.values())]
    heapq.heapify(most)
    for num in range(sum(map(len, of_host.values())), MAX_STRANGERS, -1):
        left, number, queue = most[0]
        closed.append((queue.popleft(), f"there are {num} of them; {MAX_STRANGERS} are the limit"))
        heapq.heapreplace(most, (left + 1, number, queue))
    return closed


class Bans:
    """Hosts that may not connect for a while, as their strangers had to be closed again and again."""

    def __init__(self) -> None:
        self._abuses: dict[str, list[float]] = {}  # by host: times within MAX_SECONDS
        self._bans: dict[str, tuple[float, float]] = {}  # by host: when it ends, and its length; the latest last
        self._latest = deque[tuple[float, str, int]](maxlen=MAX_ABUSES_OF_ALL)  # time, host, bytes
        self._closed_until = float("-inf")

    def note(self, host: str, now: float, num_bytes: int = 0) -> None:
        """Count a connection of ``host`` that was closed because of the ``num_bytes`` or calls that it had sent."""
        until, length = self._bans.get(host, (now, 0.0))
        if until > now:
            return  # it had others open
        if not length:
            self._latest.append((now, host, num_bytes))
        if seconds := self._seconds_to_close(now):
            self._closed_until = now + seconds
            self._latest.clear()
        times = [each for each in self._abuses.pop(host, []) if now - each <= MAX_SECONDS] + [now]
        if len(times) < MAX_ABUSES:
            self._abuses[host] = times
        else:
            length = min(max(2 * length, BAN_SECONDS), LONGEST_BAN_SECONDS)
            self._bans.pop(host, None)
            self._bans[host] = now + length, length

    def _seconds_to_close(self, now: float) -> float:
        """Seconds to close the port for, as so much has come from several hosts that to ban each would be too late."""
        recent, of_host = 0, defaultdict[str, int](int)
        for then, host, num_bytes in self._latest:
            if now - then <= CLOSED_SECONDS:
                recent += 1
                of_host[host] += num_bytes
        most = max(of_host.values(), default=0)
        if recent == MAX_ABUSES_OF_ALL:
            return CLOSED_SECONDS
        return SHORT_SECONDS if sum(of_host.values()) - most > MAX_BYTES_OF_ALL else 0.0

    def banned(self, now: float) -> frozenset[str]:
        """Hosts that are banned at ``now``; ``EVERYBODY`` is one of them while the port is closed."""
        self._abuses = {host: times for host, times in self._abuses.items() if now - times[-1] <= MAX_SECONDS}
        kept = [each for each in self._bans.items() if now - each[1][0] <= LONGEST_BAN_SECONDS]
        self._bans = dict(kept[-MAX_BANNED:])
        banned = frozenset(host for host, (until, _) in self._bans.items() if until > now)
        return banned | (frozenset((EVERYBODY,)) if now < self._closed_until else frozenset())


def _reason(stranger: Stranger, now: float) -> str:
    if stranger.abusive:
        return (
            f"it has sent {stranger.bytes} bytes, and {stranger.refused} calls that were refused; {MAX_BYTES} and "
            f"{MAX_REFUSED} are the limits"
        )
    if now - stranger.since > MAX_SECONDS:
        return f"it is {now - stranger.since:.0f} s old; {MAX_SECONDS:g} s are the limit"
    return ""
