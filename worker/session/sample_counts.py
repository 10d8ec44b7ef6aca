"""Which samples the pushes of one session cover: per data set, counts of its samples, ever.

received >= begun >= pushed        arrived --> received; begin --> begun; taken goes into a push --> pushed
"""

from collections import defaultdict
from dataclasses import dataclass

from torch_ps.common.pb import parameter_server_pb2 as pb


@dataclass(slots=True)
class _Counts:
    number: int = 0  # of the data set, as the lead counts them; known when something has been received
    received: int = 0
    begun: int = 0
    pushed: int = 0


class SampleCounts:
    """A data set is named by its bytes on the wire."""

    def __init__(self) -> None:
        #: Grows with every session; unlike its number also from one that servers of before have given out.
        self.life = 0
        self._sets: defaultdict[bytes, _Counts] = defaultdict(_Counts)

    def received(self, key: bytes) -> int:
        """Samples that answers of the lead held."""
        return self._sets[key].received

    def arrived(self, key: bytes, number: int, samples: int) -> None:
        """An answer of the lead held ``samples`` more of data set ``number``."""
        counts = self._sets[key]
        counts.number = number
        counts.received += samples

    def begin(self, key: bytes, samples: int) -> None:
        """Samples were handed to the training loop."""
        self._sets[key].begun += samples

    def give_up(self, key: bytes, *, gathered: bool) -> None:
        """The loop has stopped reading; what it has begun and not pushed it keeps only if it has ``gathered`` that."""
        counts = self._sets[key]
        counts.received = counts.begun = counts.begun if gathered else counts.pushed

    def taken(self) -> list[pb.Covers]:
        """What a push that leaves now says."""
        for counts in self._sets.values():
            counts.pushed = counts.begun
        return [pb.Covers(number=c.number, samples=c.begun) for c in self._sets.values() if c.begun]

    def pending(self, key: bytes) -> bool:
        """Whether samples were begun that no push has covered."""
        return self._sets[key].begun != self._sets[key].pushed

    @property
    def any(self) -> bool:
        """Whether this session has begun samples of any data set."""
        return any(counts.begun for counts in self._sets.values())

    def clear(self) -> None:
        """A new session has begun nothing."""
        self.life += 1
        self._sets.clear()
