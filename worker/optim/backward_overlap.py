"""When a bucket's gradient may leave: during backward where that is safe, else at ``step``.

Sending during backward hides communication behind computation, but it takes the gradient as backward left it. If the
loop changes gradients afterwards (clipping, a GradScaler, a second backward to accumulate), they have to leave at
``step`` instead. So ``auto`` watches the first step and then decides. Whatever was decided, every later step checks
that no gradient changed after it had left, and raises an error if one did.

    backward: hook per parameter --> counts --> all parameters of a bucket ready --> send(bucket)
    step:     check --> send what has not left

Source: DistributedDataParallel's reducer, Li et al., VLDB 2020, arXiv:2006.15704, for buckets that leave when ready.
"""

import logging
from collections.abc import Callable, Sequence

import torch

from torch_ps.common.errors import PsError
from torch_ps.common.plan import Bucket
from torch_ps.worker.runtime.lifetime import Part

log = logging.getLogger("torch_ps.worker")


class BackwardOverlap(Part):
    """Watches the gradients of one model and sends buckets during backward.

    Args:
        mode: "auto", "on", "off", or "forward", which is "on" for backward.
        parameters: trained parameters, in the order of ``Model.tensors()``.
        names: names of the tensors, in the same order.
        buckets: buckets with gradients.
        send: function that takes a bucket whose gradients are ready, on the thread that runs backward.

    Attributes:
        armed: whether the next backward is the last one before a push.
        on_ready: called when a gradient has been computed, on the thread that did so.
        sent: numbers of the buckets that have left since ``reset``.
    """

    def __init__(
        self,
        mode: str,
        parameters: Sequence[torch.Tensor],
        names: Sequence[str],
        buckets: Sequence[Bucket],
        send: Callable[[Bucket], None],
    ) -> None:
        self._learning = mode == "auto"
        self._on = mode in ("on", "forward")
        self._parameters, self._names, self._send = parameters, names, send
        self._buckets = {bucket.index: bucket for bucket in buckets}
        self._of: list[list[int]] = [[] for _ in parameters]
        for bucket in buckets:
            for piece in bucket.pieces:
                self._of[piece.tensor].append(bucket.index)
        self._waits_for = {bucket.index: len({p.tensor for p in bucket.pieces}) for bucket in buckets}
        self.armed = True
        self.on_ready: Callable[[], None] = lambda: None
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        if mode != "off":
            self._handles = [
                parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                    lambda p, index=index: self._ready(index, p)
                )
                for index, parameter in enumerate(parameters)
            ]
        self.reset()

    def reset(self) -> None:
        """Forget what this step has seen; the next backward begins a new one."""
        self._seen: dict[int, tuple[int, int]] = {}  # parameter -> gradient's id and version when it was ready
        self._again = False  # a parameter got a gradient twice
        self._missing = dict(self._waits_for)
        self.sent: set[int] = set()

    def _ready(self, index: int, parameter: torch.Tensor) -> None:
        if not self.armed or parameter.grad is None:
            return
        self._again |= index in self._seen
        first = index not in self._seen
        self._seen[index] = (id(parameter.grad), parameter.grad._version)
        if not self._on or not first:
            return
        self.on_ready()
        for bucket in self._of[index]:
            self._missing[bucket] -= 1
            if not self._missing[bucket]:
                self._send(self._buckets[bucket])
                self.sent.add(bucket)

    def check(self, *, scaled: bool = False) -> None:
        """Decide at the first ``step``, verify at every later one; call it before anything else is sent.

        Args:
            scaled: whether a GradScaler has told ``step`` the scale, so that what left during backward was scaled.

        Raises:
            PsError: a gradient changed after it had been sent; says which and what to do.
        """
        changed = self._changed()
        if self.sent and scaled:
            raise PsError(
                "gradients that a GradScaler had scaled were sent during backward, before their scale was known; pass "
                "overlap='off', or overlap='auto' and use the GradScaler from the first step on"
            )
        if self._learning and self._seen:
            self._learning = False
            self._on = not (changed or self._again or scaled)
            if not self._on:
                log.info("gradients change between backward and step, so they are sent at step, not during backward")
                self._remove()
        elif self.sent and (changed or self._again):
            what = f"gradient of {changed!r} was changed" if changed else "a second backward ran"
            raise PsError(
                f"{what} after gradients had been sent during backward; pass overlap='off' if the loop clips, scales "
                "or accumulates gradients itself, or use accumulate=k"
            )

    def _changed(self) -> str | None:
        for index, (identity, version) in self._seen.items():
            gradient = self._parameters[index].grad
            if gradient is None or id(gradient) != identity or gradient._version != version:
                return self._names[index]
        return None

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def close(self) -> None:
        """Remove the hooks: they and the parameters hold each other where no garbage collector looks."""
        self._remove()

    def after_fork_in_child(self) -> None:
        """Remove the hooks, in a forked child: its gradients are its own."""
        self._remove()
