"""Spans of time in the traced steps of one process, and the offset between the clocks of two hosts.

    with trace.span("encode", step, bucket): ...        no effect unless that step is traced
    trace --part()--> TracePart --> the lead, which collects those of all processes

Rules of this file
  1. A trace holds at most ``MOST`` spans; further ones are counted and dropped.
  2. Times are those of CLOCK_MONOTONIC, in nanoseconds. All processes of one host read the same clock. The offset to
     another host's clock is estimated from the fastest of several round trips: the other clock was read half-way
     through it, with an error of at most half its duration.

Source: Mills, RFC 5905, sections 8 and 10 (the clock filter takes the sample of least delay); time_namespaces(7).
"""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from torch_ps.common.errors import CorruptFrame
from torch_ps.common.pb import parameter_server_pb2 as pb

#: Most spans of one process; a message with so many takes a few of the 5 MiB that a message may have.
MOST = 50_000
#: Most names in a part.
MOST_WORDS = 4096
#: Round trips per estimate of another host's clock.
TRIPS = 12
#: Most characters of a name in a trace.
LONGEST_NAME = 200

#: Reads the clock.
clock = time.monotonic_ns
NOTHING = contextlib.nullcontext()  # the context of a step that is not traced


class Span(NamedTuple):
    """One activity or one wait.

    Attributes:
        name: kind of activity, such as "encode".
        step: step that it belongs to.
        start, end: clock readings in nanoseconds.
        thread: name of the thread that worked; "" for a wait.
        bucket: number of the bucket; -1 if no single one is meant.
        worker: name of the worker whose push or answer is meant; "" if that is clear or there are several.
    """

    name: str
    step: int
    start: int
    end: int
    thread: str
    bucket: int = -1
    worker: str = ""


class Trace:
    """The spans of one process. Without steps to trace it records nothing and costs next to nothing."""

    def __init__(self, steps: range = range(0)) -> None:
        self.steps = steps
        self.spans: list[Span] = []
        self.dropped = 0
        self.given = 0  # number of spans that have been sent

    def span(
        self, name: str, step: int, bucket: int = -1, worker: str = ""
    ) -> contextlib.AbstractContextManager[object]:
        """Context whose duration on the calling thread becomes a span, if ``step`` is traced."""
        return _Open(self, name, step, bucket, worker) if step in self.steps else NOTHING

    def add(self, span: Span) -> None:
        """Record a span if its step is traced and the trace is not full. Any thread may call it."""
        if span.step not in self.steps:
            return
        if len(self.spans) < MOST:
            self.spans.append(span)
        else:
            self.dropped += 1

    def held(self, worker: str, step: int, bucket: int, since: float) -> None:
        """Record that a push was held from ``since``, in seconds of ``time.monotonic()``, until now."""
        if step in self.steps:
            self.add(Span("held", step, int(since * 1e9), clock(), "", bucket, worker))

    def part(self, ahead: int = 0, error: int = 0) -> pb.TracePart:
        """All spans so far as a message.

        Args:
            ahead: nanoseconds by which the lead's clock is ahead of this one.
            error: largest error of ``ahead`` in nanoseconds.
        """
        spans, words = tuple(self.spans), dict[str, int]()

        def word(text: str) -> int:
            return words.setdefault(text[:LONGEST_NAME], len(words))

        part = pb.TracePart(host=socket.gethostname()[:LONGEST_NAME], pid=os.getpid(), error=error)
        part.dropped = self.dropped
        for span in spans:
            part.span.add(
                name=word(span.name),
                thread=word(span.thread),
                worker=word(span.worker),
                step=span.step,
                bucket=span.bucket + 1,
                start=span.start + ahead,
                duration=span.end - span.start,
            )
        part.word.extend(words)
        return part


class _Open:
    """A span that has not ended; a class with slots, as there are thousands per second."""

    __slots__ = ("_about", "_start", "_trace")

    def __init__(self, trace: Trace, name: str, step: int, bucket: int, worker: str) -> None:
        self._trace, self._about = trace, (name, step, bucket, worker)

    def __enter__(self) -> None:
        self._start = clock()

    def __exit__(self, *error: object) -> None:
        name, step, bucket, worker = self._about
        thread = threading.current_thread().name
        self._trace.add(Span(name, step, self._start, clock(), thread, bucket, worker))


def steps_to_proto(steps: range) -> pb.TraceSteps | None:
    return pb.TraceSteps(first=steps.start, stop=steps.stop) if steps else None


def steps_of(message: pb.TraceSteps) -> range:
    """The steps that a job traces; none if the message is absent."""
    return range(message.first, message.stop)


def spans_of(part: pb.TracePart) -> Iterable[Span]:
    """The spans of a part that came over the wire.

    Raises:
        CorruptFrame: the part has too many spans or names, or a span has the number of a name that does not exist.
    """
    words = list(part.word)
    if len(part.span) > MOST or len(words) > MOST_WORDS or any(len(word) > LONGEST_NAME for word in words):
        raise CorruptFrame(
            f"a part of a trace has {len(part.span)} spans with {len(words)} names; at most {MOST} with {MOST_WORDS} "
            f"names of {LONGEST_NAME} characters are allowed"
        )
    for each in part.span:
        if max(each.name, each.thread, each.worker) >= len(words):
            raise CorruptFrame(f"a span has a name of number {max(each.name, each.thread, each.worker)}: there is none")
        yield Span(
            words[each.name],
            each.step,
            each.start,
            each.start + each.duration,
            words[each.thread],
            each.bucket - 1,
            words[each.worker],
        )


def clock_name() -> str:
    """Name of the clock that this process reads; processes with equal names read one clock. "" if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/time')}"
    except OSError:
        return ""


class RoundTrip(NamedTuple):
    """One reading of another host's clock, ``theirs``, between two of this one, in nanoseconds."""

    sent: int
    theirs: int
    received: int


def estimate_offset(trips: Iterable[RoundTrip]) -> tuple[int, int]:
    """Nanoseconds by which the other clock is ahead of this one, and the largest error of that."""
    best = min(trips, key=lambda trip: trip.received - trip.sent)
    return best.theirs - (best.sent + best.received) // 2, (best.received - best.sent + 1) // 2
