"""What the check for divergence costs: seconds to apply a push with and without it, interleaved, on the same store.

    python bench/divergence.py [--pushes 6000]

Three sizes: 10,000 parameters, one bucket of 4 MiB, and four of them. A job spends 50 parts of 51 of its time *between
looks*; *during a look* is the rest, and the first 1024 versions. What is timed is what the server does for one push of
one worker under SGD: the engine's hook, decode, average, step. A push as a worker sees it takes 10 to 20 times longer.
"""

import statistics
import time
from collections import defaultdict

import click
import torch

from torch_ps.common import codecs
from torch_ps.common.optimizer_spec import Hyper
from torch_ps.common.plan import plan
from torch_ps.common.schema import Group, Model, TensorSpec
from torch_ps.ps.core.effects import Apply, Contribution
from torch_ps.ps.engine import divergence_monitor
from torch_ps.ps.engine.divergence_monitor import DivergenceMonitor
from torch_ps.ps.engine.parameter_store import Gradient, Store

WORKERS = 8
BUCKET = (1 << 20) - 64
SIZES = {"10,000 parameters": 10_000, "one 4 MiB bucket": BUCKET, "four 4 MiB buckets": 4 * BUCKET}
NEVER = 1 << 60


class Shard:
    """A store under SGD with two divergence monitors: one that checks every push, one that checks none."""

    def __init__(self, size: int) -> None:
        self.hyper: Hyper = {"lr": 1e-3, "momentum": 0.0}
        model = Model("SGD", (Group((TensorSpec("x", (size,)),), self.hyper),), ())
        self.buckets = plan(model, 4 << 20, 1).buckets
        self.store = Store(model, self.buckets)
        self._payloads = {b.index: memoryview(torch.randn(b.numel).numpy().tobytes()) for b in self.buckets}
        divergence_monitor.FIRST_LOOK = NEVER
        self.looking = self._monitor()
        divergence_monitor.FIRST_LOOK = 1
        self.resting = self._monitor()
        for version in range(2 * WORKERS):
            for bucket in self.buckets:
                self._apply(self.resting, bucket.index, version)
        divergence_monitor.FIRST_LOOK = NEVER
        self.resting._begin = NEVER
        self.version = 0

    def _monitor(self) -> DivergenceMonitor:
        return DivergenceMonitor(
            self.buckets, scaled=False, num_workers=lambda: WORKERS, advise=click.echo, report=lambda reading: None
        )

    def _apply(self, monitor: DivergenceMonitor | None, bucket: int, version: int) -> None:
        """Apply a push as the engine does."""
        decision = self._decision(bucket, version)
        mean, _ = self.store.mean(bucket, (self._gradient(bucket),))
        if mean is None:
            raise SystemExit("the gradient has no weight")
        if monitor is not None and (observe := monitor.observer(bucket, decision, self.hyper)):
            observe(mean.values, self.store.values(bucket), ())
        self.store.step(bucket, mean, self.hyper)

    def _decision(self, bucket: int, version: int) -> Apply:
        stale = min(version, WORKERS - 1)
        return Apply(bucket, version + 1, (Contribution(f"w{version % WORKERS}", 1, 0, 1.0, stale),), "")

    def _gradient(self, bucket: int) -> Gradient:
        return Gradient("w0", 0, 1.0, codecs.codec("none"), self._payloads[bucket])

    def push(self, kind: str) -> float:
        """Push once. Returns seconds."""
        monitor = {"none": None, "resting": self.resting, "looking": self.looking}[kind]
        if monitor is not self.looking:  # it has to see every version, but not on this clock
            for bucket in self.buckets:
                watch = self.looking.observer(bucket.index, self._decision(bucket.index, self.version), self.hyper)
                if watch is not None:
                    mean, _ = self.store.mean(bucket.index, (self._gradient(bucket.index),))
                    watch(mean.values if mean is not None else torch.zeros(0), self.store.values(bucket.index), ())
        begin = time.perf_counter()
        for bucket in self.buckets:
            self._apply(monitor, bucket.index, self.version)
        seconds = time.perf_counter() - begin
        self.version += 1
        return seconds


@click.command()
@click.option("--pushes", default=6000, show_default=True, help="Of the small model; the large ones get fewer.")
@click.option("--quick", is_flag=True, help="30 pushes of the small model, to see that it works.")
def main(pushes: int, quick: bool) -> None:
    torch.set_num_threads(1)
    for name, size in list(SIZES.items())[: 1 if quick else None]:
        shard = Shard(size)
        seconds = defaultdict(list)
        for number in range(30 if quick else max(pushes * 100_000 // max(size, 100_000), 300)):
            kind = ("none", "resting", "looking")[number % 3]
            seconds[kind].append(shard.push(kind))
        median = {kind: statistics.median(values) for kind, values in seconds.items()}
        look, rest = (median[kind] / median["none"] - 1 for kind in ("looking", "resting"))
        mean = (divergence_monitor.PAUSE * rest + look) / (divergence_monitor.PAUSE + 1)
        click.echo(
            f"{name}: {median['none'] * 1e6:.0f} us a push; between looks {100 * rest:+.2f} %, "
            f"during one {100 * look:+.1f} %, so {100 * mean:+.2f} % in all"
        )


if __name__ == "__main__":
    main()
