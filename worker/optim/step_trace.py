"""The parts of a training step as spans, in the steps that are traced.

    | data | forward | loss | backward | loop | exchange |    from the end of one ``optimizer.step`` to that of the next

Rules of this file
  1. The parts of a step touch each other: each begins when the one before ends, so their sum is the step.
  2. The model has hooks only where steps are traced, and loses them when these are over.
  3. Time is that of the process: what a GPU still has to compute when a call returns is not in it.

Source: DistributedDataParallel queues a callback for the end of backward in the same way, torch/nn/parallel.
"""

import threading
from typing import Any

import torch
from torch import nn

from torch_ps.common.trace import Span, clock
from torch_ps.worker.optim.pytree import tensors_in
from torch_ps.worker.runtime.lifetime import Part
from torch_ps.worker.session.session import Session


class StepTrace(Part):
    """Traces the training steps of one worker; a context manager around each ``optimizer.step``.

    Args:
        model: model whose forward and backward become spans. If the loop calls parts of it, not the model itself,
            forward and backward are in the span of the part around them.
        session: session whose trace gets the spans.
    """

    def __init__(self, model: nn.Module, session: Session) -> None:
        self._session, self._trace = session, session.trace
        self._thread = threading.current_thread().name
        self._step = session.next_step
        self._begin = self._last = clock()
        self._handles = [
            model.register_forward_pre_hook(lambda *_: self._mark("data")),
            model.register_forward_hook(self._end_forward),
        ]

    def __enter__(self) -> None:
        self._mark("loop")

    def __exit__(self, *error: object) -> None:
        self._mark("exchange")
        if self._step in self._trace.steps:
            self._add("step", self._begin)
        self._begin, self._step = self._last, self._session.next_step
        if self._step >= self._trace.steps.stop and self._handles:
            self.close()
            threading.Thread(target=self._session.upload_trace, name="trace", daemon=True).start()

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def after_fork_in_child(self) -> None:
        """Remove the hooks, in a forked child."""
        self.close()

    def _mark(self, part: str) -> None:
        """End the span ``part``, which began at the last mark."""
        begin, self._last = self._last, clock()
        if self._step in self._trace.steps:
            self._add(part, begin)

    def _add(self, name: str, begin: int) -> None:
        self._trace.add(Span(name, self._step, begin, self._last, self._thread))

    def _end_forward(self, _model: nn.Module, _args: Any, output: Any) -> None:
        self._mark("forward")
        if self._step not in self._trace.steps:
            return
        for tensor in tensors_in(output):
            if tensor.requires_grad:
                tensor.register_hook(self._begin_backward)  # type: ignore[no-untyped-call]
                return

    def _begin_backward(self, _gradient: torch.Tensor) -> None:
        self._mark("loss")
        engine = torch.autograd.Variable._execution_engine
        engine.queue_callback(lambda: self._mark("backward"))
