"""What a process does in the steps that are traced, as spans of time, and what its clock is beside another's.

    with trace.span("encode", step, bucket): ...        nothing at all unless that step is traced
    trace --part()--> TracePart --> the lead, which has those of all processes

Rules of this file
  1. A trace holds ``MOST`` spans and no more; what is too much is counted.
  2. Times are of CLOCK_MONOTONIC, in nanoseconds. All processes of one system read the same clock; of another system's
     the offset is estimated: half-way through the quickest of some round trips both clocks were read at once, give or
     take half of that trip.

Source: Mills, RFC 5905, section 8 and 10 (the clock filter takes the sample of least delay); time_namespaces(7).
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

#: Spans of one process; as a message they take a few of the 5 MiB that it may have.
MOST = 50_000
#: Round trips to read another system's clock.
TRIPS = 12
#: Characters of a name in a trace.
LONGEST_NAME = 200

#: Reads the clock.
clock = time.monotonic_ns
NOTHING = contextlib.nullcontext()  # what a span is in a step that is not traced


class Span(NamedTuple):
    """One thing that was done, by one thread unless ``thread`` is ""; then it is a time that passed.

    Attributes:
        start, end: nanoseconds.
        bucket: -1: it is about no single one.
        worker: whose push or answer it is about, "" if that is clear or there are several.
    """

    name: str
    step: int
    start: int
    end: int
    thread: str
    bucket: int = -1
    worker: str = ""


class Trace:
    """The spans of one process. With no steps to trace it records nothing and costs about nothing."""

    def __init__(self, steps: range = range(0)) -> None:
        self.steps = steps
        self.spans: list[Span] = []
        self.dropped = 0
        self.given = 0  # spans that others have been told of

    def span(
        self, name: str, step: int, bucket: int = -1, worker: str = ""
    ) -> contextlib.AbstractContextManager[object]:
        """What the calling thread does inside is one span, if ``step`` is traced."""
        return _Open(self, name, step, bucket, worker) if step in self.steps else NOTHING

    def add(self, span: Span) -> None:
        """Record a span, unless its step is not traced or there are too many already. On any thread."""
        if span.step not in self.steps:
            return
        if len(self.spans) < MOST:
            self.spans.append(span)
        else:
            self.dropped += 1

    def held(self, worker: str, step: int, bucket: int, since: float) -> None:
        """A push was held until now: ``since`` it came, on ``time.monotonic()``."""
        if step in self.steps:
            self.add(Span("held", step, int(since * 1e9), clock(), "", bucket, worker))

    def part(self, ahead: int = 0, error: int = 0) -> pb.TracePart:
        """All spans so far as a message.

        Args:
            ahead: nanoseconds by which the lead's clock is ahead of this one's.
            error: nanoseconds by which that may be wrong.
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
    """A span that has not ended; slots and no generator, for there are thousands a second."""

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
    """The steps that a job traces; none where the message is absent."""
    return range(message.first, message.stop)


def spans_of(part: pb.TracePart) -> Iterable[Span]:
    """The spans of a part that came over the wire.

    Raises:
        CorruptFrame: a span names what the part does not have.
    """
    words = list(part.word)
    if len(part.span) > MOST or len(words) > MOST or any(len(word) > LONGEST_NAME for word in words):
        raise CorruptFrame(f"a part of a trace has {len(part.span)} spans with {len(words)} names; {MOST} are the most")
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
    """Names the clock that this process reads: processes with the same name read the same. "": it has none."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/time')}"
    except OSError:
        return ""


class RoundTrip(NamedTuple):
    """A question for the other's clock: sent and received on one's own, ``theirs`` read in between; nanoseconds."""

    sent: int
    theirs: int
    received: int


def estimate_offset(trips: Iterable[RoundTrip]) -> tuple[int, int]:
    """By how many nanoseconds the other's clock is ahead, and by how many that may be wrong."""
    best = min(trips, key=lambda trip: trip.received - trip.sent)
    return best.theirs - (best.sent + best.received) // 2, (best.received - best.sent + 1) // 2
