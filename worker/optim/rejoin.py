"""Brings a worker into its job, and back into it when its place is lost.

    UnknownWorker, this worker was dropped ----> join again --+--> pull --> fresh parameters and one line in the log;
    StepConflict, the servers have gone back -----------------+             what was not applied is dropped

A worker that was stopped for longer than its lease (a suspended laptop, a paused VM, SIGSTOP) has left the roster, and
its pushes of open steps and its samples with it. The same holds for a worker that joined after the checkpoint from
which the servers were started again. A worker that the checkpoint knows is ahead by the steps that were lost, which are
trained again; it joins again only if it reads leased samples, for a lead that is gone has given them out. A worker
learns either at its next step.
"""

import contextlib
import dataclasses
import logging
import time

import torch

from torch_ps.common.errors import NameTaken, Restarted, StepConflict, UnknownWorker
from torch_ps.common.plan import Bucket
from torch_ps.common.schema import Model
from torch_ps.worker.gradients.flat_tensors import FlatTensors, empty_fp32
from torch_ps.worker.optim.gpu_transfer import Pusher
from torch_ps.worker.session.answers import StepOutcome
from torch_ps.worker.session.session import Session
from torch_ps.worker.transport.call_retry import RETRY_SECONDS

log = logging.getLogger("torch_ps.worker")

#: Seconds of tries to join, while the server still closes the old stream, after which the log says so.
SILENT_SECONDS = 1.0
#: Seconds after the end of a lease in which its holder is dropped.
LEASE_MARGIN = 2.0
#: Times that a worker may be dropped while it joins again.
MAX_DROPPED = 10


class Recovery:
    """Joins the job for one worker, as often as it takes.

    Args:
        session: session of the worker.
        model: tensors and optimizer of the worker.
        rank: place in sums; None for the order of names.
        world: number of workers that were started together; 0 if nobody says.
        flat: tensors whose values become the job's if this worker is the first.
    """

    def __init__(self, session: Session, model: Model, rank: int | None, world: int, flat: FlatTensors) -> None:
        self._session, self._model, self._rank, self._world, self._flat = session, model, rank, world, flat

    def join(self) -> None:
        """Join. Another worker of this name or rank may be this one before its host failed, so its lease may run out.

        Raises:
            NameTaken: the other worker is still there when its lease has run out.
        """
        begin = said = time.monotonic()
        while True:
            try:
                self._session.join(self._model, self._rank, self._read)
                self._warn_of_quorum()
                return
            except NameTaken as error:
                now, lease = time.monotonic(), self._session.job.lease_seconds
                if now - begin > lease + LEASE_MARGIN:
                    raise
                if said == begin and now - begin > SILENT_SECONDS:
                    said = now
                    log.warning("%s; waiting for %g s, as it may be a former life of this worker", error, lease)
                time.sleep(RETRY_SECONDS)

    def pull(self, pusher: Pusher) -> StepOutcome:
        """Pull all parameters.

        Args:
            pusher: session or GPU transfer that waits for the answers.
        """
        self._flat.follow()
        for bucket in self._session.plan.buckets:
            self._session.pull(bucket)
        return pusher.wait()

    def rejoin(self, why: UnknownWorker | StepConflict, pusher: Pusher) -> StepOutcome:
        """Take part in the job again, with fresh parameters.

        A worker that the servers still know, and that reads no leased samples, only pulls, so that it keeps its place
        in the roster.

        Args:
            why: error of the step that showed that the place is lost.
            pusher: session or GPU transfer that waits for the parameters.

        Raises:
            NameTaken: another worker has taken the name or the rank meanwhile.
            WaitTimeout: says who is waited for.
        """
        session, before = self._session, self._session.version
        outcome = None
        if isinstance(why, StepConflict) and not session.sample_counts.any_started:
            with contextlib.suppress(UnknownWorker):
                outcome = self.pull(pusher)
        if outcome is None:
            outcome = self._join_and_pull(pusher)
        log.warning(
            "worker %s takes part again from version %d, it had version %d: %s",
            session.name,
            outcome.version,
            before,
            why,
        )
        return dataclasses.replace(outcome, applied=False)

    def _join_and_pull(self, pusher: Pusher) -> StepOutcome:
        dropped = 0
        while True:
            try:
                self.join()
                return self.pull(pusher)
            except (UnknownWorker, Restarted):  # stopped for longer than the lease once more, or the servers restarted
                dropped += 1
                if dropped == MAX_DROPPED:
                    raise

    def _warn_of_quorum(self) -> None:
        """Warn, as the first worker, if the servers do not wait at the start for all that were started together."""
        quorum = self._session.job.quorum
        if self._world and quorum != self._world and self._session.first:
            log.warning(
                "%d workers are started together and the servers wait for %d at the start: %s; ps-serve --workers %d "
                "would have all of them begin together",
                self._world,
                quorum,
                "nothing begins before others come" if quorum > self._world else "some may come when training runs",
                self._world,
            )

    def _read(self, bucket: Bucket) -> torch.Tensor:
        """The parameters of one bucket as the model has them, shape (numel,), fp32."""
        return self._flat.read(bucket, empty_fp32(bucket.numel))
