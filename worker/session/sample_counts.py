"""Per data set, monotonic counts of the samples that this session received, started and pushed.

received >= started >= pushed

add_received   the lead has given samples to this worker
start          the training loop has got samples
cover          a push leaves: it covers all that was started
finish         the lead has said that the data set is over, so pushes speak of it no more
"""

from collections import defaultdict
from dataclasses import dataclass

from torch_ps.common.pb import parameter_server_pb2 as pb


@dataclass(slots=True)
class _Counts:
    number: int = 0  # of the data set, as the lead counts them; known once samples were received
    received: int = 0
    started: int = 0
    pushed: int = 0


class SampleCounts:
    """The counts of one session. A data set is named by its message on the wire, as bytes.

    Attributes:
        life: grows with every session. Unlike the session's number, it also grows when new servers count sessions anew.
        used: whether this session has started samples of any data set, even if it has given them up since.
    """

    def __init__(self) -> None:
        self.life, self.used = 0, False
        self._counts: defaultdict[bytes, _Counts] = defaultdict(_Counts)
        self._over: dict[bytes, _Counts] = {}

    def received(self, key: bytes) -> int:
        """Samples of a data set that the lead has given to this worker."""
        self._resume(key)
        return self._counts[key].received

    def number(self, key: bytes) -> int | None:
        """Number of a data set that ``received`` counts, as the lead has given it; None: it counts nothing."""
        self._resume(key)
        return self._counts[key].number if key in self._counts else None

    def add_received(self, key: bytes, number: int, samples: int) -> None:
        """Count ``samples`` more of a data set, to which the lead has given ``number``."""
        counts = self._counts[key]
        if counts.received and counts.number != number:  # it was over at the lead, and all of it was settled
            counts = self._counts[key] = _Counts()
        counts.number = number
        counts.received += samples

    def finish(self, key: bytes) -> None:
        """Put the counts of a data set that is over aside, if everything that was started has been pushed.

        The lead goes on counting under the same number where another worker has not ended yet.
        """
        if key in self._counts and not self.pending(key):
            self._over[key] = self._counts.pop(key)

    def _resume(self, key: bytes) -> None:
        """Go on with the counts of a data set of which more is asked for."""
        if key in self._over:
            self._counts[key] = self._over.pop(key)

    def start(self, key: bytes, samples: int) -> None:
        """Count samples that the training loop has got."""
        self._counts[key].started += samples
        self.used = True

    def give_up(self, key: bytes) -> None:
        """Take back what was received and not started, as the loop has stopped reading."""
        counts = self._counts[key]
        counts.received = counts.started

    def give_up_started(self, key: bytes) -> None:
        """Take back what was started as well: the loop reads on without having pushed it."""
        counts = self._counts[key]
        counts.received = counts.started = counts.pushed

    def pushed(self, key: bytes) -> int:
        """Samples of a data set that pushes of this session have covered."""
        return self._counts[key].pushed

    def cover(self) -> list[pb.Covers]:
        """Count all started samples as pushed; returns what the push that leaves now says of them."""
        for counts in self._counts.values():
            counts.pushed = counts.started
        return [pb.Covers(number=c.number, samples=c.started) for c in self._counts.values() if c.started]

    def pending(self, key: bytes) -> bool:
        """Whether samples of a data set were started that no push has covered."""
        return self._counts[key].started != self._counts[key].pushed

    @property
    def any_started(self) -> bool:
        """Whether this session has started samples of any data set and not given them up."""
        return any(counts.started for counts in self._counts.values())

    def clear(self) -> None:
        """Begin a new session, which has received nothing."""
        self.life += 1
        self.used = False
        self._counts.clear()
        self._over.clear()
