"""Workers that ask for samples: the core gives them out, and whoever has to wait for some waits here.

    Data --> core.request_samples --> Portion, Idle, Over -----------------------> answered
               ^      --> Later --> waits until something changes --+
               +----------------------------------------------------+

Rules of this file
  1. Decides nothing: which samples, and whether to wait, is the core's answer.
  2. Every wait has a deadline, says whom it waits for and since when, and is seen in ``ps-status``.
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
    """An ask that is not answered yet; ``since`` is ``time.monotonic()``."""

    since: float
    waiting_for: tuple[str, ...]
    reason: str


class SampleRequests:
    """The asks of one lead. All methods run on the event loop."""

    def __init__(self) -> None:
        #: By worker and session: requests that are not answered yet.
        self.pending: dict[tuple[str, int], Waiting] = {}
        self._changed = asyncio.Event()

    def waiting(self, worker: str, session: int) -> Waiting | None:
        """What this worker waits for, if it does."""
        return self.pending.get((worker, session))

    def wake(self) -> None:
        """Something has changed: a push, the roster, another ask."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def ask(self, core: Shard, request: pb.DataRequest, seconds: float) -> pb.DataReply:
        """Answer one ask, when there is an answer.

        Raises:
            UnknownWorker: not in the roster, or not any more.
            ProtocolError: a number out of its range.
            WaitTimeout: nothing within ``seconds``; says who has what is left.
        """
        begin = time.monotonic()
        life = request.worker, request.session
        ask = SampleRequest(*life, data_set(request.data), request.batch, request.epochs, request.received)
        mine: Waiting | None = None
        try:
            while True:
                answer = core.request_samples(ask)
                if life not in self.pending or not isinstance(answer, Later):
                    self.wake()  # it may be the ask, or have dealt the samples, that others wait for
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
