"""Writes a trace as the file that ui.perfetto.dev and chrome://tracing open, and sums it up in a line per worker.

    processes  workers and shards, those first that compute
    threads    what each thread did, nested
    arrows     push --> receive --> encode --> receive, of one worker's bucket
    held       from the arrival of a push until its step could be made

Source: "Trace Event Format", https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

import gzip
import itertools
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO, cast

from torch_ps.common.trace import Span

#: Names of threads in the trace.
_WORKER_THREADS, _SHARD_THREADS = {"MainThread": "training loop"}, {"MainThread": "event loop"}
#: Parts of a worker's step, in order, without gaps.
PARTS = ("data", "forward", "loss", "backward", "loop", "exchange")
#: Spans that an arrow of one push goes through: on the worker, on the shard.
_ON_WORKER, _ON_SHARD = {"send": "s", "receive": "f"}, {"receive": "t", "encode": "t"}


@dataclass(frozen=True, slots=True)
class Process:
    """One process of a trace.

    Attributes:
        worker: Name of the worker; "" for a shard.
        error: Nanoseconds by which its times may be off.
        dropped: Number of spans beyond the limit, which were dropped.
    """

    name: str
    worker: str
    spans: Sequence[Span]
    error: int = 0
    dropped: int = 0

    @property
    def sort_key(self) -> tuple[bool, str]:
        return not self.worker, self.name


def write(path: str, processes: Iterable[Process]) -> None:
    """Write the file, whole or not at all; compressed if its name ends in .gz.

    Raises:
        OSError: The file cannot be written.
    """
    processes = sorted(processes, key=lambda each: each.sort_key)
    part = f"{path}.part"
    with cast(TextIO, (gzip.open if path.endswith(".gz") else open)(part, "wt", encoding="utf-8")) as file:
        file.write('{"displayTimeUnit": "ms", "traceEvents": [\n')
        for number, event in enumerate(events(processes)):
            file.write((",\n" if number else "") + json.dumps(event))
        file.write(f'\n], "otherData": {json.dumps(_facts(processes))}}}\n')
    os.replace(part, path)


def _facts(processes: Sequence[Process]) -> dict[str, Any]:
    return {
        "program": "torch-ps",
        "steps": sorted({span.step for process in processes for span in process.spans}),
        "clock_error_us": {process.name: process.error / 1e3 for process in processes},
        "spans_left_out": sum(process.dropped for process in processes),
    }


def events(processes: Sequence[Process]) -> Iterator[dict[str, Any]]:
    """Every event of the file; times begin at 0 with the first span."""
    zero = min((span.start for process in processes for span in process.spans), default=0)
    numbers = itertools.count(1)
    for pid, process in enumerate(processes, 1):
        yield _named("process_name", pid, 0, process.name)
        yield {"ph": "M", "name": "process_sort_index", "pid": pid, "tid": 0, "args": {"sort_index": pid}}
        threads: dict[str, int] = {}
        names = _WORKER_THREADS if process.worker else _SHARD_THREADS
        # Of two that begin together the longer one is around the other.
        for span in sorted(process.spans, key=lambda span: (span.start, -span.end)):
            if not span.thread:
                yield from _passed(span, pid, next(numbers), zero)
                continue
            if span.thread not in threads:
                threads[span.thread] = len(threads) + 1
                yield _named("thread_name", pid, threads[span.thread], names.get(span.thread, span.thread))
            yield from _done(process, span, pid, threads[span.thread], zero)


def _named(kind: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"name": name}}


def _done(process: Process, span: Span, pid: int, tid: int, zero: int) -> Iterator[dict[str, Any]]:
    """What a thread did, and the arrow that goes through it."""
    start, end = _microseconds(span, zero)
    place = {"pid": pid, "tid": tid, "ts": start}
    yield {"ph": "X", "name": span.name, "cat": "torch-ps", **place, "dur": end - start, "args": _about(span)}
    arrow = (_ON_WORKER if process.worker else _ON_SHARD).get(span.name)
    if arrow is not None and span.bucket >= 0:
        one = f"{process.worker or span.worker} {span.step} {span.bucket}"
        yield {"ph": arrow, "name": "bucket", "cat": "bucket", "id": one, "bp": "e", **place}


def _passed(span: Span, pid: int, number: int, zero: int) -> Iterator[dict[str, Any]]:
    one = {"name": f"{span.name}: {span.worker}", "cat": span.name, "id": number, "pid": pid, "tid": 0}
    start, end = _microseconds(span, zero)
    yield {"ph": "b", **one, "ts": start, "args": _about(span)}
    yield {"ph": "e", **one, "ts": end}


def _microseconds(span: Span, zero: int) -> tuple[int, int]:
    """Start and end in whole ones: fractions do not add up in every reader, and what touches would overlap."""
    return round((span.start - zero) / 1e3), round((span.end - zero) / 1e3)


def _about(span: Span) -> dict[str, Any]:
    about: dict[str, Any] = {"step": span.step}
    if span.bucket >= 0:
        about["bucket"] = span.bucket
    if span.worker:
        about["worker"] = span.worker
    return about


def summary(process: Process) -> str:
    """Where the time of a worker's steps went; "" if there is no whole one."""
    steps = [span.end - span.start for span in process.spans if span.name == "step"]
    if not steps:
        return ""
    parts = seconds_of(process.spans)
    shares = ", ".join(f"{name} {parts[name] / sum(parts.values()):.0%}" for name in PARTS if name in parts)
    return f"{sum(steps) / len(steps) / 1e6:.3g} ms a step: {shares}"


def seconds_of(spans: Iterable[Span]) -> Mapping[str, float]:
    """Seconds of the parts of all steps together."""
    found: defaultdict[str, float] = defaultdict(float)
    for span in spans:
        if span.name in PARTS:
            found[span.name] += (span.end - span.start) / 1e9
    return found
