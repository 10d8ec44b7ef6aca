"""Which start of the servers a call is of, and on the lead, which process has the place of each shard.

    the lead starts: number X --> every shard enters once, and is of X --> a worker comes: the places are closed
    a shard that starts alone after that has lost what it was: it is refused
    the lead starts alone: number Y; shards of X are refused by it and end, workers of X wait for all of Y

Rules of this file
  1. All servers of a job are of one incarnation, named by a number that the lead brings. Every call that could change
     something says which it is of, and one of another is refused: so no update reaches some shards only.
  2. A process enters before it listens. Until the first worker comes nothing can be lost, and another process may still
     take the place of a shard; from then on only the one that is there.
  3. Who goes on from the exact state of a shard goes on with its number, and enters nothing: it is *continued*.
"""

from torch_ps.common.errors import ConfigError, ProtocolError, Refused, Restarted

TOGETHER = (
    "start all servers together with --resume: workers that live on go on from the checkpoint; "
    "where there is none, start the workers anew too"
)


class Incarnation:
    """One start of all servers of a job, as one of them knows it.

    Args:
        number: names it, > 0.
        shard: number of the shard that this process is, below ``num_shards``; 0 is the lead.
        continued: another process had this place, and this one has all that it knew.
    """

    def __init__(self, number: int, shard: int, num_shards: int, *, continued: bool = False) -> None:
        self.number = number
        self._shard, self._num_shards = shard, num_shards
        self._processes: dict[int, int] = {}
        self._closed = continued

    def check(self, number: int, who: str) -> None:
        """Whether a call is of this incarnation.

        Raises:
            Restarted: it is of another.
        """
        if number != self.number:
            raise Restarted(f"{who} is of another start of the servers than shard {self._shard}; {TOGETHER}")

    def close(self) -> None:
        """A worker takes part: from now on no place is free."""
        self._closed = True

    def enter(self, shard: int, num_shards: int, process: int) -> None:
        """Lead: a process takes the place of a shard; to ask again changes nothing.

        Args:
            process: names it.

        Raises:
            ProtocolError: this is not the lead.
            ConfigError: there is no such shard.
            Refused: the shard was there, and what it knew is lost.
        """
        if self._shard:
            raise ProtocolError(f"shard {self._shard} is not the lead; ask shard 0")
        if num_shards != self._num_shards or not 0 < shard < num_shards:
            raise ConfigError(
                f"shard {shard} of {num_shards} cannot take part: the lead's job has {self._num_shards} shard"
                f"{'' if self._num_shards == 1 else 's'}; give all servers the same number"
            )
        if self._closed and self._processes.get(shard) != process:
            raise Refused(
                f"shard {shard} cannot start alone: the job has begun with another process in its place, and what that "
                f"one has trained is not here; {TOGETHER}"
            )
        self._processes[shard] = process
