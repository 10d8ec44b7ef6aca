"""The optimizer that users put in their training loop: it looks like the one it wraps, and the server does the work.

    loss.backward()      buckets leave as their gradients become ready
    optimizer.step()     the rest leaves; returns when fresh parameters are in the model
    optimizer.zero_grad()

Rules of this file
  1. A ``torch.optim.Optimizer`` that shares the wrapped one's ``param_groups`` and state: schedulers change them as
     ever, and what changed travels with the next push.
  2. The wrapped optimizer never steps; its state lives on the server. With ``local_steps`` it is the inner one: it
     steps here, its state lives here, and the servers run the outer one (``torch_ps.worker.gradients.local_steps``).
"""

import atexit
import dataclasses
import logging
import os
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import torch

from torch_ps.common.errors import PsError, StepConflict, UnknownWorker
from torch_ps.common.optimizer_spec import Hyper
from torch_ps.common.options.config import WorkerConfig
from torch_ps.common.options.fields import from_environment
from torch_ps.common.plan import Bucket
from torch_ps.common.security.tls import Tls
from torch_ps.common.trace import NOTHING
from torch_ps.worker.gradients.compressor import Compressor
from torch_ps.worker.gradients.flat_tensors import FlatTensors
from torch_ps.worker.gradients.gradients import Gradients, NoGradients
from torch_ps.worker.gradients.local_steps import LocalSteps, outer_optimizer, reuse_first_loss
from torch_ps.worker.gradients.momentum_correction import MomentumCorrection
from torch_ps.worker.gradients.server_optimizer import ServerOptimizer
from torch_ps.worker.optim.backward_overlap import BackwardOverlap
from torch_ps.worker.optim.forward_overlap import ForwardOverlap
from torch_ps.worker.optim.gpu_transfer import choose_pusher
from torch_ps.worker.optim.param_groups import Shared
from torch_ps.worker.optim.rejoin import Elastic
from torch_ps.worker.optim.step_trace import StepTrace
from torch_ps.worker.optim.untracked_writes import UntrackedWrites
from torch_ps.worker.runtime import graceful_shutdown
from torch_ps.worker.runtime.access import access_fields, access_in, addresses_of, default_name
from torch_ps.worker.session.session import Session

log = logging.getLogger("torch_ps.worker")


class ParameterServerOptimizer(Elastic, Shared):
    """Trains ``model`` with a parameter server in place of ``optimizer``.

    torch.amp.GradScaler works as ever: a step that it skips is pushed with weight 0, so that nobody waits.
    What a missing, sparse or infinite gradient means is told in ``torch_ps.worker.gradients.gradients``.

    Creating it joins the job. The first worker's parameters become the job's; every worker's model then holds them.

    Every keyword argument that is None is taken from the environment: ``compress`` from ``$PS_COMPRESS``, and so on.
    ps-worker and ps-run set these variables from their options, so they hold for scripts too.

    Args:
        optimizer: an elementwise optimizer of ``torch.optim``; says which class and hyperparameters the server uses.
        model: model with the names of the parameters, and the buffers that are averaged along with them.
        servers: "host:port" of every shard, comma-separated, shard 0 first.
        name: unique in the job; if there is none, w0, w1, ... by ``rank``, or made up without a rank too.
        rank: place in sums and data splits, also from ``$RANK``; if there is none, from the order of names.
        compress: codec of gradients: "none" (the default), "fp16", "bf16", "int8", "sign", "topk:0.01", "randk:0.01".
        compress_pull: codec of parameters, one of the same.
        feedback: whether what a codec leaves out is kept and added to the next push: "auto" (the default) for biased
            ones, "on" or "off".
        compress_warmup: steps in which topk and randk send more than their density; 0 by default.
        momentum_correction: "auto" (the default) computes SGD's momentum here where a sparse codec keeps residuals,
            "off" leaves it to the server.
        accumulate: backward passes per push, or per local step, 1 by default. The loop stays as it is: ``step`` and
            ``zero_grad`` do nothing until the last of them, which takes the mean.
        local_steps: 1 (the default) pushes every gradient. With H > 1, ``optimizer`` (any, also one that the servers
            could not run) makes H steps on this worker alone, then what they changed is pushed and the servers' own
            SGD applies it (DiLoCo). The loop stays as it is; ``step`` returns with fresh parameters every H-th time, in
            between each worker's model is its own, and steps after the last push are lost when the worker leaves.
            Memory: one more fp32 copy of the parameters, and the state of ``optimizer``, on each worker.
        outer_lr: learning rate of that SGD, 0.7 by default.
        outer_momentum: its Nesterov momentum, 0.9 by default; 0 is plain SGD.
        overlap: "auto" (the default) sends gradients during backward unless the loop changes them afterwards, "on"
            always, "off" never. With local steps there is nothing to send before the last one. "forward" is "on", and
            ``step`` returns when all is sent: whoever reads a parameter or buffer then waits for it, the next forward
            layer by layer. The bits are the same, errors of ``step`` come where the waiting is.
        plane: "auto" (the default) shares memory with servers on this host, "memory" insists on it, "network" does not.
        tls: trusted authorities, and this worker's certificate and key, as for ``torch_ps.Client``.
        token_file: path of the file with the job's secret, as for ``torch_ps.Client``.
        timeout: seconds that ``step`` may wait for other workers, 300 by default.

    Attributes:
        weight: part of the next gradient in the mean, 1 by default. Set it before ``backward`` to the number of samples
            when workers have unequal batches, or to have ``samples`` count them.

    Raises:
        ConfigError: an argument is wrong, or the optimizer cannot run on slices of the parameters.
        ModelMismatch: the job trains another model; the first differing tensor is named.
        Unreachable: a server does not answer; names its address.
    """

    #: A GradScaler calls ``step`` also where it would skip it, and leaves the scale to us.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: torch.nn.Module,
        servers: str | None = None,
        *,
        name: str | None = None,
        rank: int | None = None,
        compress: str | None = None,
        compress_pull: str | None = None,
        feedback: str | None = None,
        compress_warmup: int | None = None,
        momentum_correction: str | None = None,
        accumulate: int | None = None,
        local_steps: int | None = None,
        outer_lr: float | None = None,
        outer_momentum: float | None = None,
        overlap: str | None = None,
        plane: str | None = None,
        tls: Tls | str | None = None,
        token_file: str | None = None,
        timeout: float | None = None,
    ) -> None:
        given: dict[str, Any] = {
            "servers": servers,
            "name": name,
            "rank": rank,
            "compress": compress,
            "compress_pull": compress_pull,
            "feedback": feedback,
            "compress_warmup": compress_warmup,
            "momentum_correction": momentum_correction,
            "accumulate": accumulate,
            "local_steps": local_steps,
            "outer_lr": outer_lr,
            "outer_momentum": outer_momentum,
            "overlap": overlap,
            "plane": plane,
            **access_fields(tls, token_file),
            "timeout": timeout,
        }
        config = dataclasses.replace(
            from_environment(WorkerConfig, os.environ), **{k: v for k, v in given.items() if v is not None}
        )
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self.wrapped = optimizer
        self.name = config.name or default_name(config.rank)
        self._accumulate = config.accumulate
        self.weight = 1.0
        self._micro_step, self._earlier_weight = 0, 0.0
        self._changed: list[Hyper] | None = None  # per group, from the first bucket of a step on
        self._local_steps, local = config.local_steps, config.local_steps > 1
        self._server_optimizer = ServerOptimizer(outer_optimizer(optimizer, config) if local else optimizer)
        self._parameters, described, buffers = self._server_optimizer.tensors(model)
        self._share()
        tensors = [*self._parameters, *buffers]
        self._flat = FlatTensors(tensors)
        self._compressor = Compressor(
            config.compress, feedback=config.feedback, warmup=config.compress_warmup, worker=self.name
        )
        self._corrects = config.momentum_correction == "auto" and self._compressor.corrects_momentum
        self._session = Session(
            addresses_of(config.servers),
            self.name,
            compressor=self._compressor,
            compress_pull=config.compress_pull,
            timeout=config.timeout,
            plane=config.plane,
            access=access_in(config),
        )
        self._session.on_values = self._flat.write
        self._forward: ForwardOverlap | None = None
        self._steps: StepTrace | None = None
        self._close = weakref.finalize(self, self._session.close)
        atexit.register(self._close)
        try:
            self._described, self._rank, self._world = described, config.rank, config.world
            self.admit()
            buckets = self._session.plan.buckets
            names = [spec.name for spec in described.tensors()]
            trained = [bucket for bucket in buckets if bucket.rule == "optimizer"]
            own = names[: len(self._parameters)]
            self._gradients = Gradients(self._parameters, own, self._accumulate, self._server_optimizer.decays)
            overlap = "off" if local else config.overlap
            self._overlap = BackwardOverlap(overlap, self._parameters, names, trained, self._send)
            self._overlap.armed = self._accumulate == 1
            self._pusher = choose_pusher(self._session, self._compressor, self._flat, self._overlap)
            for bucket in buckets:
                self._session.pull(bucket)
            self._outcome = self._pusher.wait()
        except BaseException:
            self.close()
            raise
        self._flat.settle()
        if overlap == "forward":
            self._forward = ForwardOverlap(model, tensors, names, buckets, self._pusher, self._flat)
        self._lend()
        always = not local and self._forward is None
        self._untracked_writes = UntrackedWrites(model, self._parameters, names, optimizer.param_groups, always=always)
        if not local:
            self._unused(optimizer.state)
        self._local = LocalSteps(config.local_steps, optimizer, self._gradients, self._flat, trained) if local else None
        #: What a push takes its buckets from.
        self._source: Gradients | LocalSteps | NoGradients = self._local or self._gradients
        if self._session.trace.steps:
            self._steps = StepTrace(model, self._session)
        graceful_shutdown.attach(self)

    # -------------------------------------------------------------- the training loop

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Push the gradients, wait as the mode says, and put the fresh parameters into the model.

        Between two pushes of ``accumulate`` nothing happens; of ``local_steps``, the wrapped optimizer steps. A worker
        that was dropped, having been silent for longer than its lease, and one whose servers have gone back to a
        checkpoint take part again: the gradient is dropped, and the model has fresh parameters.

        Args:
            closure: function that evaluates the model again and returns the loss, as in torch.

        Raises:
            WaitTimeout: says who is waited for.
            PsError: see its message; the model holds the parameters of the last step.
        """
        with self._steps or NOTHING:
            return self._stepped(closure)

    def _stepped(self, closure: Callable[[], Any] | None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.wrapped._opt_called = True  # type: ignore[attr-defined]  # for a schedule that was made with it
        try:
            self.wait()
        except (UnknownWorker, StepConflict) as error:
            self.recover(error)
            graceful_shutdown.exit_if_requested(self.name, self.close)
            return loss
        if self._local is not None:
            self._untracked_writes.check(self._session.version)  # before an inner step writes, which nobody has to send
        self._micro_step += 1
        last = self._micro_step == self._accumulate
        self._gradients.begin_step(getattr(self, "grad_scale", None), getattr(self, "found_inf", None), last=last)
        if self._gradients.scaled:
            self._views.release_gradients()
        if not last:
            self._earlier_weight += self.weight
            self._overlap.armed = self._micro_step == self._accumulate - 1
            graceful_shutdown.exit_if_requested(self.name, self.close)
            return loss
        self._micro_step = 0  # before the inner optimizer evaluates a closure again, which zeroes gradients
        try:
            if self._local is None or self._local.step(self._passed_weight, self.name, reuse_first_loss(closure, loss)):
                self._push()
        except (UnknownWorker, StepConflict) as error:
            self.recover(error)
        finally:
            self._earlier_weight = 0.0
            self._overlap.armed = self._accumulate == 1
        graceful_shutdown.exit_if_requested(self.name, self.close)
        return loss

    def _push(self) -> None:
        try:
            self._overlap.check(scaled=self._gradients.scaled)
            if not self._overlap.sent:
                self._source.check()
            if self._source.left_out:
                self._views.release_gradients()
            self._source.report(self.name, f"step {self._session.next_step}")
            for bucket in reversed(self._session.plan.buckets):  # in the order of backward
                if bucket.index not in self._overlap.sent:
                    self._send(bucket)
        except BaseException:
            self._complete()  # what has left is answered, and the next step starts in order
            raise
        if self._forward is None:
            self._complete()
        else:
            self._forward.begin()
            self._forget()

    def _complete(self) -> None:
        try:
            self._outcome = self._pusher.wait()
        except BaseException:
            self._views.release()
            self._untracked_writes.lose_count()
            raise
        finally:
            self._flat.settle()
            self._forget()
        self._views.settle()
        self._untracked_writes.settle()

    def _forget(self) -> None:
        self._changed = None
        self._overlap.reset()
        self._source.reset()

    def wait(self) -> None:
        """Return when the parameters of the last step are in the model; with overlap="forward" they may not be yet.

        Raises:
            WaitTimeout, PsError: as ``step`` does otherwise.
        """
        if self._forward is not None and self._forward.open:
            try:
                self._outcome = self._forward.finish()
            except BaseException:
                self._overlap.reset()
                raise

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch, but between two pushes of ``accumulate`` it keeps what has been accumulated."""
        if not self._micro_step:
            super().zero_grad(set_to_none)

    # -------------------------------------------------------------- the end

    def close(self) -> None:
        """Leave the job; the others go on. Called at exit if the script does not."""
        graceful_shutdown.detach(self)
        if hasattr(self, "_overlap"):  # joining may have failed
            self._overlap.close()  # hooks and parameters hold each other where no garbage collector looks
            if self._steps is not None:
                self._steps.close()
        try:
            if self._forward is not None:
                self._forward.leave()
        finally:
            self._close()
            atexit.unregister(self._close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except PsError as late:
            if error is None:
                raise
            log.warning("the model does not hold the parameters of the last step: %s", late)

    # -------------------------------------------------------------- inside

    def _send(self, bucket: Bucket) -> None:
        """Push one bucket; during backward this runs on the thread that computes it."""
        self.wait()
        if self._changed is None:  # the first bucket of this push
            self._untracked_writes.check(self._session.version)
            self._session.discard_unanswered()
            self._flat.follow()
            self._changed = self._server_optimizer.changed(self._session.job_model.groups)
        trained, step = bucket.rule == "optimizer", self._session.next_step
        with self._session.span("push", step, bucket.index), self._pusher.staging(bucket) as staging:
            if trained:
                self._source.gather(bucket, staging)
            else:
                self._flat.read(bucket, staging)
            hyper = self._changed[bucket.group] if trained else None
            momentum = (
                self._server_optimizer.momentum(bucket, staging, self._flat) if trained and self._corrects else None
            )
            if momentum is not None:
                hyper = {**(hyper or {}), **MomentumCorrection.HYPER}
            self._pusher.push(
                bucket,
                staging,
                step=step,
                base=self._session.version_of(bucket),
                weight=self._weight_of(trained),
                hyper=hyper,
                momentum=momentum,
                missing=trained and self._source.missing(bucket),
                nonfinite=trained and bool(self._source.left_out),
            )

    @property
    def _passed_weight(self) -> float:
        """Sum of the weights of the passes that are accumulated."""
        return self._earlier_weight + self.weight

    def _weight_of(self, trained: bool) -> float:
        """Of a bucket of parameters, or of one of buffers, which every pass has changed."""
        if isinstance(self._source, NoGradients) or (trained and self._source.left_out):
            return 0.0
        if self._local is None:
            return self._passed_weight
        return self._local.applied if trained else self._local.passed
