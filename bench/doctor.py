"""What the check for divergence costs: seconds to apply a push with and without it, interleaved.

    python bench/doctor.py [--rounds 4000]

Three sizes: 10,000 parameters, one bucket of 4 MiB, and four of them. *Between looks* is how a job spends 24 parts of
25 of its time; *during a look* is the rest, and the first 1024 versions. A step is what the server does for one push of
one worker: the engine's hook, decode, average and the SGD step; transport comes on top and makes the share smaller.
"""

import statistics
import time
from collections import defaultdict

import click
import torch

from torch_ps.common import codecs
from torch_ps.common.optim import Hyper
from torch_ps.common.plan import plan
from torch_ps.common.schema import Group, Model, TensorSpec
from torch_ps.ps import doctor as doctors
from torch_ps.ps.core.effects import Apply, Contribution
from torch_ps.ps.doctor import Doctor
from torch_ps.ps.store import Gradient, Store

WORKERS = 8
SIZES = {"10,000 parameters": 10_000, "one 4 MiB bucket": (1 << 20) - 64, "four 4 MiB buckets": 4 * ((1 << 20) - 64)}


class Shard:
    """A store under SGD, and its doctor."""

    def __init__(self, size: int, *, doctor: str) -> None:
        self.hyper: Hyper = {"lr": 1e-3, "momentum": 0.0}
        model = Model("SGD", (Group((TensorSpec("x", (size,)),), self.hyper),), ())
        self.buckets = plan(model, 4 << 20, 1).buckets
        self.store = Store(model, self.buckets)
        self.doctor: Doctor | None = None
        if doctor != "none":
            self.doctor = Doctor(
                self.buckets, scaled=False, num_workers=lambda: WORKERS, advise=print, report=lambda reading: None
            )
        self.version = 0
        plain = codecs.codec("none")
        values = torch.randn(max(bucket.numel for bucket in self.buckets)) * 1e-3
        self.gradients = [
            [Gradient(f"w{i}", 0, 1.0, plain, memoryview((values[: b.numel] * (1 + i)).numpy()).cast("B"))]
            for b in self.buckets
            for i in range(1)
        ]

    def push(self) -> float:
        """Seconds."""
        worker = f"w{self.version % WORKERS}"
        stale = min(self.version, WORKERS - 1)
        applies = [
            Apply(number, self.version + 1, (Contribution(worker, 1, 0, 1.0, stale),), "")
            for number in range(len(self.buckets))
        ]
        begin = time.perf_counter()
        for bucket, apply, gradients in zip(self.buckets, applies, self.gradients, strict=True):
            watch = self.doctor.watch(bucket.index, apply, self.hyper) if self.doctor is not None else None
            self.store.apply(bucket.index, gradients, self.hyper, watch=watch)
        self.version += 1
        return time.perf_counter() - begin


@click.command()
@click.option("--rounds", default=4000, show_default=True, help="Pushes of the small model; the large have fewer.")
def main(rounds: int) -> None:
    torch.set_num_threads(1)
    doctors.PAUSE = 10**6  # after the first look nothing but the pause
    for name, size in SIZES.items():
        count = max(rounds if size < 1e5 else rounds * 500_000 // size, 200)
        doctors.FIRST_LOOK = count
        shards = {kind: Shard(size, doctor=kind) for kind in ("none", "look", "pause")}
        pause = shards["pause"].doctor
        if pause is not None:
            pause._begin = 10**9
            for patient in pause._patients.values():
                patient.calm = 1.0
        seconds = defaultdict(list)
        for _ in range(count):
            for kind, shard in shards.items():
                seconds[kind].append(shard.push())
        median = {kind: statistics.median(values[count // 10 :]) for kind, values in seconds.items()}
        look, idle = (median[kind] / median["none"] - 1 for kind in ("look", "pause"))
        parts = 24
        print(
            f"{name}: {median['none'] * 1e6:.0f} us a push; between looks {100 * idle:+.2f} %, "
            f"during one {100 * look:+.1f} %, so {100 * (parts * idle + look) / (parts + 1):+.2f} % in all"
        )


if __name__ == "__main__":
    main()
