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
     Those of one host are bounded, and one that is silent for a lease makes room for the next of its host.
  4. A standby that goes on from the exact state of a shard keeps its number and does not enter. It is *continued*.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch_ps.common.errors import ConfigError, Overloaded, ProtocolError, Refused, Restarted

TOGETHER = (
    "start all servers together with --resume: workers that live on go on from the checkpoint; "
    "where there is none, start the workers anew too"
)

#: Processes that may enter as one shard before the first worker comes: of one host, and in all.
MAX_OF_HOST, MAX_ENTERED = 16, 1024


@dataclass(slots=True)
class _Entered:
    """A process that has entered.

    Attributes:
        host: id of its host.
        heard: time in seconds when it was last heard of.
        streams: number of the streams with which it follows the lead; while there is one, it is not silent.
    """

    host: str = ""
    heard: float = 0.0
    streams: int = 0


class Incarnation:
    """One start of all servers of a job, as one of them knows it.

    Args:
        number: name of the incarnation, > 0.
        shard: number of this process's shard, from 0; 0 is the lead.
        num_shards: number of shards of the job.
        lease: seconds of silence after which a process that has entered makes room for another one.
        continued: whether this process goes on from the exact state of the one that had its place.
    """

    def __init__(self, number: int, shard: int, num_shards: int, *, lease: float, continued: bool = False) -> None:
        self.number = number
        self._shard, self._num_shards, self._lease = shard, num_shards, lease
        self._entered: dict[int, dict[str, _Entered]] = {}  # by shard and digest, in order
        self._closed = continued

    @property
    def digests(self) -> dict[int, list[str]]:
        """On the lead, digests of the secrets of the processes that have entered as other shards, in order."""
        return {shard: list(entered) for shard, entered in self._entered.items()}

    def learn(self, digests: Mapping[int, Iterable[str]]) -> None:
        """Take over the digests of another server, which this one goes on from."""
        self._entered = {shard: {each: _Entered() for each in entered} for shard, entered in digests.items()}

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

    def enter(self, shard: int, num_shards: int, digest: str, host: str, now: float) -> None:
        """Give a process the place of a shard, on the lead. A repeat changes nothing.

        Args:
            digest: digest of the secret of the process, which names it.
            host: id of its host.
            now: time in seconds.

        Raises:
            ProtocolError: this is not the lead.
            ConfigError: there is no such shard.
            Refused: the places are closed, and another process had this one.
            Overloaded: too many have entered and are not silent.
        """
        if self._shard:
            raise ProtocolError(f"shard {self._shard} is not the lead; ask shard 0")
        if num_shards != self._num_shards or not 0 < shard < num_shards:
            raise ConfigError(
                f"shard {shard} of {num_shards} cannot take part: the lead's job has {self._num_shards} shard"
                f"{'' if self._num_shards == 1 else 's'}; give all servers the same number"
            )
        entered = self._entered.get(shard, {})
        if self._closed and next(reversed(entered), None) != digest:
            raise Refused(
                f"shard {shard} cannot start alone: the job has begun with another process in its place, and what that "
                f"one has trained is not here; {TOGETHER}"
            )
        if digest not in entered:
            self._make_room(shard, host, now)
        process = entered.pop(digest, _Entered(host))
        process.heard = now
        self._entered[shard] = entered | {digest: process}

    def follow(self, shard: int, digest: str) -> bool:
        """A process opens a stream with which it follows the lead. Returns whether it has entered."""
        process = self._entered.get(shard, {}).get(digest)
        if process is not None:
            process.streams += 1
        return process is not None

    def unfollow(self, shard: int, digest: str, now: float) -> None:
        """Such a stream has ended at ``now``."""
        process = self._entered[shard][digest]
        process.streams -= 1
        process.heard = now

    def _make_room(self, shard: int, host: str, now: float) -> None:
        """Forget the process that is silent for longest, if there are as many as may enter."""
        entered = self._entered.get(shard, {})
        among = {digest: each for digest, each in entered.items() if each.host == host}
        whose = f" of {host}"
        if len(among) < MAX_OF_HOST:
            if len(entered) < MAX_ENTERED:
                return
            among, whose = entered, ""
        silent = [digest for digest, each in among.items() if not each.streams and now - each.heard > self._lease]
        if not silent:
            raise Overloaded(
                f"{len(among)} processes{whose} have entered as shard {shard} and no worker has come yet; one that is "
                f"silent for {self._lease:g} s makes room"
            )
        del entered[min(silent, key=lambda digest: entered[digest].heard)]
