"""State of one shard at one version, with which a new engine continues exactly where the old one was. No files here.

    engine --each bucket's lane, right after the step--> Cutter.take() --all buckets--> ShardState --> checkpointer
    ShardState --restore()--> engine

A bucket's tensors have these keys:

    values        parameters, fp32 (numel,)
    state/NAME, counter/NAME, has_state     of the optimizer; ``bucket_optimizer.py`` describes them
    squares       of delay compensation, fp32 (numel,)
    copy/WORKER   what a worker with lossy pulls has, fp32 (numel,)

Rules of this file
  1. ``Cutter.take`` runs on the bucket's lane and copies; training waits for that copy and for nothing else.
  2. A copy of a cut that was given up is dropped when the next cut begins.

Memory: one copy of parameters, optimizer state and copies, from a cut until it is written.
"""

import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from torch_ps.common.codecs.pulled_copies import Copies
from torch_ps.common.plan import Bucket
from torch_ps.ps.engine.engine import Engine
from torch_ps.ps.observability.shard_metrics import Metrics
from torch_ps.ps.transport.streams import Stream, Streams

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class BucketState:
    """One bucket: its ``record`` (see ``Ledger.as_dict``) and copies of its tensors."""

    record: Mapping[str, Any]
    tensors: Tensors


@dataclass(frozen=True, slots=True)
class ShardState:
    """All buckets of one shard at ``version``, by index; ``counters`` are for ``ps-status``."""

    version: int
    buckets: dict[int, BucketState]
    counters: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Kept:
    """Outcome of one shard's part of a checkpoint: size in bytes and SHA-256 of its manifest, or the error."""

    shard: int
    version: int
    size: int
    sha256: str
    error: str


#: Reports to the lead what has become of this shard's part, waiting at most so many seconds, and for a lead that cannot
#: be reached only if the last argument is True; False: no answer.
ReportKept = Callable[[Kept, float, bool], Awaitable[bool]]


@dataclass(slots=True)
class CheckpointFacts:
    """State of a shard's checkpoints for ``ps-status``; ``written`` is on ``time.monotonic()``, 0: none yet."""

    url: str
    version: int
    written: float = 0.0
    failures: int = 0
    error: str = ""


class Cutter:
    """Copies the buckets of ``engine`` as they pass a cut.

    Args:
        engine: Engine of the shard.
        streams: Open streams, whose copies belong to the state.
        metrics: Metrics of the shard.
        on_state: Called on an apply thread with each complete state.
        on_failed: Called on an apply thread with a version of which a bucket could not be copied, and the exception.
    """

    def __init__(
        self,
        engine: Engine,
        streams: Streams,
        metrics: Metrics,
        on_state: Callable[[ShardState], None],
        on_failed: Callable[[int, Exception], None],
    ) -> None:
        self._engine, self._streams, self._on_state, self._on_failed = engine, streams, on_state, on_failed
        self._metrics, self._lock = metrics, threading.Lock()
        self._version, self._taken = 0, dict[int, BucketState]()

    def take(self, bucket: Bucket, record: Mapping[str, Any]) -> None:
        """Copy one bucket that has just reached the version of ``record``. Cost: a copy of its tensors.

        It only reads: whatever fails here costs that checkpoint, and training goes on.
        """
        version = int(record["version"])
        try:
            self._take(bucket, version, record)
        except Exception as error:  # noqa: BLE001 - as above
            self._on_failed(version, error)

    def _take(self, bucket: Bucket, version: int, record: Mapping[str, Any]) -> None:
        begin = time.perf_counter()
        part = BucketState(record, self._tensors(bucket))
        self._metrics.copy_seconds.observe(time.perf_counter() - begin)
        with self._lock:
            if version != self._version:
                self._version, self._taken = version, {}
            self._taken[bucket.index] = part
            if len(self._taken) < len(self._engine.buckets):
                return
            state = ShardState(version, self._taken, self._counters())
            self._version, self._taken = 0, {}
        self._on_state(state)

    def at_rest(self) -> ShardState | None:
        """State of an idle shard; None: a lane has work, or buckets differ in version."""
        engine = self._engine
        if engine.queued or len(set(engine.core.versions)) != 1:
            return None
        # No workers' copies: those are of after the responses, a cut has those of before. Returning workers pull all.
        pairs = zip(engine.buckets, engine.core.records(), strict=True)
        parts = {b.index: BucketState(record, self._tensors(b, copies=False)) for b, record in pairs}
        return ShardState(engine.core.open_step, parts, self._counters())

    def _tensors(self, bucket: Bucket, *, copies: bool = True) -> Tensors:
        return tensors_of(self._engine, bucket, self._streams if copies else ())

    def _counters(self) -> dict[str, Any]:
        engine = self._engine
        return {"late": engine.late, "nonfinite": engine.nonfinite, "staleness": sorted(engine.staleness.items())}


def tensors_of(engine: Engine, bucket: Bucket, streams: Iterable[Stream]) -> Tensors:
    """Copies of all tensors of one bucket, with the values that the workers of ``streams`` hold. Runs on its lane."""
    tensors, compensator = engine.store.export(bucket.index), engine.compensator
    if compensator is not None and (squares := compensator.squares(bucket.index)) is not None:
        tensors["squares"] = squares.to("cpu", copy=True)
    for stream in streams if bucket.rule == "optimizer" else ():
        if stream.worker is not None and (copy := stream.copies.get(bucket.index)) is not None:
            tensors[f"copy/{stream.worker}"] = copy.clone()
    return tensors


def restore_bucket(engine: Engine, bucket: Bucket, version: int, tensors: Tensors) -> dict[str, torch.Tensor]:
    """Restore one bucket from ``tensors``; returns the values that workers hold, by their names."""
    with engine.store.changing(bucket.index, version):
        engine.store.restore(bucket.index, tensors)
    if engine.compensator is not None and "squares" in tensors:
        engine.compensator.restore(bucket.index, tensors["squares"].to(engine.store.device))
    return {key.partition("/")[2]: each.clone() for key, each in tensors.items() if key.startswith("copy/")}


def restore(engine: Engine, state: ShardState) -> dict[str, Copies]:
    """Bring a fresh ``engine``, before its first roster, to ``state``.

    Returns:
        Values that workers with lossy pulls hold, by name.

    Raises:
        KeyError, TypeError, ValueError: a record is not one of a ledger.
    """
    buckets = engine.buckets
    engine.core.restore([state.buckets[bucket.index].record for bucket in buckets])
    found: dict[str, dict[int, torch.Tensor]] = {}
    for bucket in buckets:
        copies = restore_bucket(engine, bucket, state.version, state.buckets[bucket.index].tensors)
        for worker, copy in copies.items():
            found.setdefault(worker, {})[bucket.index] = copy
    engine.late = int(state.counters.get("late", 0))
    engine.nonfinite = int(state.counters.get("nonfinite", 0))
    engine.staleness.update({int(k): int(n) for k, n in state.counters.get("staleness", ())})
    return {worker: Copies(copies) for worker, copies in found.items()}
