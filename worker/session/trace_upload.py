"""What a worker does in the steps that are traced: how it gets to the lead, and the parts of a training step.

    | data | forward | loss | backward | loop | exchange |    from the end of one ``optimizer.step`` to that of the next

What happens in them (push, encode, send, wait), and on other threads (receive, decode, write), is told by the session.

Rules of this file
  1. The parts of a step touch each other: each begins when the one before ends, so their sum is the step.
  2. The model gets its hooks only where steps are traced, and is without them when these are over.
  3. Time is that of the process: what a GPU still has to compute when the call returns is not in it.

Source: DistributedDataParallel queues a callback for the end of backward in the same way, torch/nn/parallel.
"""

import logging
import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from torch_ps.common.errors import PsError
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.trace import TRIPS, RoundTrip, Span, Trace, clock, clock_name, estimate_offset
from torch_ps.worker.optim.pytree import tensors_in
from torch_ps.worker.session.identity import Identity
from torch_ps.worker.transport.link import Link

if TYPE_CHECKING:
    from torch_ps.worker.session.session import Session

log = logging.getLogger("torch_ps.worker")

#: Seconds in which the lead has to take a part of the trace.
SECONDS = 10.0


def report(trace: Trace, lead: Link, who: Identity) -> None:
    """Send the lead all spans so far, in its time. Never raises for a server that is gone."""
    request = pb.TraceRequest(worker=who.worker, session=who.session, incarnation=who.incarnation)
    try:
        offset, error = _clock_of(lead, request)
        request.part.CopyFrom(trace.part(offset, error))
        trace.given = len(request.part.span)
        lead.trace(request, SECONDS)
    except PsError as failure:
        log.warning("the trace of worker %s is lost: %s", who.worker, failure)


def _clock_of(lead: Link, request: pb.TraceRequest) -> tuple[int, int]:
    """By how many nanoseconds the lead's clock is ahead of this one's, and by how many that may be wrong."""
    trips = []
    for _ in range(TRIPS):
        sent = clock()
        reply = lead.trace(request, SECONDS)
        if reply.clock and reply.clock == clock_name():
            return 0, 0
        trips.append(RoundTrip(sent, reply.now, clock()))
    return estimate_offset(trips)


class StepTrace:
    """The training steps of one worker; a context manager around each ``optimizer.step``.

    Args:
        model: whose forward and backward are told apart; where it is called in parts they are one with what is around.
    """

    def __init__(self, model: nn.Module, session: "Session") -> None:
        self._session, self._trace = session, session.trace
        self._thread = threading.current_thread().name
        self._step = session.next_step
        self._begin = self._last = clock()
        self._handles = [
            model.register_forward_pre_hook(lambda *_: self._mark("data")),
            model.register_forward_hook(self._forward_ended),
        ]

    def __enter__(self) -> None:
        self._mark("loop")

    def __exit__(self, *error: object) -> None:
        self._mark("exchange")
        if self._step in self._trace.steps:
            self._add("step", self._begin)
        self._begin, self._step = self._last, self._session.next_step
        if self._step >= self._trace.steps.stop and self._handles:
            self.close()
            threading.Thread(target=self._session.report, name="trace", daemon=True).start()

    def close(self) -> None:
        """Take the hooks out."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _mark(self, part: str) -> None:
        """What was done since the last mark is ``part``."""
        begin, self._last = self._last, clock()
        if self._step in self._trace.steps:
            self._add(part, begin)

    def _add(self, name: str, begin: int) -> None:
        self._trace.add(Span(name, self._step, begin, self._last, self._thread))

    def _forward_ended(self, _model: nn.Module, _args: Any, output: Any) -> None:
        self._mark("forward")
        if self._step not in self._trace.steps:
            return
        for tensor in tensors_in(output):
            if tensor.requires_grad:
                tensor.register_hook(self._backward_begins)  # type: ignore[no-untyped-call]
                return

    def _backward_begins(self, _gradient: torch.Tensor) -> None:
        self._mark("loss")
        engine = torch.autograd.Variable._execution_engine
        engine.queue_callback(lambda: self._mark("backward"))
