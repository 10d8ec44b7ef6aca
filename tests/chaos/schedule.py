"""What goes wrong, drawn from a seed: the same seed and number of a job give the same faults in the same order.

    draw(seed, number) --> Setting (how the job is run), Rounds: one or two faults at a time, each of some seconds

Rules of this file
  1. Pure: nothing here starts, kills or waits. When a fault comes in the job's own time is up to the machine.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

#: Seconds of silence after which a worker is dropped.
LEASE = 3.0
#: Of each job.
NUM_WORKERS = 3

KILL_WORKER, KILL_SHARD, KILL_LEAD = "SIGKILL worker", "SIGKILL shard", "SIGKILL lead"
STOP_WORKER, CUT, DELAY, DROP = "SIGSTOP worker", "connection cut", "answers delayed", "answers dropped"
DISK_FULL = "disk full"

#: Room for one more: a primary that has a standby is killed, and its standby goes on within the lease.
#: Kind -> how often, least and most seconds that it lasts. Servers have to be back within the lease.
KINDS: dict[str, tuple[int, float, float]] = {
    KILL_WORKER: (3, 0.0, 1.0),
    KILL_SHARD: (1, 0.0, 0.3),
    KILL_LEAD: (1, 0.0, 0.3),
    STOP_WORKER: (1, 1.2 * LEASE, 1.6 * LEASE),
    CUT: (4, 0.0, 0.2),
    DELAY: (3, 0.1, 0.8 * LEASE),
    DROP: (4, 0.05, 0.5),
    DISK_FULL: (2, 0.2, 1.0),
}


@dataclass(frozen=True, slots=True)
class Setting:
    """How one job is run."""

    mode: str
    num_shards: int
    plane: str
    batch_size: int
    checkpoint_every: int


@dataclass(frozen=True, slots=True)
class Fault:
    """``victim``: number of a worker, where the fault is one worker's."""

    kind: str
    victim: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Round:
    """Faults that begin together, ``pause`` seconds after the job was well."""

    pause: float
    faults: tuple[Fault, ...]


Drawn = tuple[Setting, Iterator[Round]]


def draw(seed: int, number: int) -> Drawn:
    """The setting and the endless faults of the ``number``-th job of a run with ``seed``."""
    chance = random.Random(f"{seed}/{number}")
    setting = Setting(
        mode=("sync", "async")[(seed + number) % 2],
        num_shards=2 if chance.random() < 0.7 else 1,
        plane=chance.choice(["memory", "network"]),
        batch_size=chance.choice([2, 4]),
        checkpoint_every=chance.choice([10, 25]),
    )
    return setting, _rounds(chance, setting)


def _rounds(chance: random.Random, setting: Setting) -> Iterator[Round]:
    kinds = [kind for kind in KINDS if kind != KILL_SHARD or setting.num_shards > 1]
    weights = [KINDS[kind][0] for kind in kinds]
    while True:
        found: dict[str, Fault] = {}
        for kind in chance.choices(kinds, weights, k=chance.choice([1, 1, 2])):
            _, least, most = KINDS[kind]
            found[kind] = Fault(kind, chance.randrange(NUM_WORKERS), round(chance.uniform(least, most), 3))
        yield Round(round(chance.uniform(0.05, 1.0), 3), tuple(found.values()))
