"""Metrics computed at scrape time: the figures of ``ps-status`` as gauges and counters.

    GET /metrics --> refresh() --event loop--> StatusReporter --> gauges, and one row per worker

Rules of this file
  1. Nothing is computed between scrapes. If the event loop does not answer within ``LOOP_SECONDS``, the figures stay.
  2. A worker that has left has no row.
"""

import asyncio
import time
from collections.abc import Callable, Iterable
from concurrent.futures import CancelledError
from importlib import metadata

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.ps.job.settings import JobSettings
from torch_ps.ps.job.status import StatusReporter
from torch_ps.ps.observability.shard_metrics import Metrics

#: Seconds that a scrape waits for the event loop.
LOOP_SECONDS = 2.0

_GAUGES: dict[str, tuple[str, Callable[[pb.WorkerStatus], float]]] = {
    "ps_worker_connected": ("1: the worker has a stream to this shard", lambda w: w.connected),
    "ps_worker_clock": ("steps that the worker has finished on this shard", lambda w: w.clock),
    "ps_worker_waiting_seconds": (
        "time that its oldest call has waited; 0: none",
        lambda w: w.waiting_seconds,
    ),
    "ps_worker_staleness_versions": ("version at apply - base, of its last applied push", lambda w: w.staleness),
}
_LEAD_GAUGES: dict[str, tuple[str, Callable[[pb.WorkerStatus], float]]] = {
    "ps_worker_silent_seconds": ("time since anything came from the worker; lead", lambda w: w.silent_seconds),
}
_COUNTERS: dict[str, tuple[str, Callable[[pb.WorkerStatus], float]]] = {
    "ps_worker_samples": ("weights of its pushes, of this shard's first bucket", lambda w: w.samples),
    "ps_worker_pushed_bytes": ("encoded gradients of the worker", lambda w: w.bytes_pushed),
    "ps_worker_pulled_bytes": ("encoded parameters sent to the worker", lambda w: w.bytes_pulled),
}


class Workers(Collector):
    """One row per worker of one shard.

    Attributes:
        rows: Workers as of the last refresh, in rank order.
        lead: Whether the shard is the lead, which alone knows how long a worker has been silent.
    """

    def __init__(self) -> None:
        self.rows: tuple[pb.WorkerStatus, ...] = ()
        self.lead = False

    def collect(self) -> Iterable[Metric]:
        rows = self.rows
        for name, (help, value) in {**_GAUGES, **(_LEAD_GAUGES if self.lead else {})}.items():
            gauge = GaugeMetricFamily(name, help, labels=["worker"])
            for row in rows:
                gauge.add_metric([row.worker], value(row))
            yield gauge
        for name, (help, value) in _COUNTERS.items():
            counter = CounterMetricFamily(name, help, labels=["worker"])
            for row in rows:
                counter.add_metric([row.worker], value(row))
            yield counter


def register_metrics(metrics: Metrics, settings: JobSettings, reporter: StatusReporter) -> Callable[[], None]:
    """Register the scrape-time metrics of a shard.

    Returns:
        A function that brings them up to date; it blocks and may be called on any thread but the event loop's.
    """
    workers, loop = Workers(), asyncio.get_running_loop()
    workers.lead = settings.index == 0
    metrics.registry.register(workers)
    metrics.info.labels(str(settings.index), str(settings.num_shards), settings.mode.name, _version()).set(1)
    metrics.lease.set(settings.lease)
    metrics.apply_threads.set(settings.apply_threads)

    async def look() -> None:
        reply = reporter.reply(time.monotonic())
        workers.rows = tuple(reply.worker)
        metrics.samples.set(reply.samples)
        metrics.version.set(reply.version)
        metrics.queued.set(reply.load.queued)
        records, seconds = reporter.replication.lag()
        metrics.lag_records.set(records)
        metrics.lag_seconds.set(seconds)
        metrics.term.set(reporter.seat.configuration.term.number)
        metrics.serving.set(not reporter.replication.closed)

    def refresh() -> None:
        looking = look()
        try:
            asyncio.run_coroutine_threadsafe(looking, loop).result(LOOP_SECONDS)
        except (TimeoutError, CancelledError):
            pass  # /health says that the loop does not run
        except RuntimeError:  # the loop has ended
            looking.close()

    return refresh


def _version() -> str:
    try:
        return metadata.version("torch-ps")
    except metadata.PackageNotFoundError:
        return "source tree"
