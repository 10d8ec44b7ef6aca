"""The trace of one shard; on the lead also the collector of all other processes' parts, which writes the file.

    worker, other shard --TracePart--> the lead: take() --quiet for a moment--> FILE, again whenever more has come

Rules of this file
  1. Nothing waits for a trace: a process sends its part when its traced steps are over, and the file is always whole,
     with the parts that have come so far.
  2. The numbers of spans of one part, of spans of all parts together, and of parts are bounded.
"""

import asyncio
import logging
import os
import socket
from collections.abc import Awaitable, Callable

from torch_ps.common.daemon_thread import to_daemon_thread
from torch_ps.common.errors import CorruptFrame, Overloaded, ProtocolError
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.trace import Span, Trace, spans_of
from torch_ps.ps.observability.perfetto import Process, summary, write

log = logging.getLogger("torch_ps.ps")

#: Seconds between two checks; spans are sent or written when none were added from one to the next.
LOOK_SECONDS = 0.25
#: Seconds that a stopping lead waits for the parts of other shards.
LAST_SECONDS = 1.0
#: Seconds in which the file has to be written.
WRITE_SECONDS = 60.0
#: Largest number of spans of all processes together.
MOST_TOGETHER = 1_000_000

#: Largest number of processes; workers that have left stay in the file.
MOST_PROCESSES = 4096

#: Sends all spans of this shard to the lead; returns False if it could not be reached.
Send = Callable[[Trace], Awaitable[bool]]


class ShardTrace(Trace):
    """The trace of one shard.

    Args:
        steps: Steps that are traced.
        path: File that the lead writes; "" elsewhere.
        shards: Number of other shards, whose parts the lead gets.
        send: Sends the part of another shard to the lead; None on the lead.
    """

    def __init__(self, steps: range = range(0), path: str = "", shards: int = 0, send: Send | None = None) -> None:
        super().__init__(steps)
        self._path, self._send = path, send
        self._others = {f"shard {index}" for index in range(1, shards + 1)}
        self._processes: dict[str, Process] = {}  # by name; those that have sent their part
        self._taken, self._done = 0, (0, 0)  # parts so far, and what was given last
        self._changed = asyncio.Event()

    def take(self, request: pb.TraceRequest) -> None:
        """Lead: keep the part of one process, in place of the one it sent before.

        Raises:
            ProtocolError: Nothing is traced.
            CorruptFrame: The part cannot be read, or a span is of a step that is not traced.
            Overloaded: There are too many spans, or parts, already.
        """
        if not self._path:
            raise ProtocolError("this shard collects no trace; ps-serve --trace FILE does")
        key = f"worker {request.worker}" if request.worker else f"shard {request.shard}"
        part = request.part
        others = sum(len(each.spans) for name, each in self._processes.items() if name != key)
        if others + len(part.span) > MOST_TOGETHER:
            raise Overloaded(f"{others} spans are here already and {MOST_TOGETHER} are the most; trace fewer steps")
        if key not in self._processes and len(self._processes) >= MOST_PROCESSES:
            raise Overloaded(f"{MOST_PROCESSES} processes have sent their parts of the trace, and no more may")
        spans = tuple(spans_of(part))
        if strange := {span.step for span in spans}.difference(self.steps):
            raise CorruptFrame(f"{key} has sent a span of step {min(strange)}, which is not traced")
        name = f"{key} ({part.host}, pid {part.pid})"
        self._processes[key] = Process(name, request.worker, spans, part.error, part.dropped)
        self._taken += 1
        self._changed.set()

    async def keep(self) -> None:
        """Send or write the spans whenever no more have come for a moment, until cancelled."""
        seen = self._now
        while self.steps:
            await asyncio.sleep(LOOK_SECONDS)
            before, seen = seen, self._now
            if seen == before != self._done and await self._give():
                self._done = seen

    @property
    def _now(self) -> tuple[int, int]:
        """Numbers of own spans and of parts taken: they change when there is more to send or write."""
        return len(self.spans), self._taken

    async def finish(self) -> None:
        """Send or write the rest when the shard stops."""
        if self._path:
            try:
                async with asyncio.timeout(LAST_SECONDS if self.spans else 0.0):
                    while not self._others <= set(self._processes):
                        self._changed.clear()
                        await self._changed.wait()
            except TimeoutError:
                pass
        if self._now != self._done or (self._send is not None and self.steps):  # the lead may wait for it
            await self._give()
        elif self._path and not self._taken:
            log.warning("no worker has come to step %d, so there is no trace in %s", self.steps.start, self._path)

    async def _give(self) -> bool:
        if self._send is not None:
            return await self._send(self)
        spans: tuple[Span, ...] = tuple(self.spans)
        own = Process(f"shard 0 ({socket.gethostname()}, pid {os.getpid()})", "", spans, dropped=self.dropped)
        processes = [own, *self._processes.values()]
        try:
            async with asyncio.timeout(WRITE_SECONDS):
                await to_daemon_thread(write, self._path, processes, name="trace")
        except OSError as error:
            why = error.strerror or str(error) or f"the disk has not taken it within {WRITE_SECONDS:g} s"
            log.error("the trace cannot be written to %s: %s", self._path, why)
            return True  # another attempt would fail too
        log.info(
            "trace of steps %d to %d in %s, of %d workers and %d shards; https://ui.perfetto.dev opens it",
            self.steps.start,
            self.steps.stop - 1,
            self._path,
            sum(bool(each.worker) for each in processes),
            sum(not each.worker for each in processes),
        )
        for each in processes:
            if told := each.worker and summary(each):
                log.info("trace of worker %s: %s", each.worker, told)
        if dropped := sum(each.dropped for each in processes):
            log.warning("%d spans were too many for the trace; trace fewer steps", dropped)
        return True
