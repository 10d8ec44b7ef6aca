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
KILL_PRIMARY, KILL_STANDBY = "SIGKILL primary", "SIGKILL standby"
STOP_PRIMARY, STOP_STANDBY = "SIGSTOP primary", "SIGSTOP standby"

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
    KILL_PRIMARY: (4, 0.0, 0.0),
    KILL_STANDBY: (1, 0.0, 0.0),
    STOP_PRIMARY: (1, 0.1 * LEASE, 1.8 * LEASE),
    STOP_STANDBY: (1, 0.1 * LEASE, 1.8 * LEASE),
}
#: Of a shard without a standby: the job has to go back to its checkpoint.
SINGLE = {KILL_SHARD, KILL_LEAD}
#: Of a shard with one: the job goes on. One of them at a time, for two servers of a shard are too many to lose.
PAIRED = {KILL_PRIMARY, KILL_STANDBY, STOP_PRIMARY, STOP_STANDBY}
FATAL = {KILL_PRIMARY, KILL_STANDBY}


@dataclass(frozen=True, slots=True)
class Setting:
    """How one job is run. ``standbys``: every shard has one. ``data_sets``: the samples are those of so many."""

    mode: str
    standbys: bool
    num_shards: int
    data_sets: int
    plane: str
    batch_size: int
    checkpoint_every: int


@dataclass(frozen=True, slots=True)
class Fault:
    """``victim``: number of a worker, or of a shard; one more than there are shards is all of them."""

    kind: str
    victim: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Round:
    """Faults that begin together, ``pause`` seconds after the job was well."""

    pause: float
    faults: tuple[Fault, ...]


Drawn = tuple[Setting, Iterator[Round]]


def draw(seed: int, number: int, *, num_shards: int = 0, data_sets: int = 1) -> Drawn:
    """The setting and the endless faults of the ``number``-th job of a run with ``seed``.

    Args:
        num_shards: shards of each job; 0 draws their number.
        data_sets: data sets into which the samples are cut, trained on one after the other, as by a loop that makes one
            for each epoch.
    """
    chance = random.Random(f"{seed}/{number}")
    drawn_shards = 2 if chance.random() < 0.7 else 1
    setting = Setting(
        mode=("sync", "async")[(seed + number) % 2],
        standbys=(seed + number) // 2 % 2 == 1,
        num_shards=num_shards or drawn_shards,
        data_sets=data_sets,
        plane=chance.choice(["memory", "network"]),
        batch_size=chance.choice([2, 4]),
        checkpoint_every=chance.choice([10, 25]),
    )
    return setting, _rounds(chance, setting)


def _rounds(chance: random.Random, setting: Setting) -> Iterator[Round]:
    without = (SINGLE if setting.standbys else PAIRED) | (set() if setting.num_shards > 1 else {KILL_SHARD})
    kinds = [kind for kind in KINDS if kind not in without]
    weights = [KINDS[kind][0] for kind in kinds]
    while True:
        found: dict[str, Fault] = {}
        for kind in chance.choices(kinds, weights, k=chance.choice([1, 1, 2])):
            _, least, most = KINDS[kind]
            if kind in PAIRED and PAIRED & found.keys():
                continue
            found[kind] = Fault(kind, chance.randrange(NUM_WORKERS), round(chance.uniform(least, most), 3))
        yield Round(round(chance.uniform(0.05, 1.0), 3), tuple(found.values()))
