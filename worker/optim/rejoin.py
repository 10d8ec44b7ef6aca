"""What an optimizer does beside its steps: stay in step without samples, and come back when its place is lost.

    settle   push what accumulate and local_steps have gathered, else weight 0: nobody waits, nothing is changed
    recover  UnknownWorker, this worker was dropped ----> join again --+--> pull --> fresh parameters and one line in
             StepConflict, the servers have gone back -----------------+    the log; what was not applied is dropped

A worker that was stopped for longer than its lease (a suspended laptop, a paused VM, SIGSTOP) has left the roster, its
pushes of open steps and its samples with it; so has one that joined after the checkpoint from which the servers were
started again. One that the checkpoint knows is behind by the steps that were lost, and they are trained again; it joins
again only if it reads leased samples, for they were given by a lead that is gone. Either learns so at its next step.
"""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable

import torch

from torch_ps.common.errors import NameTaken, Restarted, StepConflict, UnknownWorker
from torch_ps.common.optimizer_spec import Hyper
from torch_ps.common.plan import Bucket
from torch_ps.common.schema import Model
from torch_ps.worker.gradients.compressor import Compressor
from torch_ps.worker.gradients.flat_tensors import FlatTensors, empty_fp32
from torch_ps.worker.gradients.gradients import Gradients, NoGradients
from torch_ps.worker.optim.backward_overlap import BackwardOverlap
from torch_ps.worker.optim.forward_overlap import ForwardOverlap
from torch_ps.worker.optim.gpu_transfer import GpuTransfer
from torch_ps.worker.optim.introspection import Facts
from torch_ps.worker.optim.shared_views import SharedViews
from torch_ps.worker.runtime import graceful_shutdown
from torch_ps.worker.session.session import Session, StepOutcome

log = logging.getLogger("torch_ps.worker")

#: Seconds between two tries to join while the server still closes the old stream, and after which the log says so.
RETRY_SECONDS, SILENT_SECONDS = 0.2, 1.0
#: Seconds after the end of a lease in which whoever had it is dropped.
LEASE_MARGIN = 2.0
#: Times that a worker may be dropped while it joins again.
MAX_STOPPED = 10


class Elastic(Facts):
    """A part of ``ParameterServerOptimizer``, whose attributes these are."""

    weight: float
    _described: Model
    _rank: int | None
    _world: int
    _gradients: Gradients
    _overlap: BackwardOverlap
    _pusher: Session | GpuTransfer
    _flat: FlatTensors
    _views: SharedViews
    _forward: ForwardOverlap | None
    _parameters: list[torch.Tensor]
    _compressor: Compressor
    _accumulate: int
    _local_steps: int
    _micro_step: int
    _earlier_weight: float
    _changed: list[Hyper] | None
    _push: Callable[[], None]
    zero_grad: Callable[..., None]
    close: Callable[[], None]

    def settle(self) -> None:
        """Take part in a step without a new batch: push what has been gathered since the last push, or weight 0.

        Raises:
            WaitTimeout: says who is waited for.
        """
        passes, self._micro_step = self._micro_step, 0
        weight, self.weight = self.weight, 0.0  # that of every pass so far is counted
        try:
            if passes:
                self._gradients.passes = passes
                if self._local is not None:
                    self._local.step(self._earlier_weight, self.name, None)
            elif self._local is None or not self._local.begun:
                self._views.release_gradients()  # they are not what is pushed
                self._source = NoGradients()
            self._push()
        except (UnknownWorker, StepConflict) as error:
            self._source = self._local or self._gradients
            self.recover(error)
        finally:
            self._source, self.weight = self._local or self._gradients, weight
            self._earlier_weight = 0.0
            self._overlap.armed = self._accumulate == 1
        if passes:
            self.zero_grad()  # the loop's own did nothing
        graceful_shutdown.exit_if_requested(self.name, self.close)

    @property
    def session(self) -> Session:
        """The connection to the servers, for this package."""
        return self._session

    @property
    def gathered(self) -> bool:
        """Whether there are passes that no push has taken yet."""
        return bool(self._micro_step or (self._local is not None and self._local.begun))

    def recover(self, why: UnknownWorker | StepConflict) -> None:
        """Take part in the job again; the model has fresh parameters then, and its gradient is dropped.

        Whoever is still known, and goes by samples of its own, only pulls: it keeps its place in the roster.

        Raises:
            NameTaken: another worker has taken the name or the rank meanwhile.
            WaitTimeout: says who is waited for.
        """
        session, before = self._session, self._session.version
        self._views.release()
        if self._forward is not None:
            self._forward.abandon()
        outcome = None
        if isinstance(why, StepConflict) and not session.sample_counts.used:
            with contextlib.suppress(UnknownWorker):
                outcome = self._pulled()
        if outcome is None:
            outcome = self._joined()
        self._outcome = dataclasses.replace(outcome, applied=False)
        log.warning(
            "worker %s takes part again from version %d, it had version %d: %s",
            self.name,
            outcome.version,
            before,
            why,
        )
        self._micro_step, self._earlier_weight, self._changed = 0, 0.0, None
        self._overlap.reset()
        self._overlap.armed = self._accumulate == 1
        self._flat.settle()
        self._gradients.reset()
        self._source.reset()
        self.zero_grad()
        self._lend()

    def admit(self) -> None:
        """Join. A worker of this name or rank may be a former life of this one, whose host has gone without a word.

        Raises:
            NameTaken: it is still there when its lease has run out.
        """
        begin = said = time.monotonic()
        while True:
            try:
                self._session.join(self._described, self._rank, self._values)
                self._together()
                return
            except NameTaken as error:
                now, lease = time.monotonic(), self._session.job.lease_seconds
                if now - begin > lease + LEASE_MARGIN:
                    raise
                if said == begin and now - begin > SILENT_SECONDS:
                    said = now
                    log.warning("%s; waiting for %g s, as it may be a former life of this worker", error, lease)
                time.sleep(RETRY_SECONDS)

    def _together(self) -> None:
        """Where the servers do not wait at the start for those that were started together, the first worker says so."""
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

    def _joined(self) -> StepOutcome:
        stopped = 0
        while True:
            try:
                self.admit()
                return self._pulled()
            except (UnknownWorker, Restarted):  # once more stopped for longer than the lease, or the servers were
                stopped += 1
                if stopped == MAX_STOPPED:
                    raise

    def _pulled(self) -> StepOutcome:
        for bucket in self._session.plan.buckets:
            self._session.pull(bucket)
        return self._pusher.wait()

    def _lend(self) -> None:
        """Let tensors of the model live in the memory that this session shares with the servers."""
        lend = self._local_steps == 1 and self._forward is None
        self._views = SharedViews(
            self._session.plan,
            self._parameters,
            self._session.shared_memory,
            self._flat,
            lend_parameters=lend,
            lend_gradients=lend and self._accumulate == 1 and self._compressor.lossless,
        )
        self._session.on_leave = self._views.release
        self._views.settle()

    def _values(self, bucket: Bucket) -> torch.Tensor:
        """The parameters of one bucket as the model has them, shape (numel,), fp32."""
        return self._flat.read(bucket, empty_fp32(bucket.numel))
