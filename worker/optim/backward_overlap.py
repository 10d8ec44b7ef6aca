"""Watches backward: names each bucket as soon as all its gradients are there, while the rest is still computed.

    backward --gradient is ready--> hook --last one of a bucket--> send(bucket)

What ``send`` does decides what a loop may do afterwards:

    sent ahead  the servers hold the gradient; ``step`` compares it with ``.grad`` and decides. Nothing is promised.
    eager       the push leaves and is applied when all workers have sent it. The loop promises what ``EagerPromise``
                checks: gradients, weights and hyperparameters stay as they are until ``step``.

Source: DistributedDataParallel's reducer, Li et al., VLDB 2020, arXiv:2006.15704, for sending buckets during backward.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from torch_ps.common.errors import PsError
from torch_ps.common.plan import Bucket
from torch_ps.worker.optim.ahead_choice import AheadChoice
from torch_ps.worker.runtime.lifetime import Part

log = logging.getLogger("torch_ps.worker")


@dataclass(frozen=True, slots=True)
class OverlapMode:
    """What the option ``overlap`` says.

    Attributes:
        during_backward: whether gradients leave during backward.
        eager: whether they are applied when they arrive, not at ``step``.
        chooses: whether gradients leave during backward only where that is faster (``ahead_choice.py``).
        forward: whether ``step`` returns before parameters are in.
    """

    during_backward: bool
    eager: bool
    chooses: bool
    forward: bool


def overlap_mode(text: str) -> OverlapMode:
    """Read the option ``overlap``, one of ``worker_config.OVERLAPS``."""
    words = text.split(",")
    eager = "eager" in words
    return OverlapMode("off" not in words, eager, not eager and "on" not in words, "forward" in words)


class BackwardOverlap(Part):
    """The hooks on the parameters of one model. Each bucket is sent at most once between two calls of ``reset``.

    Args:
        parameters: trained parameters, in the order of ``Model.tensors()``.
        buckets: buckets with gradients.
        choice: the choice for each step whether anything is sent; None: everything always is.
        promise: promise of the loop that what leaves may be applied at once; None: the loop promises nothing.

    Attributes:
        promise: promise of the loop.
        armed: whether the next backward is the last one before a push.
        send: function that takes a bucket whose gradients are ready, on the thread that runs backward, and returns
            whether it has left.
        on_ready: called when a gradient has been computed, on the thread that did so.
        sent: numbers of the buckets that have left since ``reset``.
    """

    def __init__(
        self,
        parameters: Sequence[torch.Tensor],
        buckets: Sequence[Bucket],
        choice: AheadChoice | None = None,
        promise: "EagerPromise | None" = None,
    ) -> None:
        self._choice, self.promise = choice, promise
        self._buckets = {bucket.index: bucket for bucket in buckets}
        self._of: list[list[int]] = [[] for _ in parameters]
        for bucket in buckets:
            for tensor in {piece.tensor for piece in bucket.pieces}:
                self._of[tensor].append(bucket.index)
        self._waits_for = {bucket.index: len({p.tensor for p in bucket.pieces}) for bucket in buckets}
        self._so_far = 0, 0  # bytes used, and sent ahead, until the last step
        self.armed = True
        self.send: Callable[[Bucket], bool] = lambda bucket: False
        self.on_ready: Callable[[], None] = lambda: None
        self.reset()
        self._handles = [
            parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                lambda parameter, index=index: self.ready(index, parameter)
            )
            for index, parameter in enumerate(parameters)
        ]

    def reset(self) -> None:
        """Forget what this step has seen; the next backward begins a new one."""
        self._seen: set[int] = set()
        self._missing = dict(self._waits_for)
        self.sent: set[int] = set()
        if self.promise is not None:
            self.promise.reset()

    def learn(self, used: int, sent: int) -> None:
        """Note, at the end of a step, how many bytes were used so far of how many sent ahead; see ``AheadChoice``."""
        (used_before, sent_before), self._so_far = self._so_far, (used, sent)
        if self._choice is not None and self._choice.end(used - used_before, sent - sent_before):
            log.info("gradients change between backward and step, so most of them are sent at step")

    def ready(self, index: int, parameter: torch.Tensor) -> None:
        """Note that a parameter has its gradient; the last one of a bucket sends it."""
        if not self.armed or parameter.grad is None:
            return
        if self.promise is not None:
            self.promise.note(index, parameter)
        if self._choice is not None:
            if not self._seen:
                self._choice.begin(time.monotonic())
            if not self._choice.ahead:
                self._seen.add(index)
                return
        if index in self._seen:
            return
        self._seen.add(index)
        self.on_ready()
        for bucket in self._of[index]:
            self._missing[bucket] -= 1
            if not self._missing[bucket] and self.send(self._buckets[bucket]):
                self.sent.add(bucket)

    def close(self) -> None:
        """Remove the hooks: they and the parameters hold each other where no garbage collector looks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def after_fork_in_child(self) -> None:
        """Remove the hooks, in a forked child: its gradients are its own."""
        self.close()


class EagerPromise:
    """Checks what a loop promises with ``overlap="eager"``. The first step only watches: nothing leaves before it.

    Args:
        parameters: trained parameters, in the order of ``Model.tensors()``.
        names: names of the tensors, in the same order.

    Attributes:
        trusted: whether a step has kept the promise, so that pushes leave during backward from now on.
    """

    def __init__(self, parameters: Sequence[torch.Tensor], names: Sequence[str]) -> None:
        self._parameters, self._names = parameters, names
        self.trusted = False
        self.reset()

    def reset(self) -> None:
        """Begin a new step."""
        self._seen: dict[int, tuple[int, int]] = {}  # parameter -> gradient's id and version when it was ready
        self._again = False  # a parameter got a gradient twice

    def note(self, index: int, parameter: torch.Tensor) -> None:
        """Note the gradient of a parameter as it is when backward has computed it."""
        self._again |= index in self._seen
        self._seen[index] = (id(parameter.grad), 0 if parameter.grad is None else parameter.grad._version)

    def check(self, *, left: bool, scaled: bool, hyper: bool) -> None:
        """Check the promise at ``step``, before anything else leaves.

        Args:
            left: whether gradients have left during backward.
            scaled: whether a GradScaler has told ``step`` the scale, so that what left during backward was scaled.
            hyper: whether hyperparameters have changed since the first gradient left.

        Raises:
            PsError: the promise is broken; says how and what to do.
        """
        broken = ""
        if scaled:
            broken = "a GradScaler scales the gradients, whose scale is known at step only"
        elif self._again:
            broken = "a second backward added to gradients"
        elif changed := self._changed():
            broken = f"the gradient of {changed!r} was changed after backward"
        elif hyper:
            broken = "hyperparameters were changed after backward"
        if broken and self._seen:
            what = "some have been applied already" if left else "nothing has been sent"
            raise PsError(
                f"overlap='eager' applies gradients during backward, and {broken} ({what}); leave overlap out if the "
                "loop clips, scales, accumulates or changes anything between backward and step, or use accumulate=k"
            )
        self.trusted |= bool(self._seen)

    def _changed(self) -> str | None:
        for index, (identity, version) in self._seen.items():
            gradient = self._parameters[index].grad
            if gradient is None or id(gradient) != identity or gradient._version != version:
                return self._names[index]
        return None
