"""Which samples the pushes of one session cover: per data set, how many it has begun so far, ever.

begin(set, n) --> taken() goes into a push --> nothing is pending until more are begun
"""

from collections import Counter

from torch_ps.common.pb import parameter_server_pb2 as pb


class Covers:
    def __init__(self) -> None:
        self._begun: Counter[int] = Counter()
        self._pushed: dict[int, int] = {}

    def begin(self, number: int, samples: int) -> None:
        """Samples of data set ``number`` were handed to the training loop."""
        self._begun[number] += samples

    def taken(self) -> list[pb.Covers]:
        """What a push that leaves now says."""
        self._pushed = dict(self._begun)
        return [pb.Covers(number=number, samples=samples) for number, samples in self._pushed.items()]

    def pending(self, number: int) -> bool:
        """Whether samples were begun that no push has covered."""
        return self._begun[number] != self._pushed.get(number, 0)

    @property
    def any(self) -> bool:
        """Whether this session has begun samples of any data set."""
        return bool(self._begun)

    def clear(self) -> None:
        """A new session has begun nothing."""
        self._begun.clear()
        self._pushed.clear()
