"""Norms of mean gradients that workers ask for before they push (``ParameterServerOptimizer.clip_grad_norm_``).

    Measure of each bucket --take()--> held --the last one--> core: from whose gradients?
    norm of the mean of each bucket (apply threads) --> Measured, to all who asked

Rules of this file
  1. The core decides whose gradients are in the mean (``ps/core/mean_norms.py``); this file computes it.
  2. A round is computed once. The norms of the last two rounds are kept while their step is open, for lost answers.
  3. Gradients are held from the last Measure to the answer. In shared memory they stay where they are: their worker
     waits for the answer, or ends its stream first.

Memory: two gradients at most for each worker that asks, as far as they came in frames, until it is answered: that of
the question that the core has, and that of one which is not complete and will take its place.
"""

import asyncio
import functools
import time
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field

from torch_ps.common.errors import CorruptFrame
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.plan import Bucket
from torch_ps.common.wire.frames import pack
from torch_ps.ps.core.mean_norms import NormAnswer, NormQuestion, RoundKey
from torch_ps.ps.core.roster import Roster, SessionKey
from torch_ps.ps.core.shard import Shard
from torch_ps.ps.engine.parameter_store import Gradient, Store
from torch_ps.ps.observability.bug_reports import report_bug
from torch_ps.ps.transport.sent_ahead import Encoded
from torch_ps.ps.transport.streams import Stream, Streams

#: Norms by bucket, in the order of the buckets.
Norms = list[float]


@dataclass(slots=True)
class _Asked:
    """A question, and its gradient by bucket as far as it has come."""

    question: NormQuestion
    gradients: dict[int, Gradient] = field(default_factory=dict)


class NormMeter:
    """The questions of one shard. Everything but the computation runs on the event loop.

    Args:
        buckets: Buckets of the shard.
        store: Parameters of the shard.
        executor: Apply threads.
        core: State machine of the shard.
        streams: Open streams of the shard.
    """

    def __init__(
        self,
        buckets: Sequence[Bucket],
        store: Store,
        executor: Executor,
        core: Shard,
        streams: Streams,
    ) -> None:
        self._measured = [bucket.index for bucket in buckets if bucket.rule == "optimizer"]
        self._norm, self._executor, self._core, self._streams = store.beside(store.norm), executor, core, streams
        self._coming: dict[SessionKey, _Asked] = {}  # not all of whose buckets have come
        self._asked: dict[SessionKey, _Asked] = {}  # the core has them
        self._norms: dict[RoundKey, asyncio.Task[Norms]] = {}

    def take(self, stream: Stream, bucket: Bucket, measure: pb.Measure, gradient: Encoded) -> None:
        """Take one checked bucket of a question; the last one goes to the core.

        Raises:
            ProtocolError: no optimizer updates the bucket, or the core refuses the question.
        """
        if bucket.rule != "optimizer":
            raise CorruptFrame(f"bucket {bucket.index} holds buffers, which have no gradient to measure")
        worker, session = stream.worker or "", stream.session
        question = NormQuestion(
            worker, session, measure.step, measure.round, measure.power, measure.weight, measure.epoch
        )
        coming = self._coming.get((worker, session))
        if coming is None or coming.question != question:
            coming = self._coming[worker, session] = _Asked(question)
        coming.gradients[bucket.index] = Gradient(
            worker, measure.step, measure.weight, gradient.codec, gradient.payload, measure.missing
        )
        if len(coming.gradients) == len(self._measured):
            del self._coming[worker, session]
            answers = self._core.ask_norm(question, time.monotonic())
            self._asked[worker, session] = coming
            self._answer(answers)

    def answer_due(self) -> None:
        """Answer what a push has made due."""
        self._answer(self._core.norms_due())

    def set_roster(self, roster: Roster) -> None:
        """Answer what a new roster has made due, and forget who has left."""
        members = {member.key for member in roster.members}
        self._coming = {k: coming for k, coming in self._coming.items() if k in members or k[1] > roster.epoch}
        self._asked = {k: asked for k, asked in self._asked.items() if k in members or k[1] > roster.epoch}
        self.answer_due()

    def disconnected(self, worker: str, session: int) -> None:
        """Forget the question of a stream that has ended. The core forgets it, too."""
        self._coming.pop((worker, session), None)
        self._asked.pop((worker, session), None)

    def _answer(self, answers: Sequence[NormAnswer]) -> None:
        if not answers:
            return
        # Of joint answers: one that is given alone has the round of a worker that may be steps behind.
        last = max((answer.key[1] for answer in answers if not _is_alone(answer)), default=0)
        open_step = self._core.open_step
        self._norms = {key: task for key, task in self._norms.items() if key[0] >= open_step and key[1] >= last - 1}
        for answer in answers:
            if _is_alone(answer):
                self._send(answer, [])
                continue
            if answer.key not in self._norms:
                held = [self._asked[asked.worker, asked.session].gradients for asked in answer.asked]
                task = asyncio.ensure_future(self._compute(held, answer.asked[0].power))
                self._norms[answer.key] = task
            self._norms[answer.key].add_done_callback(functools.partial(self._computed, answer))
        for answer in answers:
            self._asked.pop((answer.worker, answer.session), None)

    async def _compute(self, held: Sequence[dict[int, Gradient]], power: float) -> Norms:
        loop = asyncio.get_running_loop()
        return await asyncio.gather(
            *(
                loop.run_in_executor(self._executor, self._norm, bucket, [each[bucket] for each in held], power)
                for bucket in self._measured
            )
        )

    def _computed(self, answer: NormAnswer, task: "asyncio.Task[Norms]") -> None:
        if task.cancelled():
            return
        if (error := task.exception()) is None:
            self._send(answer, task.result())
            return
        told, stream = report_bug("the norm of a mean", error), self._streams.get(answer.worker, answer.session)
        if stream is not None:
            stream.outbox.put_nowait(told)

    def _send(self, answer: NormAnswer, norms: Norms) -> None:
        stream = self._streams.get(answer.worker, answer.session)
        if stream is not None:
            measured = pb.Measured(
                step=answer.key[0],
                round=answer.key[1],
                norm=norms,
                contributor=[asked.worker for asked in answer.asked],
                without=answer.without,
            )
            stream.outbox.put_nowait(pack(pb.DownHeader(measured=measured)))


def _is_alone(answer: NormAnswer) -> bool:
    """Whether only the gradient of the worker that gets the answer is in the mean."""
    return [asked.worker for asked in answer.asked] == [answer.worker]
