"""Pushes the gradients of a whole model, step by step, and leaves the model as torch's own step would.

    backward   a bucket is ready --> sent ahead, for the servers to hold; with overlap="eager" pushed at once
    push()     finds what the loop has written, checks that all is finite, sends every bucket that has not been pushed
    complete   waits for the answers, which put fresh parameters into the model; with overlap="forward" at ``wait()``

Rules of this file
  1. All or nothing: except with overlap="eager", no gradient counts before all are known to be finite.
  2. What has left is answered before the next push begins, also after an error, so that steps end in order.
  3. It reads no option: where an option asks for something, the part that does it is there; else that is None.
"""

from typing import Any

import torch

from torch_ps.common.optimizer_spec import Hyper
from torch_ps.common.plan import Bucket
from torch_ps.worker.gradients.flat_tensors import FlatTensors
from torch_ps.worker.gradients.gradients import Gradients, NoGradients
from torch_ps.worker.gradients.local_steps import LocalSteps
from torch_ps.worker.gradients.momentum_correction import MomentumCorrection
from torch_ps.worker.gradients.server_optimizer import ServerOptimizer
from torch_ps.worker.optim.backward_overlap import BackwardOverlap
from torch_ps.worker.optim.forward_overlap import ForwardOverlap
from torch_ps.worker.optim.gpu_transfer import Pusher
from torch_ps.worker.optim.shared_views import SharedViews
from torch_ps.worker.optim.untracked_writes import UntrackedWrites
from torch_ps.worker.optim.weight_writes import WeightWrites
from torch_ps.worker.runtime.lifetime import weakly
from torch_ps.worker.session.answers import StepOutcome
from torch_ps.worker.session.session import Session, Written


class ModelPush:
    """The pushes of one model. Make it when the model holds the job's parameters, then call ``begin``.

    Args:
        session: session of the worker.
        pusher: the session, or the GPU transfer in its place.
        flat: tensors of the model.
        server_optimizer: optimizer that the servers run.
        gradients: gradients of the model.
        local: local steps, whose rounds are pushed in place of gradients; None without.
        overlap: hooks of backward, which call this object from now on.
        forward: hooks of forward, with overlap="forward"; else None.
        views: tensors of the model in shared memory.

    Attributes:
        outcome: outcome of the last push that was seen to its end.
    """

    outcome: StepOutcome

    def __init__(
        self,
        session: Session,
        pusher: Pusher,
        flat: FlatTensors,
        server_optimizer: ServerOptimizer,
        gradients: Gradients,
        local: LocalSteps | None,
        overlap: BackwardOverlap,
        forward: ForwardOverlap | None,
        views: SharedViews,
    ) -> None:
        self._session, self._pusher, self._flat, self._server_optimizer = session, pusher, flat, server_optimizer
        self._gradients, self._local = gradients, local
        self._overlap, self._forward, self._views = overlap, forward, views
        self._source: Gradients | LocalSteps | NoGradients = local or gradients  # what the buckets are taken from
        self._changed: list[Hyper] | None = None  # per group, from the first bucket of a push on
        self._written: dict[int, Written] = {}  # by bucket, in a push
        self._failed = False  # the last push was not seen to its end, and may be what the next one is answered for
        self._stepped: list[torch.Tensor] = []  # parameters that the push under way steps
        overlap.send = weakly(self._send_ahead if overlap.promise is None else self._send_eagerly)
        session.answers_meanwhile = forward is not None or overlap.promise is not None
        self._weights: WeightWrites | None = None
        self._untracked: UntrackedWrites | None = None
        if local is None and overlap.promise is None:
            self._weights = WeightWrites(session.plan, gradients.parameters, flat)
        else:
            always = local is None and forward is None
            self._untracked = UntrackedWrites(gradients.parameters, gradients.names, always=always)

    def begin(self, outcome: StepOutcome) -> None:
        """Begin, or begin again, with the parameters that a pull has brought; what was under way is forgotten.

        Args:
            outcome: outcome of the pull.
        """
        self.outcome, self._changed, self._failed = outcome, None, False
        self._overlap.reset()
        self._arm()
        self._flat.settle()
        self._gradients.reset()
        self._source.reset()
        if self._local is None and self._forward is None:
            self._views.share(self._session, receive_here=self._pusher is self._session)
        if self._untracked is not None:
            self._untracked.settle()

    def abandon(self) -> None:
        """Stop waiting for the last push: its place in the job is lost. ``begin`` comes next."""
        self._views.release()
        if self._forward is not None:
            self._forward.abandon()

    # -------------------------------------------------------------- a step

    def begin_step(self, scale: torch.Tensor | None, overflow: torch.Tensor | None) -> bool:
        """Take the gradients of one backward pass; returns whether they complete a push, or a local step.

        Args:
            scale: factor of the gradients that a GradScaler has set; None without one, or if they have none any more.
            overflow: above 0 if a gradient is not finite; None without a GradScaler.

        Raises:
            PsError: with local steps, a parameter was written to before the first one.
        """
        if self._local is not None:
            self._check_untracked()  # before an inner step, whose writes are known
        due = self._gradients.passes.add()
        self._gradients.begin_step(scale, overflow, last=due)
        if self._gradients.scaled:
            self._views.release_gradients()
        self._arm()
        return due

    def end_step(self) -> None:
        """Forget the passes of a step that was due; the next backward begins a new one."""
        self._gradients.passes.reset()
        self._arm()

    def push(self) -> None:
        """Send what the servers shall apply, and wait for it.

        Raises:
            WaitTimeout: says who is waited for.
            PsError: see its message.
        """
        kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._session.discard_unanswered()  # nothing waits for it if this push fails before anything has left
        try:
            left = set() if self._overlap.promise is None else self._overlap.sent
            self._check_promise()
            self._gradients.put_back()
            if self._weights is not None:
                self._written = self._weights.find()
                kept = self._weights.keep() if self._failed else []
            self._source.check()
            if self._source.left_out:
                self._views.release_gradients()
            self._source.report(self._session.name, f"step {self._session.next_step}")
            self._stepped = self._find_stepped()
            for bucket in self._order():
                if bucket.index not in left:
                    self._send(bucket)
        except BaseException:
            self._complete()  # what has left is answered, and the next step starts in order
            raise
        if self._forward is None:
            self._complete()
            self._failed = False
            with torch.no_grad():  # the push may have been answered for the one before it, which lacked the writes
                for parameter, values in kept:
                    parameter.copy_(values)
        else:
            self._mark_stepped()
            self._forward.begin(self._flat.tensors)
            self._forget()

    def push_nothing(self) -> None:
        """Push weight 0, without gradients; raises as ``push``."""
        self._views.release_gradients()  # they are not what is pushed
        self._source = NoGradients()
        try:
            self.push()
        finally:
            self._source = self._local or self._gradients

    def wait(self) -> None:
        """Return when the parameters of the last push are in the model. Only overlap="forward" has to wait for them.

        Raises:
            WaitTimeout: says who is waited for.
            PsError: see its message; ``push`` raises the same without overlap="forward".
        """
        if self._forward is not None and self._forward.open:
            try:
                self.outcome = self._forward.finish()
                self._failed = False
            except BaseException:
                self._overlap.reset()
                raise

    # -------------------------------------------------------------- before the buckets leave

    def _arm(self) -> None:
        """Let the next backward send gradients if it is the last one before a push."""
        self._overlap.armed = self._gradients.passes.last_is_next

    def _check_untracked(self) -> None:
        if self._untracked is not None:
            self._untracked.check(self._session.version)

    def _check_promise(self) -> None:
        """Check what a loop promises with overlap="eager"; raises PsError if the promise is broken."""
        if self._overlap.promise is None:
            return
        left = bool(self._overlap.sent)
        hyper = left and self._changed != self._server_optimizer.changed(self._session.job_model.groups)
        self._overlap.promise.check(left=left, scaled=self._gradients.scaled, hyper=hyper)

    def _find_stepped(self) -> list[torch.Tensor]:
        """The parameters that torch would step now; the others stay untouched unless other workers step them."""
        parameters, stepped = self._gradients.parameters, list[torch.Tensor]()
        if not isinstance(self._source, NoGradients) and not self._source.left_out:
            stepped = [parameter for parameter in parameters if parameter.grad is not None]
        if self._local is None and len(stepped) == len(parameters):
            self._flat.idle(())
        elif self._local is None:
            numbers = {id(parameter) for parameter in stepped}
            self._flat.idle(index for index, each in enumerate(parameters) if id(each) not in numbers)
        return stepped

    def _order(self) -> list[Bucket]:
        """All buckets, in the order in which ``push`` sends them.

        With overlap="forward" the first layer is waited for first. Else all are, and the servers work on large ones
        while small ones are still sent.
        """
        buckets = list(self._session.plan.buckets)
        return buckets if self._forward is not None else sorted(reversed(buckets), key=lambda each: -each.numel)

    # -------------------------------------------------------------- one bucket

    def _send_ahead(self, bucket: Bucket) -> bool:
        """Send one bucket for the servers to hold, on the thread of backward; returns whether it has left."""
        if not self._session.sends_ahead(bucket):
            return False
        self.wait()
        self._session.discard_unanswered()
        step = self._session.next_step
        with self._session.span("ahead", step, bucket.index), self._pusher.staging(bucket) as staging:
            self._pusher.send_ahead(bucket, self._gradients.gather(bucket, staging), step=step)
        return True

    def _send_eagerly(self, bucket: Bucket) -> bool:
        """Push one bucket, on the thread of backward; returns whether it has left."""
        if self._overlap.promise is None or not self._overlap.promise.trusted:
            return False
        self._send(bucket)
        return True

    def _send(self, bucket: Bucket) -> None:
        """Push one bucket."""
        self.wait()
        if self._changed is None:  # the first bucket of this push
            self._check_untracked()
            self._session.discard_unanswered()
            if self._weights is None:
                self._flat.follow()  # else done when it looked for writes
            self._changed = self._server_optimizer.changed(self._session.job_model.groups)
        trained, step = bucket.rule == "optimizer", self._session.next_step
        with self._session.span("push", step, bucket.index):
            facts: dict[str, Any] = {
                "step": step,
                "base": self._session.version_of(bucket),
                "weight": self._weight_of(trained),
                "hyper": self._changed[bucket.group] if trained else None,
                "missing": trained and self._source.missing(bucket),
                "absent": self._source.absent(bucket) if trained else self._flat.absent_buffers(bucket),
                "written": self._written.get(bucket.index),
                "nonfinite": trained and bool(self._source.left_out),
            }
            if not self._push_in_place(bucket, facts):
                self._push_copy(bucket, facts)

    def _push_in_place(self, bucket: Bucket, facts: dict[str, Any]) -> bool:
        """Push one bucket without a copy of its gradient; returns whether that can be done.

        It can if the gradient is pushed as it is, and ``push`` waits for the answer, so that the loop cannot change it
        before.
        """
        if (
            self._source is not self._gradients
            or self._pusher is not self._session
            or self._forward is not None
            or self._overlap.promise is not None
            or bucket.rule != "optimizer"
            or bucket.index in self._written
        ):
            return False
        parts = self._gradients.in_place(bucket)
        encoded = self._session.encode_in_place(bucket, parts) if parts else None
        if not parts or encoded is None:
            return False
        self._session.push(bucket, parts[0], encoded=encoded, **facts)
        return True

    def _push_copy(self, bucket: Bucket, facts: dict[str, Any]) -> None:
        """Push a copy of the values of one bucket."""
        with self._pusher.staging(bucket) as staging:
            if bucket.rule == "optimizer":
                self._source.gather(bucket, staging)
                momentum = self._server_optimizer.momentum(bucket, staging, self._flat)
                if momentum is not None:
                    facts |= {"momentum": momentum, "hyper": {**(facts["hyper"] or {}), **MomentumCorrection.HYPER}}
            else:
                self._flat.read(bucket, staging)
            self._pusher.push(bucket, staging, **facts)

    def _weight_of(self, trained: bool) -> float:
        """The weight of a bucket of parameters, or of buffers, which every pass has changed."""
        if isinstance(self._source, NoGradients) or (trained and self._source.left_out):
            return 0.0
        if self._local is None:
            return self._gradients.passes.total_weight
        return self._local.applied if trained else self._local.passed

    # -------------------------------------------------------------- when all have left

    def _complete(self) -> None:
        try:
            self.outcome = self._pusher.wait()
        except BaseException:
            self._failed = True
            self._session.abandon()
            self._views.release()
            if self._untracked is not None:
                self._untracked.lose_count()
            raise
        finally:
            self._flat.settle()
            self._forget()
        self._views.settle()
        self._mark_stepped()
        if self._untracked is not None:
            self._untracked.settle()

    def _mark_stepped(self) -> None:
        """Count a write to every parameter that was stepped, as torch does, so that a graph from before is refused.

        Values that are copied into a parameter count by themselves. Those that come into its memory do not, and with
        overlap="forward" they come later.
        """
        if self._local is None and (self._views.shared or self._forward is not None):
            last = self.outcome
            others = self._forward is None and (len(last.contributors) > 1 or last.staleness)
            torch.autograd.graph.increment_version(self._gradients.parameters if others else self._stepped)
        self._stepped = []

    def _forget(self) -> None:
        self._changed, self._written = None, {}
        self._overlap.learn(self._session.used_bytes, self._session.ahead_bytes)
        self._overlap.reset()
        self._source.reset()
