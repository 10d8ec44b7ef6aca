"""The optimizer that users put in their training loop: it looks like the one it wraps, and the server does the work.

    loss.backward()      buckets leave as their gradients become ready
    optimizer.step()     the rest leaves; returns when fresh parameters are in the model
    optimizer.zero_grad()

Rules of this file
  1. A ``torch.optim.Optimizer`` that shares the wrapped one's ``param_groups``: schedulers change them as ever, and
     what changed travels with the next push.
  2. The wrapped optimizer never steps; its state lives on the server.
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

from torch_ps.common import optim, schema
from torch_ps.common.config import WorkerConfig
from torch_ps.common.errors import ConfigError
from torch_ps.common.fields import from_environment
from torch_ps.common.optim import Hyper
from torch_ps.common.plan import Bucket
from torch_ps.common.schema import Group, Model, TensorSpec
from torch_ps.worker.client import addresses_of, default_name
from torch_ps.worker.compress import Compressor
from torch_ps.worker.dgc import Momentum
from torch_ps.worker.flat import Flat
from torch_ps.worker.gradients import Gradients
from torch_ps.worker.overlap import Overlap
from torch_ps.worker.session import Session

log = logging.getLogger("torch_ps.worker")


class ParameterServerOptimizer(torch.optim.Optimizer):
    """Trains ``model`` with a parameter server in place of ``optimizer``.

    torch.amp.GradScaler works as ever: a step that it skips is pushed with weight 0, so that nobody waits.
    What a missing, sparse or infinite gradient means is told in ``torch_ps.worker.gradients``.

    Creating it joins the job. The first worker's parameters become the job's; every worker's model then holds them.

    Every keyword argument that is None is taken from the environment: ``compress`` from ``$PS_COMPRESS``, and so on.
    ps-worker and ps-run set these variables from their options, so they hold for scripts too.

    Args:
        optimizer: an elementwise optimizer of ``torch.optim``; says which class and hyperparameters the server uses.
        model: gives the parameters their names, and has the buffers that are averaged along with them.
        servers: "host:port" of every shard, comma-separated, shard 0 first.
        name: unique in the job; made up if there is none.
        rank: place in sums and data splits, also from ``$RANK``; if there is none, from the order of names.
        compress: codec of gradients: "none" (the default), "fp16", "bf16", "int8", "sign", "topk:0.01", "randk:0.01".
        compress_pull: codec of parameters, one of the same.
        feedback: whether what a codec leaves out is kept and added to the next push: "auto" (the default) for biased
            ones, "on" or "off".
        compress_warmup: steps in which topk and randk send more than their density; 0 by default.
        momentum_correction: "auto" (the default) computes SGD's momentum here where a sparse codec keeps residuals,
            "off" leaves it to the server.
        accumulate: backward passes per push, 1 by default. The loop stays as it is: ``step`` and ``zero_grad`` do
            nothing until the last of them, which pushes the mean.
        overlap: "auto" (the default) sends gradients during backward unless the loop changes them afterwards, "on"
            always, "off" never.
        plane: "auto" (the default) shares memory with servers on this host, "memory" insists on it, "network" does not.
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
        overlap: str | None = None,
        plane: str | None = None,
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
            "overlap": overlap,
            "plane": plane,
            "timeout": timeout,
        }
        config = dataclasses.replace(
            from_environment(WorkerConfig, os.environ), **{k: v for k, v in given.items() if v is not None}
        )
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self.wrapped = optimizer
        self.name = config.name or default_name()
        self._accumulate = config.accumulate
        self.weight = 1.0
        self._micro_step, self._earlier_weight = 0, 0.0
        self._changed: list[Hyper] | None = None  # per group, from the first bucket of a step on
        self._class, self._hyper = optim.describe(optimizer)
        self._arguments = optim.arguments_of(self._class)
        self._parameters, described, buffers = _tensors(self._class, self._hyper, optimizer, model)
        self._flat = Flat([*self._parameters, *buffers])
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
        )
        self._session.on_values = self._flat.write
        self._close = weakref.finalize(self, self._session.close)
        atexit.register(self._close)
        try:
            self._session.join(described, config.rank, lambda b: self._flat.read(b, torch.empty(b.numel)))
            buckets = self._session.plan.buckets
            names = [spec.name for spec in described.tensors()]
            trained = [bucket for bucket in buckets if bucket.rule == "optimizer"]
            self._gradients = Gradients(self._parameters, names)
            self._overlap = Overlap(config.overlap, self._parameters, names, trained, self._send)
            self._overlap.armed = self._accumulate == 1
            for bucket in buckets:
                self._session.pull(bucket)
            self._outcome = self._session.wait()
        except BaseException:
            self.close()
            raise
        self._flat.settle()

    # -------------------------------------------------------------- the training loop

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Push the gradients, wait as the mode says, and put the fresh parameters into the model.

        Args:
            closure: evaluates the model again and returns the loss, as in torch.

        Raises:
            WaitTimeout: says who is waited for.
            PsError: see its message; the model holds the parameters of the last step.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._micro_step += 1
        last = self._micro_step == self._accumulate
        self._gradients.at_step(getattr(self, "grad_scale", None), getattr(self, "found_inf", None), last=last)
        if not last:
            self._earlier_weight += self.weight
            self._overlap.armed = self._micro_step == self._accumulate - 1
            return loss
        try:
            self._overlap.check(scaled=self._gradients.scaled)
            if not self._overlap.sent:
                self._gradients.check()
            self._gradients.report(self.name, self._session.next_step)
            for bucket in reversed(self._session.plan.buckets):  # in the order of backward
                if bucket.index not in self._overlap.sent:
                    self._send(bucket)
        finally:
            # Also when the check fails: what has left is answered, and the next step starts in order.
            self._outcome = self._session.wait()
            self._overlap.reset()
            self._gradients.reset()
            self._overlap.armed = self._accumulate == 1
            self._micro_step, self._earlier_weight, self._changed = 0, 0.0, None
            self._flat.settle()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch, but between two pushes of ``accumulate`` it keeps what has been accumulated."""
        if not self._micro_step:
            super().zero_grad(set_to_none)

    # -------------------------------------------------------------- facts

    @property
    def mode(self) -> str:
        return self._session.job.mode

    @property
    def version(self) -> int:
        """Optimizer steps that the parameters in the model have had."""
        return self._outcome.version

    @property
    def staleness(self) -> int:
        """Of the last push: optimizer steps between the parameters it was computed from and those it was applied to."""
        return self._outcome.staleness

    @property
    def samples(self) -> float:
        """Sum of the weights that the whole job has absorbed, as of the last step."""
        return self._outcome.samples

    @property
    def left_out(self) -> int:
        """Steps of this worker that were pushed with weight 0 because a gradient was not finite."""
        return self._gradients.num_left_out

    @property
    def left_out_in_a_row(self) -> int:
        """How many of them there have been since the last step with a finite gradient."""
        return self._gradients.in_a_row

    @property
    def pushed_bytes(self) -> int:
        """Encoded gradients sent so far."""
        return self._session.pushed_bytes

    @property
    def pulled_bytes(self) -> int:
        """Encoded parameters received so far."""
        return self._session.pulled_bytes

    @property
    def wait_seconds(self) -> float:
        """Seconds that ``step`` has waited for answers so far."""
        return self._session.wait_seconds

    @property
    def workers(self) -> tuple[str, ...]:
        """Names of the workers in rank order; waits for the first quorum, at most ``timeout`` seconds."""
        return tuple(member.worker for member in self._session.roster().member)

    @property
    def rank(self) -> int:
        """This worker's place among ``workers``."""
        return self.workers.index(self.name)

    @property
    def world(self) -> int:
        """Number of ``workers``."""
        return len(self.workers)

    def close(self) -> None:
        """Leave the job; the others go on. Called at exit if the script does not."""
        self._close()
        atexit.unregister(self._close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -------------------------------------------------------------- inside

    def _checked_hyper(self) -> list[Hyper]:
        """Per group, what differs from the job's hyperparameters.

        Raises:
            ConfigError: torch would refuse a value; nothing has been sent.
        """
        found = []
        for number, (group, job) in enumerate(zip(self.param_groups, self._session.job_model.groups, strict=True)):
            hyper = optim.hyper_of(self._class, group, self._arguments)
            if hyper != self._hyper[number]:
                optim.check_change(self._class, job.hyper, hyper)
                self._hyper[number] = hyper
            found.append(optim.changed(hyper, job.hyper))
        return found

    def _send(self, bucket: Bucket) -> None:
        """Push one bucket; during backward this runs on the thread that computes it."""
        if self._changed is None:
            self._changed = self._checked_hyper()
        staging = self._session.staging(bucket)
        trained = bucket.rule == "optimizer"
        if trained:
            self._gradients.gather(bucket, staging)
            if self._accumulate > 1:
                staging.div_(self._accumulate)
        else:
            self._flat.read(bucket, staging)
        hyper = self._changed[bucket.group] if trained else None
        momentum = self._corrected(bucket, staging) if trained and self._corrects else None
        if momentum is not None:
            hyper = {**(hyper or {}), **Momentum.HYPER}
        self._session.push(
            bucket,
            staging,
            step=self._session.next_step,
            base=self._session.versions[bucket.index],
            weight=0.0 if trained and self._gradients.left_out else self._earlier_weight + self.weight,
            hyper=hyper,
            momentum=momentum,
            missing=trained and self._gradients.missing(bucket),
            nonfinite=trained and bool(self._gradients.left_out),
        )

    def _corrected(self, bucket: Bucket, gradient: torch.Tensor) -> Hyper | None:
        """The hyperparameters of the momentum that this worker computes, None if the server does; adds the decay."""
        hyper = optim.hyper_of(self._class, self.param_groups[bucket.group], self._arguments)
        if not Momentum.fits(self._class, hyper):
            return None
        if decay := hyper.get("weight_decay"):
            gradient.add_(self._flat.read(bucket, torch.empty(bucket.numel)), alpha=float(decay))  # type: ignore[arg-type]
        return hyper


def _tensors(
    name: str, hyper: list[Hyper], optimizer: torch.optim.Optimizer, model: torch.nn.Module
) -> tuple[list[torch.Tensor], Model, list[torch.Tensor]]:
    """The trained parameters in flat order, the model they make, and the buffers that go along."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    parameters: list[torch.Tensor] = []
    groups: list[Group] = []
    for number, group in enumerate(optimizer.param_groups):
        trained = [parameter for parameter in group["params"] if parameter.requires_grad]
        for parameter in trained:
            if id(parameter) not in names:
                raise ConfigError(
                    f"group {number} of the optimizer has a parameter of shape {list(parameter.shape)} that is not in "
                    "the model; pass the module that holds all of them"
                )
        groups.append(Group(tuple(TensorSpec.of(names[id(p)], p) for p in trained), hyper[number]))
        parameters += trained
    kept = model.state_dict(keep_vars=True)
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in kept}
    described = Model(name, tuple(groups), tuple(TensorSpec.of(key, buffer) for key, buffer in buffers.items()))
    schema.check(described)
    return parameters, described, list(buffers.values())
