"""The optimizer that users put in their training loop: it looks like the one it wraps, and the servers do the work.

    loss.backward()      gradients are sent ahead as they become ready; the servers hold them
    optimizer.step()     decides: commits what .grad holds now; returns when fresh parameters are in the model
    optimizer.zero_grad()

Between two steps nothing happens to parameters, buffers or state, here or on the servers, whatever the loop does.

    SharedParamGroups  groups and state of the wrapped optimizer    Recovery   joining, and coming back
    ModelPush          sending, waiting, and what both leave        MeanClip   clip_grad_norm_ over all workers
    Gradients          gradients of one or more passes              Lifetime   the end, and forks

Rules of this file
  1. It is a ``torch.optim.Optimizer`` that shares the wrapped one's ``param_groups``: schedulers change them as with
     torch alone, and what changed travels with the next push.
  2. The wrapped optimizer never steps; its state lives on the servers. With ``local_steps`` it is the inner optimizer:
     it steps here, its state lives here, and the servers run the outer one (``worker/gradients/local_steps.py``).
"""

import dataclasses
import logging
import os
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Self

import torch

from torch_ps.common.errors import PsError, StepConflict, UnknownWorker
from torch_ps.common.options.fields import from_environment
from torch_ps.common.options.worker_config import WorkerConfig
from torch_ps.common.security.tls import Tls
from torch_ps.common.trace import NOTHING
from torch_ps.worker.gradients.compressor import Compressor
from torch_ps.worker.gradients.flat_tensors import FlatTensors
from torch_ps.worker.gradients.gradients import Gradients
from torch_ps.worker.gradients.local_steps import LocalSteps, outer_optimizer, reuse_first_loss
from torch_ps.worker.gradients.passes import Passes
from torch_ps.worker.gradients.server_optimizer import ServerOptimizer
from torch_ps.worker.optim.ahead_choice import AheadChoice
from torch_ps.worker.optim.backward_overlap import BackwardOverlap, EagerPromise, overlap_mode
from torch_ps.worker.optim.companions import take_part_elsewhere
from torch_ps.worker.optim.forward_overlap import ForwardOverlap
from torch_ps.worker.optim.gpu_transfer import choose_pusher
from torch_ps.worker.optim.mean_clip import MeanClip
from torch_ps.worker.optim.model_push import ModelPush
from torch_ps.worker.optim.param_groups import SharedParamGroups
from torch_ps.worker.optim.rejoin import Recovery
from torch_ps.worker.optim.shared_views import SharedViews
from torch_ps.worker.optim.step_hooks import load_with_hooks, state_dict_with_hooks, step_hooks
from torch_ps.worker.optim.step_trace import StepTrace
from torch_ps.worker.optim.trained_modules import TrainedModules
from torch_ps.worker.optim.untracked_writes import FrozenParameters
from torch_ps.worker.runtime import graceful_shutdown, standalone_env, trainer_clipping
from torch_ps.worker.runtime.access import access_fields, access_in, default_name, jobs_of
from torch_ps.worker.runtime.jobs_here import choose_job, enter_job, leave_job
from torch_ps.worker.runtime.lifetime import weakly
from torch_ps.worker.runtime.other_averaging import refuse_it_later, refuse_other_averaging
from torch_ps.worker.session.answers import StepOutcome
from torch_ps.worker.session.job_member import JobMember
from torch_ps.worker.session.session import Session

log = logging.getLogger("torch_ps.worker")


class ParameterServerOptimizer(JobMember, torch.optim.Optimizer):
    """Trains ``model`` with a parameter server in place of ``optimizer``.

    torch.amp.GradScaler works as with torch alone: a step that it skips is pushed with weight 0, so that nobody waits.
    ``torch_ps.worker.gradients.gradients`` says what a missing, sparse or infinite gradient means.

    Creating it joins the job. Rank 0's parameters become the job's in sync mode, otherwise or without ranks those of
    the first worker; every worker's model then holds them.

    Every keyword argument that is None is taken from the environment: ``compress`` from ``$PS_COMPRESS``, and so on.
    ps-worker and ps-run set these variables from their options, so they hold for scripts too.

    Args:
        optimizer: elementwise optimizer of ``torch.optim``, whose class and hyperparameters the servers use.
        model: module that names the parameters and holds the buffers.
        servers: "host:port" of every shard, comma-separated, shard 0 first; "name=host:port,...;name=..." for the jobs
            of several models.
        job: name of the job that trains this model, where there are several; by default the k-th optimizer of a process
            takes the k-th job, or one that a closed optimizer has left.
        name: name of the worker, unique in the job; without one, w0, w1, ... by ``rank``, or made up without a rank.
        rank: place in sums and data splits, also from ``$RANK``; without one, the order of names decides.
        compress: codec of gradients: "none" (the default), "fp16", "bf16", "int8", "sign", "topk:0.01", "randk:0.01".
        compress_pull: codec of parameters, one of the same names.
        feedback: whether what a codec leaves out is kept and added to the next push: "auto" (the default) for biased
            codecs, "on" or "off".
        compress_warmup: number of first steps in which topk and randk send more than their density; 0 by default.
        momentum_correction: "auto" (the default) computes SGD's momentum here where a sparse codec keeps residuals,
            "off" leaves it to the server.
        accumulate: backward passes per push, or per local step, 1 by default. The loop stays as it is: ``step`` and
            ``zero_grad`` do nothing until the last pass, which takes the mean.
        local_steps: 1 (the default) pushes every gradient. With H > 1, ``optimizer`` (any, also one that the servers
            could not run) makes H steps on this worker alone, then what they changed is pushed and the servers' own
            SGD applies it (DiLoCo). The loop stays as it is; ``step`` returns with fresh parameters every H-th time, in
            between each worker's model is its own, and steps after the last push are lost when the worker leaves.
            Memory: one more fp32 copy of the parameters, and the state of ``optimizer``, on each worker.
        outer_lr: learning rate of that SGD, 0.7 by default.
        outer_momentum: Nesterov momentum of that SGD, 0.9 by default; 0 is plain SGD.
        overlap: "on" sends gradients ahead during backward, and ``step`` sends again what has changed since. "off"
            sends at ``step`` only. "auto" (the default) tries both and keeps the faster one. "eager" lets the
            servers apply gradients and send parameters during backward, for loops that promise to change neither
            gradients, weights nor hyperparameters between backward and ``step`` and to use no gradient that is not
            stepped; what can be detected of a broken promise is an error. With local steps there is nothing to send
            before the last one. "forward" is "auto", and "eager,forward" is "eager", where ``step`` returns when
            all is sent: reading a parameter or buffer then waits for it, so the next forward waits layer by layer.
            The bits are the same; errors of ``step`` come where the waiting is.
        buffers: "sync" (the default) averages running means and variances over the workers with every step and gives
            all workers rank 0's values of every other persistent buffer; "local" leaves each worker its own.
        plane: "auto" (the default) shares memory with servers on this host, "memory" insists on it, "network" does not
            and takes their data ports, or gRPC where these cannot be reached; "grpc" takes gRPC.
        connections: TCP connections to each data port, 1 by default, at most 16; more fill links with long round trips.
        tls: trusted authorities, and this worker's certificate and key, as for ``torch_ps.Client``.
        token_file: path of the file with the job's secret, as for ``torch_ps.Client``.
        timeout: seconds in which the servers have to be found, and that ``step`` may wait for other workers; 300 by
            default.

    Attributes:
        wrapped: the optimizer that was wrapped.
        job: name of the job; "" if it has none.
        weight: part of the next gradient in the mean, 1 by default. Set it before ``step`` (with "eager" before
            ``backward``) to the number of samples when workers have unequal batches, or to have ``samples`` count them.

    Raises:
        ConfigError: an argument is wrong, the optimizer cannot run on slices of the parameters, or another model of
            this process is in the job.
        ModelMismatch: the job trains another model; the first differing tensor is named.
        Unreachable: a server does not answer; names its address.
    """

    #: torch.amp.GradScaler calls ``step`` also where it would skip it, and leaves the scale to ``step``.
    _step_supports_amp_scaling = True
    _settled = False  # torch adds the groups while it builds this object; none may be added later

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: torch.nn.Module,
        servers: str | None = None,
        *,
        job: str | None = None,
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
        buffers: str | None = None,
        plane: str | None = None,
        connections: int | None = None,
        tls: Tls | str | None = None,
        token_file: str | None = None,
        timeout: float | None = None,
    ) -> None:
        given: dict[str, Any] = {
            "servers": servers,
            "job": job,
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
            "buffers": buffers,
            "plane": plane,
            "connections": connections,
            **access_fields(tls, token_file),
            "timeout": timeout,
        }
        config = dataclasses.replace(
            from_environment(WorkerConfig, os.environ), **{k: v for k, v in given.items() if v is not None}
        )
        torch.optim.Optimizer.__init__(self, optimizer.param_groups, optimizer.defaults)
        own_name, name = name is not None or rank is not None, config.name or default_name(config.rank)
        trains = TrainedModules(model, optimizer.param_groups)
        chosen = choose_job(jobs_of(config.servers), config.job, name, own_name=own_name, trains=trains)
        refuse_other_averaging(model)
        self.job = chosen.name
        self.wrapped = optimizer
        passes = self._passes = Passes(config.accumulate)
        local = config.local_steps > 1
        compressor = Compressor(config.compress, feedback=config.feedback, warmup=config.compress_warmup, worker=name)
        server_optimizer = ServerOptimizer(
            outer_optimizer(optimizer, config) if local else optimizer,
            corrects_momentum=config.momentum_correction == "auto" and compressor.corrects_momentum,
        )
        parameters, described, shared_buffers = server_optimizer.tensors(model, config.buffers)
        self._shared_groups = SharedParamGroups(
            optimizer,
            name,
            steps_here=local,
            version=lambda: session.version,
            on_load=weakly(self._share_groups),
        )
        self._share_groups()
        flat = FlatTensors(parameters, shared_buffers)
        session = Session(
            chosen.shards,
            name,
            compressor=compressor,
            compress_pull=config.compress_pull,
            timeout=config.timeout,
            plane=config.plane,
            connections=config.connections,
            access=access_in(config),
        )
        JobMember.__init__(self, session)
        enter_job(self, chosen, name, own_name=own_name, trains=trains)
        self._lifetime.add(self._shared_groups)
        session.on_long_wait = weakly(self._take_part_elsewhere)
        session.on_values = flat.write
        self._step_trace: StepTrace | None = None
        try:
            self._recovery = Recovery(session, described, config.rank, config.world, flat)
            self._recovery.join()
            buckets = session.plan.buckets
            names = [spec.name for spec in described.tensors()]
            trained = [bucket for bucket in buckets if bucket.rule == "optimizer"]
            self._gradients = Gradients(parameters, names[: len(parameters)], passes)
            self._clip = MeanClip(session, self._gradients, joint=session.job.averages and not local)
            self._lifetime.add(self._clip)
            self._model_order = list(model.parameters())
            mode = overlap_mode("off" if local else config.overlap)
            self._overlap = BackwardOverlap(
                parameters,
                trained if mode.during_backward else [],
                AheadChoice() if mode.chooses else None,
                EagerPromise(parameters, names) if mode.eager else None,
            )
            self._lifetime.add(self._overlap)
            self._pusher = choose_pusher(session, compressor, flat, self._overlap)
            if not isinstance(self._pusher, Session):
                self._lifetime.add(self._pusher)
            outcome = self._recovery.pull(self._pusher)
            flat.settle()
            forward: ForwardOverlap | None = None
            if mode.forward:
                forward = ForwardOverlap(model, flat.tensors, names, buckets, self._pusher, flat)
                self._lifetime.add(forward)
            self._local = LocalSteps(config.local_steps, optimizer, self._gradients, flat, trained) if local else None
            views = SharedViews(parameters, flat, lend_gradients=passes.per_push == 1 and compressor.lossless)
            self._lifetime.add(views)
            self._push = ModelPush(
                session,
                self._pusher,
                flat,
                server_optimizer,
                self._gradients,
                self._local,
                self._overlap,
                forward,
                views,
            )
            self._push.begin(outcome)
            self._frozen = FrozenParameters(model, parameters, optimizer.param_groups)
        except BaseException:
            self.close()
            raise
        if not local:
            self._shared_groups.warn_of_unused_state(optimizer.state, self.version)
        if session.trace.steps:
            self._step_trace = StepTrace(model, session)
            self._lifetime.add(self._step_trace)
        graceful_shutdown.attach(self)
        standalone_env.divide_loaders()  # of trainers that were imported after alone()
        trainer_clipping.install()
        refuse_it_later()

    # -------------------------------------------------------------- the training loop

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Push the gradients, wait as the mode says, and put the fresh parameters into the model.

        Between two pushes of ``accumulate`` nothing happens; between two of ``local_steps`` the wrapped optimizer
        steps. A worker that was dropped, having been silent for longer than its lease, takes part again, and so does
        one whose servers have gone back to a checkpoint: the gradient is dropped, and the model has fresh parameters.

        Args:
            closure: function that evaluates the model again and returns the loss, as in torch.

        Raises:
            WaitTimeout: says who is waited for.
            PsError: see its message; the model holds the parameters of the last step.
        """
        self._session.check_member()
        self._shared_groups.check(self)
        with self._step_trace or NOTHING:
            if self._local is not None:
                return self._step(closure)
            with step_hooks(self.wrapped, closure) as closure:
                return self._step(closure)

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.wrapped._opt_called = True  # type: ignore[attr-defined]  # for a scheduler built on it
        try:
            self.wait()
        except (UnknownWorker, StepConflict) as error:
            self.recover(error)
            self.exit_if_requested()
            return loss
        self._frozen.check()
        self._clip.check_loop(len(self._push.outcome.contributors))
        if not self._push.begin_step(getattr(self, "grad_scale", None), getattr(self, "found_inf", None)):
            self.exit_if_requested()
            return loss
        weight = self._passes.total_weight
        try:
            if self._local is None or self._local.step(weight, self.name, reuse_first_loss(closure, loss)):
                self._push.push()
        except (UnknownWorker, StepConflict) as error:
            self.recover(error)
        finally:
            self._push.end_step()
        self.exit_if_requested()
        return loss

    def wait(self) -> None:
        """Return when the parameters of the last step are in the model. Only overlap="forward" has to wait for them.

        Raises:
            WaitTimeout: says who is waited for.
            PsError: see its message; ``step`` raises the same without overlap="forward".
        """
        self._push.wait()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset gradients as torch does, but between two pushes of ``accumulate`` keep what has been accumulated."""
        if not self._passes.count:
            super().zero_grad(set_to_none)

    def clip_grad_norm_(
        self,
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
        *,
        in_order_of: Iterable[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Clip the gradients of all parameters by the norm of the mean over all workers, as FSDP's method of this name.

        Call it in place of ``torch.nn.utils.clip_grad_norm_``, on every worker, between backward and ``step`` (after
        ``scaler.unscale_``). In sync mode it waits until every worker has called it: the servers measure the mean, and
        each worker multiplies its ``.grad`` by min(1, max_norm / norm). Nothing is applied; the loop may still change
        or drop the gradients. In the other modes, with local steps and on a worker that is alone, the norm is that of
        this worker's own gradient, and the bits are torch's. Where the norm of the mean is not finite, every gradient
        of every worker becomes NaN, so that all leave the step out. Before the last pass of ``accumulate`` nothing is
        clipped, and the norm is that of this worker's gradient so far.

        Args:
            max_norm: largest norm of the mean gradient, >= 0.
            norm_type: type of the norm, > 0; inf for the largest absolute value.
            error_if_nonfinite: whether a norm that is not finite is an error.
            in_order_of: parameters in the order in which the norm of this worker's own gradient takes them, which
                decides how it rounds; None: that of ``model.parameters()``. All gradients count, whatever it has.

        Returns:
            The norm of the mean gradient before clipping, shape (), fp32.

        Raises:
            ConfigError: ``norm_type`` is not > 0.
            RuntimeError: the norm is not finite, and ``error_if_nonfinite`` is set.
            WaitTimeout: another worker has neither called it nor pushed the step; says who.
            PsError: gradients have been applied during backward already, as with overlap="eager".
        """
        self._session.check_member()
        self.wait()
        if self._overlap.promise is not None and self._overlap.sent:
            raise PsError(
                "clip_grad_norm_ comes too late: overlap='eager' has pushed gradients during backward; leave overlap "
                "out, or clip on the servers (ps-serve --clip-norm)"
            )
        passes = self._passes.count + 1
        order = self._model_order if in_order_of is None else in_order_of
        if passes < self._passes.per_push:
            return self._clip.own_norm(norm_type, passes, order)
        return self._clip.clip(
            max_norm,
            norm_type,
            weight=self._passes.total_weight,
            passes=passes,
            error_if_nonfinite=error_if_nonfinite,
            order=order,
        )

    # -------------------------------------------------------------- beside the steps

    @property
    def weight(self) -> float:
        """Part of the next gradient in the mean, as the class describes."""
        return self._passes.weight

    @weight.setter
    def weight(self, weight: float) -> None:
        self._passes.weight = weight

    def settle(self) -> None:
        """Take part in a step without a new batch: push what was gathered since the last push, or weight 0.

        Raises:
            WaitTimeout: says who is waited for.
        """
        passes = self._passes.cut_short()
        weight, self.weight = self.weight, 0.0  # the weight of every pass so far is counted
        try:
            if not passes and not self.gathered:
                self._push.push_nothing()
            else:
                if passes and self._local is not None:
                    self._local.step(self._passes.total_weight, self.name, None)
                self._push.push()
        except (UnknownWorker, StepConflict) as error:
            self.recover(error)
        finally:
            self.weight = weight
            self._push.end_step()
        if passes:
            self.zero_grad()  # the loop's own did nothing
        self.exit_if_requested()

    def recover(self, why: UnknownWorker | StepConflict) -> None:
        """Take part in the job again; the model has fresh parameters then, and its gradient is dropped.

        Args:
            why: error of the step that showed that the place in the job is lost.

        Raises:
            NameTaken: another worker has taken the name or the rank meanwhile.
            WaitTimeout: says who is waited for.
        """
        self._push.abandon()
        outcome = self._recovery.rejoin(why, self._pusher)
        self._passes.reset()
        self.zero_grad()
        self._push.begin(outcome)

    def exit_if_requested(self) -> None:
        """Between two steps: leave the job and end the process if SIGTERM has come."""
        if graceful_shutdown.requested.is_set():
            graceful_shutdown.leave_and_exit(self.name, self.close)

    @property
    def session(self) -> Session:
        """The session of this worker, for other modules of this package."""
        return self._session

    def _take_part_elsewhere(self) -> None:
        """In the middle of a step that takes long: do not keep workers waiting in a job of another model."""
        take_part_elsewhere(self)

    @property
    def gathered(self) -> bool:
        """Whether there are passes that no push has taken yet."""
        return bool(self._passes.count or (self._local is not None and self._local.begun))

    # -------------------------------------------------------------- groups and state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse a group: what the servers hold is settled when a worker joins.

        Raises:
            PsError: says what to do instead.
        """
        if self._settled:
            raise PsError(
                "a parameter group cannot be added once the job has begun; give the optimizer all groups before it is "
                "wrapped, and freeze those that are to wait with requires_grad_(False) afterwards"
            )
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Return the groups and the ``version``; state only with local steps, else the servers have it."""
        make = super().state_dict
        return state_dict_with_hooks(self.wrapped, lambda: {**make(), "version": self.version})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what this class or plain torch has saved. State is used with local steps only."""
        load_with_hooks(self, state_dict, lambda found: self._shared_groups.load(found, self.version))

    def _share_groups(self) -> None:
        self.param_groups, self.state = self._shared_groups.param_groups, self._shared_groups.state
        self._settled = True

    # -------------------------------------------------------------- what a training loop can ask

    @property
    def _last(self) -> StepOutcome:
        """The outcome of the last step; waits for it if it is still under way."""
        self.wait()
        return self._push.outcome

    @property
    def version(self) -> int:
        """Optimizer steps that the parameters in the model have had."""
        return self._last.version

    @property
    def staleness(self) -> int:
        """Of the last push: optimizer steps between the parameters it was computed from and those it was applied to."""
        return self._last.staleness

    @property
    def samples(self) -> float:
        """Sum of the weights that the whole job has absorbed, as of the last step."""
        return self._last.samples

    @property
    def unpushed(self) -> float:
        """Sum of the weights of this worker's local steps since its last push; 0 without local steps."""
        return self._local.applied if self._local is not None else 0.0

    @property
    def left_out(self) -> int:
        """Steps of this worker that were not applied because a gradient was not finite; inner ones with local steps."""
        return (self._local or self._gradients).num_left_out

    @property
    def left_out_in_a_row(self) -> int:
        """How many of these there have been since the last push that was to be applied."""
        return (self._local or self._gradients).in_a_row

    @property
    def wait_seconds(self) -> float:
        """Seconds that ``step`` has waited for answers so far."""
        return self._session.wait_seconds

    @property
    def workers(self) -> tuple[str, ...]:
        """Names of the workers in rank order; waits for the first quorum, at most ``timeout`` seconds."""
        try:
            return super().workers
        except PsError:
            self.exit_if_requested()
            raise

    @property
    def world(self) -> int:
        """Number of ``workers``."""
        return len(self.workers)

    # -------------------------------------------------------------- the end

    def close(self) -> None:
        """Leave the job; the others go on. Called when the optimizer is dropped, and at exit."""
        leave_job(self)
        graceful_shutdown.detach(self)
        self._lifetime.end()

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
