"""Sends the spans that a worker has traced to the lead, in the lead's time.

The session's spans are push, encode, send and wait, and for each answer receive, decode and write; the parts of a
training step are those of ``worker/optim/step_trace.py``.
"""

import logging

from torch_ps.common.errors import PsError
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.trace import TRIPS, RoundTrip, Trace, clock, clock_name, estimate_offset
from torch_ps.worker.session.identity import Identity
from torch_ps.worker.transport.link import Link

log = logging.getLogger("torch_ps.worker")

#: Seconds in which the lead has to take a part of the trace.
UPLOAD_SECONDS = 10.0


def upload_trace(trace: Trace, lead: Link, who: Identity) -> None:
    """Send all spans so far. Never raises: a trace that a server does not take is lost, and the log says so."""
    request = pb.TraceRequest(worker=who.worker, session=who.session, secret=who.secret, incarnation=who.incarnation)
    try:
        offset, error = _measure_clock(lead, request)
        request.part.CopyFrom(trace.part(offset, error))
        trace.given = len(request.part.span)
        lead.trace(request, UPLOAD_SECONDS)
    except PsError as failure:
        log.warning("the trace of worker %s is lost: %s", who.worker, failure)


def _measure_clock(lead: Link, request: pb.TraceRequest) -> tuple[int, int]:
    """Nanoseconds by which the lead's clock is ahead of this one's, and by which that may be wrong."""
    trips = []
    for _ in range(TRIPS):
        sent = clock()
        reply = lead.trace(request, UPLOAD_SECONDS)
        if reply.clock and reply.clock == clock_name():
            return 0, 0
        trips.append(RoundTrip(sent, reply.now, clock()))
    return estimate_offset(trips)
