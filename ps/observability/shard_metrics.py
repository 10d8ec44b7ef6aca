"""Prometheus counters, gauges and histograms of a shard. Names end in their unit; counters start at 0 with the process.

Rows per worker, and what is computed when somebody asks: ``ps/job/worker_metrics.py``.

Source: https://prometheus.io/docs/practices/naming/
"""

import logging

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from torch_ps.ps.core.lr_stability import Reading

log = logging.getLogger("torch_ps.ps")


class Metrics:
    """The metrics of one shard, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)  # CPU, memory, open files, under Prometheus' own names
        self.info = Gauge(
            "ps_info",
            "1, with what this shard is",
            ["shard", "shards", "mode", "version"],
            registry=self.registry,
        )
        self.connected = Gauge("ps_connected_workers", "workers with an open stream", registry=self.registry)
        self.roster = Gauge("ps_roster_workers", "workers that a synchronous step waits for", registry=self.registry)
        self.epoch = Gauge("ps_roster_epoch", "changes of the roster so far", registry=self.registry)
        self.version = Gauge("ps_version", "optimizer steps that every bucket here has had", registry=self.registry)
        self.lost = Counter(
            "ps_lost_workers",
            "workers dropped because they were silent for longer than their lease; lead",
            registry=self.registry,
        )
        self.lease = Gauge("ps_lease_seconds", "silence after which a worker is dropped", registry=self.registry)
        self.samples = Gauge(
            "ps_absorbed_samples", "sum of all weights that the first bucket here has absorbed", registry=self.registry
        )
        self.queued = Gauge("ps_queued_buckets", "buckets with work that is not done", registry=self.registry)
        self.apply_threads = Gauge("ps_apply_threads", "threads that apply gradients", registry=self.registry)
        self.steps = Counter("ps_bucket_steps", "optimizer steps, counted per bucket", registry=self.registry)
        self.pushed = Counter(
            "ps_pushed_bytes",
            "encoded gradients received, also those that no push has named, and written weights",
            registry=self.registry,
        )
        self.pulled = Counter("ps_pulled_bytes", "encoded parameters sent", registry=self.registry)
        self.late = Counter(
            "ps_late_pushes",
            "pushed buckets dropped: their step was over, or they were too stale",
            registry=self.registry,
        )
        self.nonfinite = Counter(
            "ps_nonfinite_gradients",
            "pushes and buckets left out: not finite",
            registry=self.registry,
        )
        self.refused = Counter("ps_refused_calls", "calls answered with an error", ["error"], registry=self.registry)
        self.strangers = Counter(
            "ps_closed_strangers",
            "connections closed because no call of them had been accepted",
            registry=self.registry,
        )
        self.staleness = Histogram(
            "ps_staleness_versions",
            "version at apply - base, per pushed bucket",
            buckets=(0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64),
            registry=self.registry,
        )
        self.curvature = Gauge(
            "ps_curvature_loss_per_squared_parameter",
            "largest curvature of the loss along the path, by the last look at it; lead, SGD on stale gradients",
            registry=self.registry,
        )
        self.rate_ratio = Gauge(
            "ps_learning_rate_limit_ratio",
            "learning rate over the largest that is stable at that curvature, staleness and momentum",
            registry=self.registry,
        )
        self.step_seconds = Histogram(
            "ps_bucket_step_seconds",
            "time on the executor to average, apply and encode one bucket",
            buckets=(1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1),
            registry=self.registry,
        )

        self.checkpoint_version = Gauge(
            "ps_checkpoint_version",
            "last good checkpoint (lead), last part written (others)",
            registry=self.registry,
        )
        self.checkpoint_failures = Counter(
            "ps_checkpoint_failures", "checkpoints that could not be written", registry=self.registry
        )
        self.checkpoint_seconds = Histogram(
            "ps_checkpoint_write_seconds",
            "time beside training to write this shard's part of a checkpoint",
            buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300),
            registry=self.registry,
        )
        self.copy_seconds = Histogram(
            "ps_checkpoint_copy_seconds",
            "time that a bucket's lane was held up to copy it for a checkpoint",
            buckets=(1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1),
            registry=self.registry,
        )

        self.term = Gauge(
            "ps_term",
            "number of the term that this server serves in, or follows; 0: no standby yet",
            registry=self.registry,
        )
        self.serving = Gauge(
            "ps_serving", "1: this server serves its shard; 0: it is a standby", registry=self.registry
        )
        self.lag_records = Gauge(
            "ps_standby_lag_records", "records that the standby has not said to have", registry=self.registry
        )
        self.lag_seconds = Gauge(
            "ps_standby_lag_seconds", "time that the oldest answer waits for the standby", registry=self.registry
        )

    def stability(self, reading: Reading) -> None:
        """Show a reading of the divergence monitor. May be called on any thread."""
        self.curvature.set(reading.curvature)
        self.rate_ratio.set(reading.ratio)
