"""Limits on what peers choose: how many there are, how often they ask, how much one model may need.

    Rate          so many events a second for each host, after a first burst
    check_model   memory and buckets that a model would take

Rules of this file
  1. No clock: ``now`` comes in, in seconds. What is remembered of peers is bounded, whoever they are.
  2. A limit says its number and, where a user can turn it, the option that does.

Source: the leaky bucket as a meter, ITU-T I.371, for ``Rate``.
"""

import os
from collections import OrderedDict

from torch_ps.common.errors import Overloaded, Refused
from torch_ps.common.schema import Model

#: Joins of one host: as many at once as a host may start workers, then so many a second.
JOIN_BURST, JOINS_PER_SECOND = 128, 4.0
#: Streams of observers, which may pull and no more.
MAX_OBSERVERS = 32
#: Pulls of one observer that are not answered or whose answer it has not read; then it is not read from.
OBSERVER_PULLS = 2
#: Bytes of answers beyond twice the shard's parameters that wait for one worker; then its stream ends.
WORKER_BYTES = 64 << 20
#: Rosters that wait for one watcher.
MAX_ROSTERS = 1024
#: Buckets of a whole model, each of which costs a few kilobytes on every shard: 512 GiB of parameters at 4 MiB.
MAX_BUCKETS = 1 << 17
#: Hosts that a ``Rate`` remembers.
MAX_HOSTS = 4096
#: fp32 values of state for each parameter, the most that any hyperparameters make of the optimizer.
STATE = {"SGD": 1, "Adagrad": 1, "ASGD": 1, "Adam": 3, "AdamW": 3, "RMSprop": 3}
_STATE_OF_OTHERS = 2


class Rate:
    """At most ``burst`` events at once of one host, and ``per_second`` in the long run."""

    def __init__(self, burst: int, per_second: float) -> None:
        self._burst, self._per_second = burst, per_second
        self._level: OrderedDict[str, tuple[float, float]] = OrderedDict()  # host: events in the bucket, at that time

    def take(self, host: str, now: float) -> None:
        """Count one event.

        Raises:
            Overloaded: the host has had its share; says when the next one is free.
        """
        level, then = self._level.pop(host, (0.0, now))
        level = max(0.0, level - (now - then) * self._per_second)
        free = level + 1 <= self._burst
        self._level[host] = (level + 1 if free else level, now)
        while len(self._level) > MAX_HOSTS:
            self._level.popitem(last=False)
        if not free:
            raise Overloaded(
                f"{host} has joined {self._burst} times in a row; {self._per_second:g} a second are taken from one host"
            )


def machine_memory() -> int:
    """Bytes of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_model(model: Model, *, num_shards: int, bucket_bytes: int, most_bytes: int) -> None:
    """Refuse a model that this shard would have no room for, before anything is built for it.

    Args:
        most_bytes: for parameters and optimizer state of one shard.

    Raises:
        Refused: names the sizes and the option.
    """
    elements = sum(tensor.numel for tensor in model.tensors())
    copies = 1 + STATE.get(model.optimizer, _STATE_OF_OTHERS)
    needed = 4 * elements * copies // num_shards
    if needed > most_bytes:
        raise Refused(
            f"the model has {elements} elements; parameters and {model.optimizer} state would take up to "
            f"{needed / 2**30:.2f} GiB on each of {num_shards} shards, and {most_bytes / 2**30:.2f} GiB is the limit; "
            "start more shards, or raise --max-model"
        )
    buckets = elements // (bucket_bytes // 4) + len(model.groups) + 1
    if buckets > MAX_BUCKETS:
        raise Refused(
            f"the model has {elements} elements in {len(model.groups)} groups, at least {buckets} buckets of "
            f"{bucket_bytes} bytes; {MAX_BUCKETS} are the limit; raise --bucket-size"
        )
