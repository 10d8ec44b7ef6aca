"""Pending requests of workers for samples: the core assigns samples, and a request that has to wait does so here.

    Data --> core.request_samples --> Portion, Idle, Over -----------------------> answered
               ^      --> Later --> waits until something changes --+
               +----------------------------------------------------+

Rules of this file
  1. It decides nothing: the core says which samples a worker gets and whether it has to wait.
  2. Every wait has a deadline, names those it waits for and since when, and is shown by ``ps-status``.
"""

import asyncio
import time
from dataclasses import dataclass

from torch_ps.common.errors import WaitTimeout
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.ps.core.dataset_progress import DatasetSpec
from torch_ps.ps.core.sample_assigner import Idle, Later, Over, Portion, SampleRequest, SampleResponse
from torch_ps.ps.core.shard import Shard


@dataclass(frozen=True, slots=True)
class Waiting:
    """A request without an answer yet; ``since`` is a time on ``time.monotonic()``."""

    since: float
    waiting_for: tuple[str, ...]
    reason: str


class SampleRequests:
    """The requests at one lead. All methods run on the event loop."""

    def __init__(self) -> None:
        #: By worker and session: requests that are not answered yet.
        self.pending: dict[tuple[str, int], Waiting] = {}
        self._changed = asyncio.Event()

    def waiting(self, worker: str, session: int) -> Waiting | None:
        """What this worker waits for; None if it does not wait."""
        return self.pending.get((worker, session))

    def wake(self) -> None:
        """Have every pending request ask the core again, after a push, a change of the roster or another request."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def ask(self, core: Shard, request: pb.DataRequest, seconds: float) -> pb.DataReply:
        """Answer one request, as soon as the core has an answer.

        Raises:
            UnknownWorker: The worker is not in the roster, or has left it meanwhile.
            ProtocolError: A number is out of its range.
            WaitTimeout: There was none within ``seconds``; the message says who has the samples that are left.
        """
        begin = time.monotonic()
        life = request.worker, request.session
        ask = SampleRequest(
            *life,
            data_set(request.data),
            request.batch,
            request.epochs,
            request.received,
            request.together,
            request.number if request.HasField("number") else None,
        )
        mine: Waiting | None = None
        try:
            while True:
                answer = core.request_samples(ask)
                if life not in self.pending or not isinstance(answer, Later):
                    self.wake()  # others may wait for this request, or for samples that it has freed
                if not isinstance(answer, Later):
                    return _reply(answer if request.wait or not isinstance(answer, Idle) else None)
                if not request.wait:
                    return _reply(None)
                left = begin + seconds - time.monotonic()
                if left <= 0:
                    raise WaitTimeout(
                        f"worker {request.worker!r} has waited for samples for {seconds:.1f} s: {answer.reason}"
                    )
                mine = self.pending[life] = Waiting(begin, answer.waiting_for, answer.reason)
                changed = self._changed
                try:
                    await asyncio.wait_for(changed.wait(), left)
                except TimeoutError:
                    continue
        finally:
            if mine is not None and self.pending.get(life) is mine:  # not that of a repeat on another connection
                del self.pending[life]


def data_set(data: pb.DataSet) -> DatasetSpec:
    return DatasetSpec(data.name, data.size, data.seed, data.shuffled)


def _reply(answer: SampleResponse | None) -> pb.DataReply:
    match answer:
        case Portion():
            ranges = [pb.PositionRange(start=start, stop=stop) for start, stop in answer.ranges]
            return pb.DataReply(answer=pb.DataReply.PORTION, number=answer.number, epoch=answer.epoch, range=ranges)
        case Idle():
            return pb.DataReply(answer=pb.DataReply.IDLE)
        case Over():
            return pb.DataReply(answer=pb.DataReply.OVER)
        case _:
            return pb.DataReply(answer=pb.DataReply.LATER)
