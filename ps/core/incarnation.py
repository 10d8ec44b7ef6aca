"""Incarnation: the joint start of all servers of a job that a call belongs to, and the process in each shard's place.

    the lead starts with number X --> every shard enters once --> a worker comes: the places are closed
    a shard that starts alone after that is refused: the state of its place is lost
    the lead starts alone with number Y: it refuses shards of X, which end; workers of X wait for all shards of Y

Rules of this file
  1. All servers of a job belong to one incarnation, named by a number that the lead brings. Every call that could
     change something names its incarnation, and a call of another one is refused: no update reaches some shards only.
  2. A process enters before it listens. Until the first worker comes nothing can be lost, and another process may take
     the place of a shard; after that, only the process that has it.
  3. Every process that has entered may speak for its shard: one that enters beside the real one takes nothing from it.
  4. A standby that goes on from the exact state of a shard keeps its number and does not enter. It is *continued*.
"""

from torch_ps.common.errors import ConfigError, ProtocolError, Refused, Restarted

TOGETHER = (
    "start all servers together with --resume: workers that live on go on from the checkpoint; "
    "where there is none, start the workers anew too"
)

#: Processes that may enter as one shard before the first worker comes.
MAX_ENTERED = 64


class Incarnation:
    """One start of all servers of a job, as one of them knows it.

    Args:
        number: name of the incarnation, > 0.
        shard: number of this process's shard, from 0; 0 is the lead.
        num_shards: number of shards of the job.
        continued: whether this process goes on from the exact state of the one that had its place.
    """

    def __init__(self, number: int, shard: int, num_shards: int, *, continued: bool = False) -> None:
        self.number = number
        self._shard, self._num_shards = shard, num_shards
        #: On the lead, digests of the secrets of the processes that have entered as other shards, in order.
        self.digests: dict[int, list[str]] = {}
        self._closed = continued

    def check(self, number: int, who: str) -> None:
        """Refuse a call of another incarnation.

        Args:
            number: incarnation that the call names.
            who: caller, for the message.

        Raises:
            Restarted: the call names another incarnation.
        """
        if number != self.number:
            raise Restarted(f"{who} is of another start of the servers than shard {self._shard}; {TOGETHER}")

    def close(self) -> None:
        """Close the places: a worker takes part."""
        self._closed = True

    def enter(self, shard: int, num_shards: int, digest: str) -> None:
        """Give a process the place of a shard, on the lead. A repeat changes nothing.

        Args:
            digest: digest of the secret of the process, which names it.

        Raises:
            ProtocolError: this is not the lead.
            ConfigError: there is no such shard.
            Refused: the places are closed, and another process had this one; or too many have entered.
        """
        if self._shard:
            raise ProtocolError(f"shard {self._shard} is not the lead; ask shard 0")
        if num_shards != self._num_shards or not 0 < shard < num_shards:
            raise ConfigError(
                f"shard {shard} of {num_shards} cannot take part: the lead's job has {self._num_shards} shard"
                f"{'' if self._num_shards == 1 else 's'}; give all servers the same number"
            )
        entered = self.digests.get(shard, [])
        if self._closed and entered[-1:] != [digest]:
            raise Refused(
                f"shard {shard} cannot start alone: the job has begun with another process in its place, and what that "
                f"one has trained is not here; {TOGETHER}"
            )
        if digest not in entered and len(entered) >= MAX_ENTERED:
            raise Refused(
                f"{len(entered)} processes have entered as shard {shard} and no worker has come yet; start all servers "
                "together anew"
            )
        self.digests[shard] = [*(each for each in entered if each != digest), digest]
