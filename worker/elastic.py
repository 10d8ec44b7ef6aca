"""What an optimizer does beside its steps: stay in step without samples, and come back after it was dropped.

    settle   push what accumulate and local_steps have gathered, else weight 0: nobody waits, nothing is changed
    rejoin   UnknownWorker --> join again, pull --> fresh parameters; what was not pushed is dropped, as on the servers

A worker that was stopped for longer than its lease (a suspended laptop, a paused VM, SIGSTOP) has left the roster, its
pushes of open steps and its samples with it. It learns so at its next step and takes part again from the one after.
"""

import logging
import time
from collections.abc import Callable

import torch

from torch_ps.common.errors import NameTaken, UnknownWorker
from torch_ps.common.optim import Hyper
from torch_ps.common.plan import Bucket
from torch_ps.common.schema import Model
from torch_ps.worker import drain
from torch_ps.worker.compress import Compressor
from torch_ps.worker.flat import Flat
from torch_ps.worker.gradients import Gradients
from torch_ps.worker.local import LocalSteps
from torch_ps.worker.overlap import Overlap
from torch_ps.worker.session import Outcome, Session
from torch_ps.worker.views import Views

log = logging.getLogger("torch_ps.worker")

#: Seconds between two tries to join while the server still closes the old stream.
RETRY_SECONDS = 0.2


class Nothing:
    """What a push takes its buckets from where there is no gradient: as if no parameter had one."""

    left_out, num_left_out, in_a_row = "", 0, 0

    def check(self) -> None:
        """There is nothing that could be infinite."""

    def report(self, worker: str, step: str) -> None:
        """Nothing is left out."""

    def missing(self, bucket: Bucket) -> bool:
        return True

    def gather(self, bucket: Bucket, into: torch.Tensor) -> torch.Tensor:
        return into.zero_()

    def reset(self) -> None:
        """Nothing is kept."""


class Elastic:
    """A part of ``ParameterServerOptimizer``, whose attributes these are."""

    name: str
    weight: float
    _session: Session
    _described: Model
    _rank: int | None
    _gradients: Gradients
    _local: LocalSteps | None
    _source: Gradients | LocalSteps | Nothing
    _overlap: Overlap
    _flat: Flat
    _views: Views
    _parameters: list[torch.Tensor]
    _compressor: Compressor
    _accumulate: int
    _local_steps: int
    _micro_step: int
    _earlier_weight: float
    _changed: list[Hyper] | None
    _outcome: Outcome
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
                self._source = Nothing()
            self._push()
        except UnknownWorker as error:
            self._source = self._local or self._gradients
            self.rejoin(error)
        finally:
            self._source, self.weight = self._local or self._gradients, weight
            self._earlier_weight = 0.0
            self._overlap.armed = self._accumulate == 1
        if passes:
            self.zero_grad()  # the loop's own did nothing
        drain.finish(self.name, self.close)

    @property
    def session(self) -> Session:
        """The connection to the servers, for this package."""
        return self._session

    @property
    def gathered(self) -> bool:
        """Whether there are passes that no push has taken yet."""
        return bool(self._micro_step or (self._local is not None and self._local.begun))

    def rejoin(self, why: UnknownWorker) -> None:
        """Become a worker of the job again; the model has fresh parameters then.

        Raises:
            NameTaken: another worker has taken the name or the rank meanwhile.
            WaitTimeout: says who is waited for.
        """
        log.warning("worker %s joins again: %s", self.name, why)
        self._views.release()
        session, deadline = self._session, time.monotonic() + self._session.job.lease_seconds
        while True:
            try:
                session.join(self._described, self._rank, self._values)
                for bucket in session.plan.buckets:
                    session.pull(bucket)
                self._outcome = session.wait()
                break
            except UnknownWorker:
                continue  # stopped for longer than the lease once more
            except NameTaken:
                if time.monotonic() > deadline:
                    raise
                time.sleep(RETRY_SECONDS)
        self._micro_step, self._earlier_weight, self._changed = 0, 0.0, None
        self._overlap.reset()
        self._overlap.armed = self._accumulate == 1
        self._flat.settle()
        self._gradients.reset()
        self._source.reset()
        self.zero_grad()
        self._lend()

    def _lend(self) -> None:
        """Let tensors of the model live in the memory that this session shares with the servers."""
        local = self._local_steps > 1
        self._views = Views(
            self._session.plan,
            self._parameters,
            self._session.planes,
            self._flat,
            lend_parameters=not local,
            lend_gradients=not local and self._accumulate == 1 and self._compressor.lossless,
        )
        self._session.on_leave = self._views.release
        self._views.settle()

    def _values(self, bucket: Bucket) -> torch.Tensor:
        """The parameters of one bucket as the model has them, shape (numel,), fp32."""
        return self._flat.read(bucket, torch.empty(bucket.numel))
