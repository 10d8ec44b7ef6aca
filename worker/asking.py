"""Asks for samples that survive the lead: what an answer that got lost had given comes again.

    ask, with what has come so far --> lead --> Portion: counted here
        its server is gone --> (the stream finds the next one) --> the same ask again, there

Source: a request that can be repeated needs to say what the caller has; see ``Ask.have`` in ``ps/core/data.py``.
"""

import time

from torch_ps.common.errors import NotServing, Unreachable, WaitTimeout
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.worker.voter import Voter

#: Seconds between two tries.
RETRY_SECONDS = 0.1
#: Seconds, beyond the lease, in which another server of the lead has to take over.
TAKE_OVER_SECONDS = 10.0


class Asking:
    """What one life of a worker has been given."""

    def __init__(self) -> None:
        self._have: dict[bytes, int] = {}  # by data set

    def clear(self) -> None:
        """A new life has nothing."""
        self._have = {}

    def ask(self, request: pb.DataRequest, lead: Voter, seconds: float, lease: float) -> pb.DataReply:
        """Ask, and again where another server may answer.

        Raises:
            UnknownWorker: this life is over.
            WaitTimeout: nothing within ``seconds``; says who has what is left.
            Unreachable: no server of the lead answers.
        """
        key = request.data.SerializeToString(deterministic=True)
        deadline, gone = time.monotonic() + seconds, 0.0
        while True:
            request.have = self._have.get(key, 0)
            several, left = len(lead.servers) > 1, max(deadline - time.monotonic(), 0.1)
            try:
                reply = lead.link.data(request, min(left, lease) if several else left)
            except WaitTimeout:
                if not several or time.monotonic() > deadline - RETRY_SECONDS:
                    raise
            except (Unreachable, NotServing):
                gone = gone or time.monotonic()
                if not several or time.monotonic() > min(deadline, gone + lease + TAKE_OVER_SECONDS):
                    raise
                time.sleep(RETRY_SECONDS)
            else:
                self._have[key] = request.have + sum(r.stop - r.start for r in reply.range)
                return reply
