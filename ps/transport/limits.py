"""Limits on what peers choose: their number, the rate of their calls, the size of a model.

    Rate          bounds events per second of each host, after a first burst
    check_model   bounds memory and buckets of a model
    check_room    compares what a model needs with the memory that is free

Rules of this file
  1. No clock: callers pass ``now`` in seconds. The state that is kept about peers is bounded.
  2. The size of one message is a part of the wire: ``MAX_MESSAGE_BYTES`` in ``common/wire/frames.py``.
  3. The error of a limit names its number and, where one exists, the option that changes it.

Source: the leaky bucket as a meter, ITU-T I.371, for ``Rate``.
"""

from collections import OrderedDict

from torch_ps.common.errors import Overloaded, Refused
from torch_ps.common.memory_limit import Memory
from torch_ps.common.schema import Model

#: Joins of one host: the burst, as many as a host may start workers, then the rate.
JOIN_BURST, JOINS_PER_SECOND = 128, 4.0
#: Largest number of streams of observers, which may only pull.
MAX_OBSERVERS = 32
#: Pulls of one observer whose responses it has not read; at this number its messages are not read.
OBSERVER_PULLS = 2
#: Bytes of responses beyond twice the shard's parameters that may wait for one worker; with more its stream ends.
WORKER_BYTES = 64 << 20
#: Largest number of rosters that wait for one watcher.
MAX_ROSTERS = 1024
#: Buckets of a whole model, each of which costs a few kilobytes on every shard: 512 GiB of parameters at 4 MiB.
MAX_BUCKETS = 1 << 17
#: Number of hosts that a ``Rate`` tracks.
MAX_HOSTS = 4096
#: fp32 values of optimizer state per parameter, with the hyperparameters that need most.
STATE = {"SGD": 1, "Adagrad": 1, "ASGD": 1, "Adam": 3, "AdamW": 3, "RMSprop": 3}
_STATE_OF_OTHERS = 2


class Rate:
    """Admits at most ``burst`` events of one host at once and ``per_second`` in the long run."""

    def __init__(self, burst: int, per_second: float) -> None:
        self._burst, self._per_second = burst, per_second
        self._level: OrderedDict[str, tuple[float, float]] = OrderedDict()  # by host: level, time of it

    def take(self, host: str, now: float) -> None:
        """Count one event.

        Raises:
            Overloaded: the host is above its rate.
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


def check_model(model: Model, *, num_shards: int, bucket_bytes: int, most_bytes: int) -> None:
    """Refuse a model that does not fit into this shard, before anything is allocated for it.

    Args:
        model: Model that a worker describes.
        num_shards: Number of shards of the job.
        bucket_bytes: Largest fp32 size of a bucket.
        most_bytes: Largest size of parameters and optimizer state of one shard.

    Raises:
        Refused: the model is too large; the text names the sizes and the option.
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


def check_room(model: Model, memory: Memory, *, num_shards: int, is_held: bool) -> None:
    """Refuse a worker for whose model, or for one more gradient of it, this process has no memory left.

    The kernel would end the process, and with it the job, where memory is used up.

    Args:
        model: Model that the worker describes.
        memory: Memory of this process now.
        num_shards: Number of shards of the job.
        is_held: Whether the parameters are here already; else there have to be parameters, state and a gradient.

    Raises:
        Refused: there is not enough; the text names the sizes and what limits them.
    """
    elements = sum(tensor.numel for tensor in model.tensors())
    copies = 1 if is_held else 2 + STATE.get(model.optimizer, _STATE_OF_OTHERS)
    needed = 4 * elements * copies // num_shards
    if needed > memory.free:
        what = "a gradient of one more worker" if is_held else f"parameters, {model.optimizer} state and a gradient"
        raise Refused(
            f"the model has {elements} elements; {what} would take up to {needed / 2**30:.2f} GiB on each of "
            f"{num_shards} shards, and {memory.free / 2**30:.2f} GiB are free of the {memory.limit / 2**30:.2f} GiB of "
            f"{memory.place}; give the servers more memory, or start more shards on other machines"
        )
